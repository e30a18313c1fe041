"""metrics.csv across attempts: rows are kept, those of steps that are made again are taken back, torn ones are gone."""

from __future__ import annotations

import csv
from pathlib import Path

from callbacks.metrics_file import MetricsFile, read_rows


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, *steps: int, cut: int | None = None, **more: float) -> None:
    """As a fit does that begins anew in the same folder."""
    logger = MetricsFile(folder)
    if cut is not None:
        logger.open().cut(cut)
    for step in steps:
        logger.log_metrics({"loss": step / 10, **more}, step)


def test_a_fit_that_goes_on_keeps_the_rows_before_it_and_repeats_none(tmp_path: Path) -> None:
    log(tmp_path, 0, 1, 2, 3)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"], "in the file before the logger is closed"
    log(tmp_path, 2, 3, 4, cut=2)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(str(s), str(s / 10)) for s in range(5)]
    log(tmp_path, 0, cut=0)
    assert [row["step"] for row in rows(tmp_path)] == ["0"]


def test_a_column_that_comes_later_leaves_the_earlier_rows_as_they_are(tmp_path: Path) -> None:
    log(tmp_path, 0, 1)
    log(tmp_path, 2, cut=2, accuracy=0.5)
    assert [row["accuracy"] for row in rows(tmp_path)] == ["", "", "0.5"]
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "0.1", "0.2"]


def test_a_row_that_a_kill_tore_off_does_not_count(tmp_path: Path) -> None:
    log(tmp_path, 0, 1)
    path = tmp_path / "metrics" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])
    assert [row["step"] for row in read_rows(path)[1]] == ["0"]
    log(tmp_path, 1, cut=1)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "0.0"), ("1", "0.1")]
    path.write_bytes(path.read_bytes()[:2])  # not even the names of the columns
    log(tmp_path, 0, cut=0)
    assert [row["step"] for row in rows(tmp_path)] == ["0"]
