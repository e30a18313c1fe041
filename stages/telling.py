"""What a user needs to know of an error, in its own words where they are meant for users. Nothing heavy is imported."""

from __future__ import annotations

import errno

from datamodules.durable import DiskFullError
from lightning_modules.at_work import OutOfMemory

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RankFailed(RuntimeError):
    """Another process of this run has failed; its message is the reason."""


def spoken(error: BaseException) -> str:
    """One message; the kind of error stands before it where its text alone says nothing."""
    if _disk_is_full(error):
        return f"the disk is full: {error}. Nothing finished is lost: make room and run the same command again"
    if isinstance(error, (ValueError, OSError, OutOfMemory, RankFailed)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _disk_is_full(error: BaseException | None) -> bool:
    """Also when a library (safetensors, torch) retold the system's error in its own words."""
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
