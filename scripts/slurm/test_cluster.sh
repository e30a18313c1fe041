#!/usr/bin/env bash
# A real SLURM cluster of one node on this machine, for the tests (Debian or Ubuntu, as root, no systemd needed).
#
#   scripts/slurm/test_cluster.sh start    install what is missing, start munge, slurmctld and slurmd; prints SLURM_CONF
#   scripts/slurm/test_cluster.sh stop     end what `start` has started, by process id
#
# Its configuration and state lie in a folder of their own (SEAWALL_SLURM, default /run/seawall-slurm): every command
# reads SLURM_CONF, so a configuration in /etc/slurm is neither read nor changed. Exit code 3: this machine cannot.
set -euo pipefail

STATE=${SEAWALL_SLURM:-/run/seawall-slurm}
CPUS=${SEAWALL_SLURM_CPUS:-8} # more than there are, perhaps: four array tasks must be able to start at the same second
PORT=${SEAWALL_SLURM_PORT:-16817}
export SLURM_CONF=$STATE/slurm.conf

alive() { local pid; pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; }

end() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  rm -f "$1"
}

cannot() { echo "no SLURM here: $1" >&2; exit 3; }

install_packages() {
  local need=() pair
  for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
    command -v "${pair%%:*}" >/dev/null || need+=("${pair##*:}")
  done
  [ ${#need[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || cannot "${need[*]} missing, and there is no apt-get"
  local log=$STATE/log/apt.log
  # Packages that are there must not start services of their own.
  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}"; } \
    >"$log" 2>&1 || cannot "apt-get could not install ${need[*]}: $(tail -n 1 "$log")"
}

start_munge() { # what one SLURM daemon knows another by
  if munge -n </dev/null 2>/dev/null | unmunge >/dev/null 2>&1; then return; fi
  mkdir -p /run/munge
  chown munge: /run/munge
  chmod 755 /run/munge
  [ -s /etc/munge/munge.key ] || {
    (umask 077; dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none)
    chown munge: /etc/munge/munge.key
  }
  runuser -u munge -- /usr/sbin/munged --force
  cp /run/munge/munged.pid "$STATE/munged.pid" 2>/dev/null || true
}

configure() {
  local host memory
  host=$(hostname -s)
  memory=$(awk '/MemTotal/{print int($2/1024*0.8)}' /proc/meminfo)
  cat >"$SLURM_CONF.new" <<CONF
ClusterName=seawall
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits this long before it may start again; the default is two minutes.
AuthInfo=cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
# Something that there is one of: who wants it preempts who has it, whatever else runs on the node.
GresTypes=seat
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=120
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation=$STATE/slurmctld
SlurmdSpoolDir=$STATE/slurmd
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.log
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$memory Gres=seat:1 State=UNKNOWN
PartitionName=work Nodes=$host Default=YES MaxTime=120 DefaultTime=60 State=UP PriorityTier=5 PreemptMode=off
PartitionName=low Nodes=$host MaxTime=120 DefaultTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=$host MaxTime=120 DefaultTime=60 State=UP PriorityTier=10 PreemptMode=off
CONF
  echo "Name=seat Count=1" >"$STATE/gres.conf"
  if ! cmp -s "$SLURM_CONF.new" "$SLURM_CONF"; then
    end "$STATE/slurmd.pid"
    end "$STATE/slurmctld.pid"
    mv "$SLURM_CONF.new" "$SLURM_CONF"
  fi
  rm -f "$SLURM_CONF.new"
}

start_daemons() { # both go into the background by themselves
  alive "$STATE/slurmctld.pid" || slurmctld -f "$SLURM_CONF"
  alive "$STATE/slurmd.pid" || slurmd -f "$SLURM_CONF"
  for _ in $(seq 150); do
    case "$(sinfo -h -p work -o %t 2>/dev/null || true)" in
      idle* | mix* | alloc*) return ;;
      down* | drain* | unk*) scontrol update nodename="$(hostname -s)" state=resume 2>/dev/null || true ;;
    esac
    sleep 0.2
  done
  tail -n 20 "$STATE"/log/slurm*.log >&2
  cannot "the daemons did not come up"
}

case "${1:-}" in
  start)
    [ "$(id -u)" = 0 ] || cannot "installing and starting it takes root"
    mkdir -p "$STATE"/{log,slurmctld,slurmd}
    install_packages
    start_munge
    configure
    start_daemons
    echo "$SLURM_CONF"
    ;;
  stop)
    for daemon in slurmd slurmctld munged; do end "$STATE/$daemon.pid"; done
    ;;
  *)
    sed -n '2,8p' "$0" >&2
    exit 2
    ;;
esac
