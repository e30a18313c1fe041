"""One W&B run for a whole experiment: every stage, the report, and every process that resumes it.

The run's id comes from the run directory, so a requeued job goes on with the same W&B run; a sweep's agent says the id
itself, and the run directory is then named by it (stages/run_folder.py). Told to stop through W&B, a run ends as after
SIGTERM: saved after the batch, exit code 143 (docs/sweeps.md).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.wandb_process import sweep_run
from configs.keys import leaves
from configs.schema import Config

if TYPE_CHECKING:
    from wandb import Run

STEP = "trainer/global_step"
PROBED = "probe/objective"


class StageLogger(WandbLogger):
    """Logs `sea_dpo/align/loss` where the stage's own files say `align/loss`: the stages share one run.

    What a probe finds is logged a second time, under the name that the finished report uses: a sweep looks at one name.
    """

    LOGGER_JOIN_CHAR = "/"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        if PROBED in metrics:
            named[f"objective/{self._prefix}"] = metrics[PROBED]
        self.experiment.log(named if step is None else {**named, STEP: step})


def wandb_run(cfg: Config, folder: Path) -> Run:
    """The W&B run of a run directory, begun or gone on with; call it on the leader alone.

    Made here rather than by Lightning's logger, which passes wandb a setting that it warns about.
    """
    import wandb

    sweep = sweep_run()
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]  # folders elsewhere may have this name
    name = f"{cfg.experiment}-{folder.name}"
    plain = re.sub(r"[:;,#?/\s]", "_", name[-50:])  # what wandb refuses
    identity = f"{plain}-{place}" if sweep is None else os.environ["WANDB_RUN_ID"]
    if wandb.run is not None:
        if wandb.run.id == identity:
            return wandb.run
        wandb.finish()
    # A sweep's project, entity and id are its own; wandb would warn that it ignores ours.
    where = {"project": cfg.logger.project, "entity": cfg.logger.entity, "id": identity} if sweep is None else {}
    run = wandb.init(
        **where,  # type: ignore[arg-type]
        mode=cfg.logger.mode,  # type: ignore[arg-type]
        dir=str(folder),
        name=name,
        resume="allow",
        config={leaf.key: leaf.value for leaf in leaves(cfg) if not leaf.key.startswith("slurm.")},
        settings=wandb.Settings(stop_fn=_stop),
    )
    run.define_metric(STEP)  # each stage counts its own steps from 0
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def _stop() -> None:
    """In place of wandb's SIGINT, which ends a fit where it stands: nothing since the last checkpoint would be kept."""
    os.kill(os.getpid(), signal.SIGTERM)
