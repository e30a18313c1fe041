"""Puts finished results where the run's metrics are: W&B (metrics, a table of samples, plots) and TensorBoard.

docs/sweeps.md has the names of all metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.wandb_run import wandb_run
from configs.schema import Config
from evaluation.objective import report_objectives, system_name
from evaluation.report import ReportFiles
from evaluation.rows import GenerationRow


def log_report(
    cfg: Config, folder: Path, report: Mapping[str, Any], files: ReportFiles, rows: Sequence[GenerationRow]
) -> None:
    """Rates over all scenarios (of several judges the first one's), objectives, samples and plots."""
    values: dict[str, float] = {}
    for r in report["results"]:
        if r["scenario"] == "all" and r["value"] is not None:
            who = system_name(r["variant"], r["guard"])
            values.setdefault(f"eval/{who}/{r['benchmark']}/{r['task']}/{r['metric']}", r["value"])
    values |= {f"objective/{who}": value for who, value in report_objectives(report["results"]).items()}
    media: dict[str, Any] = {}
    if cfg.logger.wandb:
        import wandb

        columns = ["variant", "guard", "benchmark", "task", "request", "scenario", "prompt", "answer"]
        step = max(1, len(rows) // max(1, cfg.logger.samples))
        samples = [[getattr(row, c) for c in columns] for row in rows[::step][: cfg.logger.samples]]
        media["samples"] = wandb.Table(columns=columns, data=samples)
        media |= {f"plots/{path.stem}": wandb.Image(str(path)) for path in files.plots.values()}
    log_values(cfg, folder, folder / "evaluate", values, media)


def log_values(
    cfg: Config, run_dir: Path, stage: Path, values: Mapping[str, float], media: Mapping[str, Any] | None = None
) -> None:
    """Numbers at the end of a stage, whose folder `stage` is; `media`: W&B's own objects."""
    if cfg.logger.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(stage / "tensorboard")) as writer:
            for name, value in values.items():
                writer.add_scalar(name, value)
    if cfg.logger.wandb:
        wandb_run(cfg, run_dir).log({**values, **(media or {})})
