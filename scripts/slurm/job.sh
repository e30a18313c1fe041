#!/bin/bash
# Stage @STAGE@ of @RUN_DIR@. Made by scripts/slurm/submit.py; `sbatch` with this file starts it by hand.
@DIRECTIVES@

set -u
restarts=${SLURM_RESTART_COUNT:-0}
step=
told=
# Before the time limit SLURM sends USR1 to this script alone (`B:`): sent to the stage itself it would be lost while
# there is no stage yet. SIGTERM would end this shell while the stage still saves: let it wait instead.
trap 'told=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1
trap : TERM
cd @WORKDIR@ || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
@SETUP@
echo "== $SLURM_JOB_NAME, job $SLURM_JOB_ID, start $((restarts + 1)) on $SLURM_JOB_NODELIST, $(date '+%F %T')"

# A field of this job as SLURM sees it now.
seen() { scontrol show job "$SLURM_JOB_ID" --oneliner | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }

# Back to the queue, unless it was cancelled meanwhile; SLURM then ends this script.
again() {
  trap - TERM USR1
  if [ "$restarts" -ge @RESTARTS@ ]; then
    echo "== $1, but it was started again @RESTARTS@ times already (slurm.@STAGE@.restarts)"
  elif [ "$(seen JobState)" = RUNNING ]; then
    echo "== $1: back to the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
  fi
}

[ -z "$told" ] || again "told to stop before the stage began"
# Ranks that are told to stop do not leave in the same instant, and none must be killed while it saves.
srun @SRUN@ \
  @COMMAND@ &
step=$!
while :; do
  wait "$step"
  rc=$?
  kill -0 "$step" 2>/dev/null || break
done
wait "$step"
last=$?
[ "$last" = 127 ] || rc=$last # the signal may have come at the very end

case $rc in
  0) ;;
  75 | 138) again "told to stop before the time limit" ;; # 138: before the program could listen
  # SIGTERM: preempted with a grace time, or cancelled. SLURM takes a job that ends within its grace for failed, and
  # its dependents with it, so a preempted one asks for its restart itself. A cancelled one is not RUNNING any more.
  143) case "$(seen PreemptTime)" in "" | None) ;; *) again "preempted" ;; esac ;;
esac
echo "== ended with $rc, $(date '+%F %T')"
exit "$rc"
