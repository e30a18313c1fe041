"""What this process has to do with W&B, without importing it: an agent may have started it, a run may be open in it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from callbacks.signals import RESTART

log = logging.getLogger(__name__)


def sweep_run() -> str | None:
    """`<sweep>-<run>` where the agent of a sweep has started this process, the same when it resumes the run."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return f"{sweep}-{run}" if sweep and run else None


def end_wandb(code: int) -> None:
    """Ends the W&B run, if there is one, with the exit code of this process.

    wandb's own hook would not see it: it takes the place of `sys.exit`, which train.py has looked up before. A run that
    is to be started again is marked as preempted, so that a sweep hands it to the next agent.
    """
    run: Any = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return
    if code == RESTART:
        run.mark_preempting()
    try:
        run.finish(exit_code=code)
    except Exception as error:  # what wandb cannot send must not change how the run ended
        log.warning("W&B: %s; `wandb sync %s` sends what is missing", error, run.dir.removesuffix("/files"))
