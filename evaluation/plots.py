"""The report's figures: ASR against benign compliance, and loss curves from Lightning's CSV logs.

Colours are those of Okabe & Ito (2008), told apart also by people who see few colours, and every variant has its
own marker, which is hollow where a guard stands before the variant. Drawn without a display.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from evaluation.rows import GenerationRow, system

COLOURS = {
    "base": "#000000",
    "text_sft": "#E69F00",
    "text_dpo": "#D55E00",
    "sea_sft": "#56B4E9",
    "sea_dpo": "#0072B2",
}
MORE_COLOURS = ("#009E73", "#CC79A7", "#999999")
MARKERS = "osDv^P*X"


class Curve(NamedTuple):
    label: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """One figure of loss curves; `name` is the file's name, `title` stands above it."""

    name: str
    title: str
    curves: Sequence[Curve]
    ylabel: str = "loss"
    log_scale: bool = False


def read_curves(files: Mapping[str, str | Path | Sequence[str | Path]], column: str) -> list[Curve]:
    """One curve for each label from the metrics.csv files of Lightning's CSVLogger.

    Args:
        files: label -> path, or several paths where a run was resumed (`version_0`, `version_1`, ...): a later file
            replaces the steps that it repeats.
        column: the logged name, e.g. "train/loss". Rows where it is empty belong to other metrics.

    Raises:
        ValueError: no such file or column, or no values in it; names the file and the columns there are.
    """
    curves = []
    for label, paths in files.items():
        points: dict[int, float] = {}
        several = [paths] if isinstance(paths, (str, Path)) else paths
        for path in several:
            new = _read_points(Path(path), column)
            points = {step: value for step, value in points.items() if not new or step < min(new)} | new
        if not points:
            raise ValueError(f"{', '.join(map(str, several))}: column {column!r} has no values; was it logged?")
        steps = sorted(points)
        curves.append(Curve(label, steps, [points[step] for step in steps]))
    return curves


def plot_losses(panel: Panel, path: Path) -> Path:
    """Draws the curves over optimiser steps; long ones faint, with a running mean over 2 % of their points on top."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for colour, curve in zip(_colours([c.label for c in panel.curves]), panel.curves, strict=True):
        window = max(1, len(curve.values) // 50)
        if window > 1:
            axes.plot(curve.steps, curve.values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(curve.steps, _running_mean(curve.values, window), color=colour, linewidth=1.6, label=curve.label)
    axes.set(title=panel.title, xlabel="optimiser step", ylabel=panel.ylabel)
    if panel.log_scale:
        axes.set_yscale("log")
    elif all(value >= 0 for curve in panel.curves for value in curve.values):
        axes.set_ylim(bottom=0)
    _tidy(axes)
    if len(panel.curves) > 1:
        axes.legend(frameon=False)
    return _save(figure, path)


def plot_asr_against_compliance(results: Iterable[Mapping[str, Any]], benchmark: str, path: Path) -> bool:
    """One panel for each task that has both harmful and harmless requests, with 95 % bars: one point for each variant,
    and a hollow one for each variant behind the guard.

    Returns False, and draws nothing, if there is no such task: an attack success rate is not shown alone.
    """
    rates = {
        (entry["variant"], entry["guard"], entry["task"], entry["metric"]): entry
        for entry in results
        if entry["benchmark"] == benchmark and entry["scenario"] == "all" and entry["value"] is not None
    }
    pairs = {
        (variant, guard, task): (rates[variant, guard, task, "benign_compliance"], rates[variant, guard, task, "asr"])
        for variant, guard, task, metric in rates
        if metric == "asr" and (variant, guard, task, "benign_compliance") in rates
    }
    if not pairs:
        return False
    shown = list(dict.fromkeys((variant, guard) for variant, guard, _ in pairs))
    variants = list(dict.fromkeys(variant for variant, _ in shown))
    tasks = list(dict.fromkeys(task for _, _, task in pairs))
    looks = dict(zip(variants, zip(_colours(variants), itertools.cycle(MARKERS), strict=False), strict=True))
    figure = Figure(figsize=(1.2 + 3.4 * len(tasks), 4.3), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for variant, guard in shown:
            if (variant, guard, task) in pairs:
                # Later ones are smaller: variants that share a place stay visible, one within the other.
                size = 16 - 9 * variants.index(variant) / max(1, len(variants) - 1)
                _point(axes, *pairs[variant, guard, task], looks[variant], guard, size)
        arrow = {"arrowstyle": "->", "color": "#888888"}
        axes.annotate(
            "better", xy=(0.6, 0.4), xytext=(0.4, 0.6), color="#888888", ha="center", va="center", arrowprops=arrow
        )
        axes.set(title=task.replace("_", " "), xlabel="benign compliance", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _tidy(axes)
    panels[0].set_ylabel("attack success rate (ASR)")
    handles = [
        Line2D([], [], linestyle="", markersize=8, label=system(variant, guard), **_marker(looks[variant], guard))
        for variant, guard in shown
    ]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(variants))
    figure.suptitle(f"{benchmark}: harmful and harmless requests complied with; bars: 95 % intervals", fontsize=11)
    _save(figure, path)
    return True


def _marker(look: tuple[str, str], guard: str) -> dict[str, Any]:
    """The look of a variant's point: filled with a thin white border, or hollow behind a guard.

    Hollow ones are see-through: behind a guard several variants often share a place.
    """
    colour, marker = look
    hollow = guard != GenerationRow.guard
    face, edge, width = ("none", colour, 1.6) if hollow else (colour, "white", 0.8)
    return {
        "color": colour,
        "marker": marker,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
    }


def _point(
    axes: Axes, x: Mapping[str, Any], y: Mapping[str, Any], look: tuple[str, str], guard: str, size: float
) -> None:
    bars = axes.errorbar(
        x["value"],
        y["value"],
        xerr=_arms(x),
        yerr=_arms(y),
        markersize=size,
        elinewidth=1.2,
        zorder=3,
        **_marker(look, guard),
    )
    for artist in bars.get_children():  # a point at 0 or 100 % keeps its whole marker
        artist.set_clip_on(False)


def _arms(entry: Mapping[str, Any]) -> list[list[float]]:
    low, high = entry["ci95"]
    return [[entry["value"] - low], [high - entry["value"]]]


def _colours(labels: Sequence[str]) -> list[str]:
    others = [label for label in labels if label not in COLOURS]
    return [COLOURS.get(label) or MORE_COLOURS[others.index(label) % len(MORE_COLOURS)] for label in labels]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _read_points(path: Path, column: str) -> dict[int, float]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the metrics.csv of a CSVLogger")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        if column not in names or "step" not in names:
            raise ValueError(f"{path}: needs the columns 'step' and {column!r}, has {', '.join(names) or 'none'}")
        return {int(float(row["step"])): float(row[column]) for row in reader if row[column]}


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path
