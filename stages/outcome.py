"""How a run ends: one clear message and an exit code, whatever happened inside.

0 done; 1 an error (the message; the traceback is in run.log, SEAWALL_TRACEBACK=1 shows it); 2 a mistaken command;
75 told to make room and to be started again (SIGUSR1); 130 Ctrl-C; 143 terminated.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from callbacks.signals import EXIT_CODES
from callbacks.wandb_process import end_wandb
from configs.compose import ConfigError
from datamodules.durable import DiskFullError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def exit_code_of(action: Callable[[], None]) -> int:
    """Call `action`, print what went wrong if something did, and return the exit code."""
    before = {signum: signal.signal(signum, _end) for signum in EXIT_CODES}
    try:
        code = _code_of(action)
        end_wandb(code)
        return code
    except SystemExit as end:  # told to stop while it sends its last metrics
        return _code_of_exit(end)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def _code_of(action: Callable[[], None]) -> int:
    try:
        action()
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return _code_of_exit(end)
    except Exception as error:
        if os.environ.get("SEAWALL_TRACEBACK", "") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def message(error: Exception) -> str:
    """What a user needs to know of `error`: its own words if it is meant for users, else its kind as well."""
    if _disk_is_full(error):
        return f"the disk is full: {error}. Nothing finished is lost: make room and run the same command again"
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _end(signum: int, frame: FrameType | None) -> None:
    # In a fit callbacks/interruption.py has taken the handler's place and stops after a whole batch. Between the two
    # Lightning has its own before this one; it then raises SIGTERMException, which by itself would exit with 0.
    if signal.getsignal(signum) is _end:
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once, whatever it does
        raise SystemExit(EXIT_CODES[signum])


def _code_of_exit(end: SystemExit) -> int:
    if type(end).__name__ == "SIGTERMException":
        return 143
    if isinstance(end.__context__, KeyboardInterrupt):  # raised elsewhere: Lightning turns it into sys.exit(1)
        return 130
    return end.code if isinstance(end.code, int) else 1


def _disk_is_full(error: BaseException | None) -> bool:
    """Also when a library (safetensors, torch) retold the system's error in its own words."""
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
