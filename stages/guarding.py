"""The evaluated answers behind MLLM-Protector: the guard reads what is on disk, so nothing is generated twice.

It is a part of the stage `evaluate`, between generating and judging, and not a stage after it: the report is then
written once, from all answers, and another judge judges them all (`judge=local stages=[evaluate]`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.progress import Progress
from configs.schema import Config
from evaluation.guarded_rows import RETRIED, GuardedLog, GuardedRow, Spent, guarded_rows
from evaluation.rows import GenerationRow
from mllm.detector import Detector, DetectorSpec
from mllm.detoxifier import Detoxifier, DetoxifierSpec
from mllm.guard import Guard
from stages.runs import Run
from stages.trainers import device_of

log = logging.getLogger(__name__)


def guard_answers(cfg: Config, run: Run, generated: Mapping[str, Sequence[GenerationRow]]) -> list[GuardedRow]:
    """What the guard makes of every variant's answers; rows on disk are kept, the missing ones are added.

    Raises:
        ValueError: detector or detoxifier cannot be loaded (names the file), or another guard made the rows on disk.
    """
    stage = run.stage("evaluate/guarded", made_from(cfg), after=["evaluate/generations"])
    logs = {variant: GuardedLog(stage.folder / f"{variant}.jsonl") for variant in generated}
    # The rows decide what is left to do, not the stage: answers that a broken model refused are tried again.
    todo = {variant: logs[variant].todo(rows) for variant, rows in generated.items()}
    if any(todo.values()):
        with Guarding(cfg) as guarding:
            for variant, rows in todo.items():
                total = len(generated[variant])
                progress = Progress(f"guard {variant}", total, "answers", done=total - len(rows))
                missing = {row.id for row in rows}
                with logs[variant] as file, progress:
                    # Of all answers, whole: what a score is rounded to depends a little on what stands beside it.
                    for batch in batches(generated[variant], cfg.protector.batch_size):
                        if not any(row.id in missing for row in batch):
                            continue
                        new = [row for row in guarding.rows(batch) if row.id in missing]
                        file.append(new)
                        progress.advance(len(new))
    found = [row for variant, rows in generated.items() for row in logs[variant].rows(rows)]
    if broken := sum(row.reason in RETRIED for row in found):
        log.warning(
            "guard: %d of %d answers were refused because detector or detoxifier failed or took longer than "
            "protector.timeout; run again to retry them",
            broken,
            len(found),
        )
    if not stage.done or any(todo.values()):
        stage.finish({"answers": len(found), "failed": broken})
    return found


def guard_facts(cfg: Config) -> dict[str, Any]:
    """The report's block on the guard, but for its costs."""
    assert cfg.protector.detector is not None, "configs/check.py has checked it"
    spec, _ = DetectorSpec.read(cfg.protector.detector)
    return {
        "name": GuardedRow.guard,
        "detector": cfg.protector.detector,
        "detoxifier": cfg.protector.detoxifier,
        "threshold": spec.threshold,
        "false_positive_rate": spec.false_positive_rate,
    }


def made_from(cfg: Config) -> dict[str, Any]:
    """Detector and detoxifier count by content, not by place: a folder may move, or be trained anew."""
    p = cfg.protector
    return {
        "protector.max_new_tokens": p.max_new_tokens,
        "detector (sha256)": digest(p.detector, DetectorSpec.FILE),
        "detoxifier (sha256)": digest(p.detoxifier, DetoxifierSpec.FILE),
    }


def digest(path: str | None, name: str) -> str | None:
    """SHA-256 of the file that describes a model: threshold, data and metrics, which differ after each training."""
    if path is None:
        return None
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def batches(rows: Sequence[GenerationRow], size: int) -> Iterator[list[GenerationRow]]:
    """Like lengths together, benchmarks apart: a batch shares its costs out equally."""
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        chosen = [row for row in rows if row.benchmark == benchmark]
        chosen.sort(key=lambda row: len(row.prompt) + len(row.answer))
        for at in range(0, len(chosen), size):
            yield chosen[at : at + size]


class Guarding:
    """A guard that notes what each batch takes; its threads end with the `with` block."""

    def __init__(self, cfg: Config) -> None:
        p, device = cfg.protector, device_of(cfg)
        assert p.detector is not None, "configs/check.py has checked it"
        self.detector = Detector.load(p.detector, device)
        self.detoxifier = None if p.detoxifier is None else Detoxifier.load(p.detoxifier, device)
        self.seconds = {"score": 0.0, "rewrite": 0.0}
        self.guard = Guard(
            self.detector,
            self.detoxifier,
            batch_size=p.batch_size,
            timeout=p.timeout,
            rewrite_timeout=p.timeout,
            max_new_tokens=p.max_new_tokens,
            observe=self.observe,
        )

    def __enter__(self) -> Guarding:
        return self

    def __exit__(self, *_: object) -> None:
        self.guard.close()

    def observe(self, kind: str, seconds: float, size: int) -> None:
        """Called by the guard after each model call, and before the call's results are handed out."""
        self.seconds[kind] += seconds

    def rows(self, batch: Sequence[GenerationRow]) -> list[GuardedRow]:
        """One batch through the guard."""
        before = self.spent()
        results = self.guard.check([row.prompt for row in batch], [row.answer for row in batch])
        return guarded_rows(batch, results, self.spent().since(before))

    def spent(self) -> Spent:
        """Seconds and tokens since this guard was made."""
        written = 0 if self.detoxifier is None else self.detoxifier.tokens_written
        return Spent(self.seconds["score"], self.seconds["rewrite"], self.detector.tokens_read, written)
