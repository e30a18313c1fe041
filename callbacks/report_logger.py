"""Puts the finished report where the run's metrics are: W&B (metrics, a table of samples, plots) and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.wandb_run import wandb_run
from configs.schema import Config
from evaluation.report import ReportFiles
from evaluation.rows import GenerationRow, system


def log_report(
    cfg: Config, folder: Path, report: Mapping[str, Any], files: ReportFiles, rows: Sequence[GenerationRow]
) -> None:
    """Metric names: `eval/<variant>/<benchmark>/<task>/<metric>`, overall rows only; guarded: `<variant>+protector`."""
    overall = [r for r in report["results"] if r["scenario"] == "all" and r["value"] is not None]
    answered = [system(r["variant"], r["guard"]).replace(" ", "") for r in overall]
    values = {
        f"eval/{who}/{r['benchmark']}/{r['task']}/{r['metric']}": r["value"]
        for who, r in zip(answered, overall, strict=True)
    }
    if cfg.logger.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "evaluate" / "tensorboard")) as writer:
            for name, value in values.items():
                writer.add_scalar(name, value)
    if cfg.logger.wandb:
        _log_wandb(cfg, folder, values, files, rows)


def _log_wandb(
    cfg: Config, folder: Path, values: Mapping[str, float], files: ReportFiles, rows: Sequence[GenerationRow]
) -> None:
    import wandb

    with wandb_run(cfg, folder) as run:
        columns = ["variant", "guard", "benchmark", "task", "request", "scenario", "prompt", "answer"]
        step = max(1, len(rows) // max(1, cfg.logger.samples))
        samples = [[getattr(row, c) for c in columns] for row in rows[::step][: cfg.logger.samples]]
        run.log(
            dict(values)
            | {"samples": wandb.Table(columns=columns, data=samples)}
            | {f"plots/{path.stem}": wandb.Image(str(path)) for path in files.plots.values()}
        )
