"""The report's figures: ASR against benign compliance, and loss curves from Lightning's CSV logs.

Colours are those of Okabe & Ito (2008), told apart also by people who see few colours; a variant has the same one in
every figure of every report. Drawn without a display.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from evaluation.rows import system

COLOURS = {
    "base": "#000000",
    "text_sft": "#E69F00",
    "text_dpo": "#D55E00",
    "sea_sft": "#56B4E9",
    "sea_dpo": "#0072B2",
}
MORE_COLOURS = ("#009E73", "#CC79A7", "#999999")


class Side(NamedTuple):
    """One of the two rates that are only shown together, and how it looks; `offset` from the middle of a row."""

    metric: str
    label: str
    colour: str
    marker: str
    offset: float


SIDES = (
    Side("asr", "harmful requests complied with (ASR): lower is better", "#C03000", "o", -0.16),
    Side("benign_compliance", "benign requests complied with: higher is better", "#007A58", "D", 0.16),
)


class Curve(NamedTuple):
    label: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes. share: how much of what they are the mean of is still there at a step, 0..1."""

    curves: Sequence[Curve]
    ylabel: str = "loss"
    xlabel: str = "optimiser step"
    log_scale: bool = False
    share: Curve | None = None


@dataclass(frozen=True)
class Panel:
    """One figure, its charts side by side; `name` is the file's name, `title` stands above it."""

    name: str
    title: str
    charts: Sequence[Chart]


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
    """Draws the curves; long ones faint, with a running mean over 2 % of their points on top."""
    n = len(panel.charts)
    figure = Figure(figsize=(7 if n == 1 else 4.6 * n, 4), layout="constrained")
    for axes, chart in zip(figure.subplots(1, n, squeeze=False)[0], panel.charts, strict=True):
        _draw(axes, chart)
    figure.suptitle(panel.title)
    return _save(figure, path)


def _draw(axes: Axes, chart: Chart) -> None:
    for colour, curve in zip(_colours([c.label for c in chart.curves]), chart.curves, strict=True):
        window = max(1, len(curve.values) // 50)
        if window > 1:
            axes.plot(curve.steps, curve.values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(curve.steps, _running_mean(curve.values, window), color=colour, linewidth=1.6, label=curve.label)
    axes.set(xlabel=chart.xlabel, ylabel=chart.ylabel)
    if chart.log_scale:
        axes.set_yscale("log")
    elif all(value >= 0 for curve in chart.curves for value in curve.values):
        axes.set_ylim(bottom=0)
    _tidy(axes)
    if len(chart.curves) > 1:
        axes.legend(frameon=False)
    if chart.share is not None:
        right = axes.twinx()
        right.plot(chart.share.steps, chart.share.values, color="#999999", linewidth=1, linestyle="--")
        right.set(ylim=(0, 1.02), ylabel=chart.share.label)
        right.yaxis.label.set_color("#777777")
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.spines["top"].set_visible(False)


def plot_asr_against_compliance(results: Iterable[Mapping[str, Any]], benchmark: str, path: Path) -> bool:
    """One panel for each task that has both harmful and harmless requests, in it one row for each variant and for each
    variant behind the guard: two dots with 95 % bars, their values written beside.

    Returns False, and draws nothing, if there is no such task: an attack success rate is not shown alone.
    """
    rates: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for entry in results:
        if entry["benchmark"] == benchmark and entry["scenario"] == "all" and entry["value"] is not None:
            key = (system(entry["variant"], entry["guard"]), entry["task"], entry["metric"])
            rates.setdefault(key, entry)  # of several judges the first
    # Both or neither: (system, task) -> its two rates.
    pairs = {
        (name, task): [rates[name, task, side.metric] for side in SIDES]
        for name, task, _ in rates
        if all((name, task, side.metric) in rates for side in SIDES)
    }
    if not pairs:
        return False
    rows, tasks = (list(dict.fromkeys(part)) for part in zip(*pairs, strict=True))
    figure = Figure(figsize=(2.6 + 3.0 * len(tasks), 1.6 + 0.46 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for y, name in enumerate(rows):
            if y % 2 == 0:
                axes.axhspan(y - 0.5, y + 0.5, color="#F2F2F2", zorder=0)
            if (name, task) not in pairs:
                axes.text(0.5, y, "not measured", color="#777777", ha="center", va="center", fontsize=9)
                continue
            for side, rate in zip(SIDES, pairs[name, task], strict=True):
                _dot(axes, y, side, rate)
        axes.set(xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75, 1), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
        axes.set_yticklabels(rows)
        axes.set_title(task.replace("_", " "), loc="left")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.tick_params(axis="y", length=0)
        _tidy(axes)
        axes.grid(False, axis="y")
    handles = [
        Line2D([], [], linestyle="", marker=side.marker, color=side.colour, markersize=8, label=side.label)
        for side in SIDES
    ]
    title = f"{benchmark}, with 95 % intervals"
    figure.legend(handles=handles, title=title, frameon=False, loc="outside upper center", ncols=min(2, len(tasks)))
    _save(figure, path)
    return True


def _dot(axes: Axes, y: float, side: Side, rate: Mapping[str, Any]) -> None:
    """A rate in its row: each side a little off the middle, so that equal rates do not hide one another."""
    low, high = rate["ci95"]
    place = y + side.offset
    axes.plot([low, high], [place, place], color=side.colour, alpha=0.45, linewidth=4, solid_capstyle="butt")
    axes.plot([rate["value"]], [place], marker=side.marker, color=side.colour, markersize=7, clip_on=False, zorder=3)
    text = f"{rate['value'] * 100:.0f} %"
    at: dict[str, Any] = {"xytext": (44, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(text, (1, place), color=side.colour, fontsize=9, annotation_clip=False, **at)


def _colours(labels: Sequence[str]) -> list[str]:
    """By name (the first word of a label), whatever else is in the figure; two new names share a colour only when there
    are more of them than colours."""
    chosen: dict[str, str] = {}
    for name in dict.fromkeys(label.partition(" ")[0] for label in labels):
        first = zlib.crc32(name.encode()) % len(MORE_COLOURS)
        order = MORE_COLOURS[first:] + MORE_COLOURS[:first]
        free = [colour for colour in order if colour not in chosen.values()]
        chosen[name] = COLOURS.get(name) or (free or order)[0]
    return [chosen[label.partition(" ")[0]] for label in labels]


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
