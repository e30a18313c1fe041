"""How a run ends: one clear message and an exit code, whatever happened inside.

0 done; 1 an error (the message; the traceback is in run.log, SEAWALL_TRACEBACK=1 shows it); 2 a mistaken command;
75 told to make room and to be started again (SIGUSR1); 130 Ctrl-C; 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from callbacks.signals import EXIT_CODES
from callbacks.wandb_process import end_wandb
from configs.compose import ConfigError
from stages.failures import current, stay
from stages.telling import spoken


def exit_code_of(action: Callable[[], None]) -> int:
    """Call `action`, print what went wrong if something did, and return the exit code."""
    before = {signum: signal.signal(signum, _end) for signum in EXIT_CODES}
    try:
        code = _code_of(action)
        # What is left is sending the last metrics and this code: to stop now would save nothing, and W&B would never
        # learn how the run ended. Ctrl-C still ends it.
        for ignored in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(ignored, signal.SIG_IGN)
        end_wandb(code)
        return code
    except SystemExit as end:  # Ctrl-C while it sends
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
        failures = current()
        if failures is None or not failures.told:  # one of several processes has said it before it ended its run
            print(f"error: {spoken(error)}", file=sys.stderr, flush=True)
        stay()
        return 2 if isinstance(error, ConfigError) else 1
    return 0


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
