"""Where a run lives, and the lock that keeps it to one process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path

from configs.check import check_folder_name
from configs.schema import Config
from datamodules.durable import sync_folder
from stages import ranks

log = logging.getLogger(__name__)

_open_here: set[Path] = set()


def choose(cfg: Config, leader: bool) -> Path:
    """The run directory, absolute. A run without a name gets a new folder each time, but for a requeued SLURM job."""
    if not leader and ranks.RUN_DIR in os.environ:
        return Path(os.environ[ranks.RUN_DIR])
    if cfg.run_dir is not None:
        return Path(cfg.run_dir).expanduser().resolve()
    base = Path("runs").resolve() / cfg.experiment
    name = cfg.run if cfg.run is not None else ranks.slurm_job()
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


def lock(path: Path) -> int:
    """Take the folder for this process; a POSIX lock, which ends with the process and is not inherited by forks."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if path in _open_here:
            raise BlockingIOError
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        if path not in _open_here:  # closing any handle of this file would drop this process's own lock on it
            os.close(handle)
        raise ValueError(f"{path}: in use by {owner}; wait for it, end it, or take another run=NAME") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: this file system has no locks; do not start two processes here", path)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    _open_here.add(path)
    sync_folder(path)
    return handle


def unlock(path: Path, handle: int) -> None:
    """Give the folder back."""
    _open_here.discard(path)
    os.close(handle)
