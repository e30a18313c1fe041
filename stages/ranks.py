"""Which of the processes of one run this is, read from the launcher's environment before any process group exists.

Lightning starts the processes of a node by running the same command again, SLURM and torchrun start them all at once.
Only the leader writes to the run directory; the others wait for what it decided.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import psutil

log = logging.getLogger(__name__)

T = TypeVar("T")

RUN_DIR = "SEAWALL_RUN_DIR"
SESSION = "SEAWALL_SESSION"
LEADER = "SEAWALL_LEADER"
"""Set by the leader, inherited by the processes that Lightning starts: the place, a name for this one launch, and the
leader's process id."""


def is_leader() -> bool:
    """True in the one process that may write: global rank 0, or the only process."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if "LOCAL_RANK" in env:
        return env["LOCAL_RANK"] == "0" and env.get("NODE_RANK", "0") == "0"
    return env.get("SLURM_PROCID", "0") == "0"


def local_rank() -> int:
    """This process's number among those on its node, and so the number of its device."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def global_rank() -> str:
    """A name for this process among those of its launch: its global rank, or node and place on it."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"]
    if "LOCAL_RANK" in env:
        return f"{env.get('NODE_RANK', '0')}.{env['LOCAL_RANK']}"
    return env.get("SLURM_PROCID", "0")


def spoken(rank: str) -> str:
    """`rank 3`, or `rank 1 of node 2` where only the place on a node is known."""
    node, _, place = rank.rpartition(".")
    return f"rank {place}" + (f" of node {node}" if node not in ("", "0") else "")


def several() -> bool:
    """Whether this launch has more than one process. Lightning's leader knows it from the moment it starts them."""
    env = os.environ
    if "WORLD_SIZE" in env:
        return env["WORLD_SIZE"] != "1"
    return "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1


def slurm_job() -> str | None:
    """`JOB` or `ARRAY_TASK` under SLURM: the same after a requeue, unlike a time stamp."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def session() -> str:
    """A name of this launch, equal in all its processes and different after a restart."""
    env = os.environ
    if SESSION in env and not is_leader():
        return env[SESSION]
    if "TORCHELASTIC_RUN_ID" in env:
        name = f"torchrun-{env['TORCHELASTIC_RUN_ID']}-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"{name}-{_agreed(name)}"
        if env.get("WORLD_SIZE") == env.get("LOCAL_WORLD_SIZE"):  # one node, and every launch has the same default id
            agent = psutil.Process(os.getppid())
            name += f"-{agent.pid}-{agent.create_time():.2f}"
        return name
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm-{slurm_job()}-{env['SLURM_STEP_ID']}-{env.get('SLURM_RESTART_COUNT', '0')}"
    return uuid.uuid4().hex


def _agreed(name: str) -> str:
    """What the leader has drawn for this launch, from the store of torchrun's agent, which dies with the launch:
    torchrun's own id is `none`, or whatever the user gives, each time."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(minutes=10))
    key = f"seawall/{name}"
    if is_leader():
        return store.compare_set(key, "", uuid.uuid4().hex).decode()
    return store.get(key).decode()


def wait_for(look: Callable[[], T | None], what: str, timeout: float = float("inf")) -> T:
    """Poll `look` until it returns something.

    Other ranks may rightly take hours, so there is no limit by default: a rank that fails takes the others with it
    (stages/failures.py; for one that is killed, Lightning watches those that it started, torchrun its workers, `srun
    --kill-on-bad-exit` its tasks).

    Raises:
        TimeoutError: after `timeout` (s).
        SystemExit: the leader that started this process is gone.
    """
    began = told = time.monotonic()
    while (seen := look()) is None:
        now = time.monotonic()
        if now - began > timeout:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}: the leading process is gone or stuck, see its log")
        if orphaned():
            raise SystemExit(143)
        if now - told > 600:
            told = now
            log.info("has waited %.0f minutes for %s", (now - began) / 60, what)
        time.sleep(0.1)
    return seen


def end_with_leader() -> None:
    """See to it that this process, which the leader has started, does not outlive it, also if that is killed with -9.

    Left alone, it would go on writing to a run directory that the next attempt works in. Under SLURM and torchrun the
    leader starts nobody, and this does nothing.
    """
    if LEADER in os.environ and not any(thread.name == LEADER for thread in threading.enumerate()):
        threading.Thread(target=_watch, name=LEADER, daemon=True).start()


def orphaned() -> bool:
    """Whether the leader that started this process is gone."""
    return not is_leader() and os.environ.get(LEADER, str(os.getppid())) != str(os.getppid())


def _watch() -> None:
    while not orphaned():
        time.sleep(0.3)
    os._exit(143)  # as after kill -9: whatever is on the disk by now is whole
