"""metrics.csv that a resumed fit goes on with: one row for each logged step, whatever happened in between.

Lightning's own logger deletes the file when a fit begins, so a resumed run would show the end of its curve alone.

    metrics.csv          every row is in the file before the next step begins
    cut(trainer, step)   a fit that goes on at `step` takes back the rows from there on: it will log them again
    flush(trainer)       before a checkpoint counts: whoever goes on from it must find the rows up to it
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from datamodules.durable import write_durably


class MetricsFile(CSVLogger):
    """`folder/metrics/metrics.csv`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="metrics", flush_logs_every_n_steps=1)

    def open(self) -> KeptRows:
        """The file's writer; rank 0 alone may ask for it."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = KeptRows(self.log_dir)
        assert isinstance(self._experiment, KeptRows)
        return self._experiment

    @property
    def experiment(self) -> ExperimentWriter:  # type: ignore[override]
        """As Lightning asks for it; it calls what logs on rank 0 alone."""
        return self.open()


class KeptRows(ExperimentWriter):
    """Writes rows behind those that are there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        self.metrics_keys = list(read_rows(path)[0]) if path.exists() else []

    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the rows of the attempt before."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, read_rows(Path(self.metrics_file_path))[1])

    def cut(self, step: int) -> None:
        """Leaves the rows of the steps before `step`, and nothing of a row that was torn off."""
        path = Path(self.metrics_file_path)
        if path.exists():
            names, rows = read_rows(path)
            self._write(names, [row for row in rows if int(row["step"]) < step])

    def _write(self, names: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
        write_durably(Path(self.metrics_file_path), text.getvalue().encode())


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(names of the columns, whole rows); what a kill tore off behind the last line feed does not count."""
    text = path.read_bytes().decode()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return list(reader.fieldnames or []), list(reader)


def cut(trainer: L.Trainer, step: int) -> None:
    """For a fit that goes on, or begins anew, at `step`."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile) and trainer.is_global_zero:
            logger.open().cut(step)


def flush(trainer: L.Trainer) -> None:
    """Everything that was logged is in its file; TensorBoard keeps rows back for two minutes."""
    for logger in trainer.loggers:
        logger.save()
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.flush()
