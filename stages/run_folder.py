"""Where a run lives, and the locks that keep it to one process, or to the shards of one synthesis.

.lock              exclusive: one process for the whole run; shared: shards (stages/synthesis_shard.py)
.lock-<shard>      exclusive: one process for each shard
.lock-turn         exclusive, for a moment: a shard that reads or writes what all of them share
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from callbacks.wandb_process import sweep_run
from configs.check import check_folder_name
from configs.schema import Config
from datamodules.durable import sync_folder
from stages import ranks

log = logging.getLogger(__name__)

REQUEUED_WAITS = 120.0
"""How long (s) a requeued job waits for the lock: a file server may keep that of a dead machine so long."""

_open_here: set[Path] = set()


def choose(cfg: Config, leader: bool) -> Path:
    """The run directory, absolute. A run without a name gets a new folder each time, but for a sweep's or SLURM's."""
    if not leader and ranks.RUN_DIR in os.environ:
        return Path(os.environ[ranks.RUN_DIR])
    if cfg.run_dir is not None:
        return Path(cfg.run_dir).expanduser().resolve()
    base = Path("runs").resolve() / cfg.experiment
    # A sweep before SLURM: one job may hold an agent that runs several trials, each with a folder of its own.
    sweep = sweep_run()
    name = cfg.run if cfg.run is not None else f"sweep-{sweep}" if sweep else ranks.slurm_job()
    if name is not None:
        check_folder_name("run", name)
        return base / name
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("torchrun starts several processes that must agree on a place: set run=NAME or run_dir=PATH")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        path = base / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{base}: 999 runs began in this second; set run=NAME")


def lock(path: Path, shard: str | None = None) -> list[int]:
    """Take the folder, or one shard of it, for this process; returns open files for `unlock`.

    POSIX locks, which end with the process and are not inherited by forks.

    Raises:
        ValueError: another process has it.
    """
    if path in _open_here:
        raise ValueError(f"{path}: in use by process {os.getpid()}, this one; close the run first")
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    patience = REQUEUED_WAITS if requeued else 10.0 if shard else 0.0  # `shards_at_work` takes a lock for a moment
    who = f"process {os.getpid()} on {os.uname().nodename}"
    handles = [_locked(path, path / ".lock", fcntl.LOCK_SH if shard else fcntl.LOCK_EX, patience)]
    try:
        if shard:
            handles.append(_locked(path, path / f".lock-{shard}", fcntl.LOCK_EX, patience))
            who = f"{shard}, {who}"
    except BaseException:
        os.close(handles[0])
        raise
    for handle in handles:
        os.ftruncate(handle, 0)
        os.pwrite(handle, who.encode(), 0)
    _open_here.add(path)
    sync_folder(path)
    return handles


def unlock(path: Path, handles: list[int]) -> None:
    """Give the folder back."""
    _open_here.discard(path)
    for handle in handles:
        os.close(handle)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """While this lasts, other shards wait for their turn."""
    handle = os.open(path / ".lock-turn", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try(handle, fcntl.LOCK_EX):
            log.info("waits while another shard prepares or ends the stage")
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def shards_at_work(path: Path, but: str) -> list[str]:
    """Names of the other shards that are open in some process now."""
    found = []
    for file in sorted(path.glob(".lock-shard-*")):
        if (name := file.name.removeprefix(".lock-")) != but:
            handle = os.open(file, os.O_RDWR)
            if not _try(handle, fcntl.LOCK_EX):
                found.append(name)
            os.close(handle)
    return found


def _locked(path: Path, file: Path, kind: int, patience: float) -> int:
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    until = time.monotonic() + patience
    while not _try(handle, kind):
        if time.monotonic() > until:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ValueError(f"{path}: in use by {owner}; wait for it, end it, or take another run=NAME")
        time.sleep(0.5)
    return handle


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("this file system has no locks; do not start two processes in one run directory")
    return True
