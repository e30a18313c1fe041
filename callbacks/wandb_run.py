"""One W&B run for a whole experiment: every stage, the report, and every process that resumes it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import WandbLogger

from configs.keys import leaves
from configs.schema import Config

if TYPE_CHECKING:
    from wandb import Run


class StageLogger(WandbLogger):
    """Logs `sea_dpo/align/loss` where the stage's own files say `align/loss`: the stages share one run."""

    LOGGER_JOIN_CHAR = "/"


def wandb_run(cfg: Config, folder: Path) -> Run:
    """The W&B run of a run directory, begun or gone on with; call it on the leader alone.

    Made here rather than by Lightning's logger, which passes wandb a setting that it warns about.
    """
    import wandb

    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]  # folders elsewhere may have this name
    name = f"{cfg.experiment}-{folder.name}"
    identity = f"{name[-50:]}-{place}"
    if wandb.run is not None:
        if wandb.run.id == identity:
            return wandb.run
        wandb.finish()
    run = wandb.init(
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        mode=cfg.logger.mode,  # type: ignore[arg-type]
        dir=str(folder),
        name=name,
        id=identity,
        resume="allow",
        config={leaf.key: leaf.value for leaf in leaves(cfg) if not leaf.key.startswith("slurm.")},
    )
    run.define_metric("trainer/global_step")  # each stage counts its own steps from 0
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run
