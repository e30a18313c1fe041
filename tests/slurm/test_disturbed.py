"""Jobs on a real SLURM cluster that are told to stop: what they end with equals an undisturbed run."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil

from tests.slurm.cluster import Chain, same_adapter, same_store, signal_waits, slurm

TWO = "stages=[synthesize,align]"


def test_usr1_requeues_synthesize_and_then_align_of_two_ranks(undisturbed: Path, tmp_path: Path) -> None:
    chain = Chain(tmp_path / "run", TWO, "slurm.align.tasks=2")
    chain.until_stored(2)
    slurm("scancel", "--signal=USR1", chain.ids["synthesize"])
    chain.completes("synthesize")
    assert chain.field("synthesize", "Restarts") == "1"
    assert "told to stop: saved after step" in chain.log("synthesize")
    same_store(chain.run, undisturbed)
    chain.until_said("align", r"sea_sft: [1-9]\d*/24")
    slurm("scancel", "--signal=USR1", chain.ids["align"])
    chain.completes("align")
    assert chain.field("align", "Restarts") == "1"
    assert saved_at(chain.log("align")) == resumed_at(chain.log("align")) < 24
    same_adapter(chain.run, undisturbed)


def test_preempted_job_is_requeued_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """With a grace time SLURM sends SIGTERM, and takes a job that then ends for failed: the script asks for more."""
    chain = Chain(tmp_path / "run", TWO, "slurm.all.partition=low", "slurm.synthesize.extra=['--gres=seat:1']")
    chain.until_stored(2)
    words = ["--partition=high", "--gres=seat:1", "--output=/dev/null", "--wrap=sleep 3"]
    urgent = slurm("sbatch", "--parsable", *words)
    chain.until_said("synthesize", "preempted: back to the queue")
    assert "told to stop: saved after step" in chain.log("synthesize")
    chain.completes()
    assert chain.field("synthesize", "Restarts") == "1"
    assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", urgent)
    same_store(chain.run, undisturbed)
    same_adapter(chain.run, undisturbed)


def test_job_that_its_user_cancels_stays_cancelled_and_can_be_submitted_again(
    undisturbed: Path, tmp_path: Path
) -> None:
    chain = Chain(tmp_path / "run", TWO)
    chain.until_stored(2)
    slurm("scancel", chain.ids["synthesize"])
    chain.until_state("synthesize", "CANCELLED")
    chain.until_state("align", "CANCELLED")
    time.sleep(10)  # a requeued job would start again after five seconds
    assert chain.field("synthesize", "JobState") == "CANCELLED"
    assert chain.field("synthesize", "Restarts") == "0"
    assert not chain.processes("synthesize")
    again = Chain(chain.run, TWO)
    again.completes()
    same_store(chain.run, undisturbed)
    same_adapter(chain.run, undisturbed)


def test_time_limit_requeues_before_it_strikes(undisturbed: Path, tmp_path: Path) -> None:
    """The program is stopped (SIGSTOP) until SLURM has sent its warning: a long job that needs no minutes of work."""
    chain = Chain(tmp_path / "run", TWO, "slurm.synthesize.time=2", "slurm.synthesize.warn=45")
    chain.until_stored(2)
    (program,) = chain.processes("synthesize")
    program.send_signal(signal.SIGSTOP)
    try:
        chain.wait(lambda: signal_waits(program, signal.SIGUSR1), "warning by SLURM", "synthesize")
    finally:
        program.send_signal(signal.SIGCONT)
    chain.completes()
    assert chain.field("synthesize", "Restarts") == "1"
    assert "told to stop: saved after step" in chain.log("synthesize")
    assert not psutil.pid_exists(program.pid)
    same_store(chain.run, undisturbed)
    same_adapter(chain.run, undisturbed)


def saved_at(log: str) -> int:
    (step,) = {int(step) for step in re.findall(r"told to stop: saved after step (\d+)", log)}
    return step


def resumed_at(log: str) -> int:
    return int(re.findall(r"sea_sft: begins at (\d+)/24", log)[-1])
