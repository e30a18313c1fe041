"""The signals that end a run, and the exit code that each leads to. Nothing heavy is imported: handlers come first."""

from __future__ import annotations

import signal

RESTART = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again."""

EXIT_CODES = {int(signal.SIGTERM): 143, int(signal.SIGUSR1): RESTART, int(signal.SIGINT): 130}
"""SIGTERM: stop. SIGUSR1 (SLURM's `--signal`): stop, because the time is running out, and be started again. SIGINT
(Ctrl-C): stop; a second one ends the process at once."""
