"""What the guard made of the answers on disk: one JSON line for each, which is judged and counted like any answer.

    log = GuardedLog(run_dir / "evaluate" / "guarded" / "base.jsonl")
    for batch in batches(log.todo(generated)):
        log.append(guarded_rows(batch, guard.check(...), spent))
    rows = log.rows(generated)

A guarded row is a `GenerationRow` whose `answer` is what the guard shows; so judge, judgements and metrics need not
know that there is a guard. It belongs to one original answer: a row about another answer to the same prompt never
counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple

from evaluation.rows import GenerationRow, RowFile
from mllm.guard import Action, Guarded
from mllm.guard_waiting import Reason

NOT_SCORED = frozenset({"detector_error", "detector_timeout", "detector_invalid"})
"""The answer was refused, but nobody knows whether it is harmful."""
RETRIED = frozenset({"detector_error", "detector_timeout", "detoxifier_error", "detoxifier_timeout"})
"""A model of the guard broke: another start may do better. A score that is no number comes out the same again."""


@dataclass(frozen=True)
class GuardedRow(GenerationRow):
    """`original`: what the model said; scores, `action` and `reason` as in `mllm.guard.Guarded`.

    `scoring_seconds`, `rewriting_seconds`: wall time, an equal share of the batch's (rewriting: of those rewritten).
    `tokens_scored`, `tokens_written`: read by the detector and written by the detoxifier, shared out alike.
    """

    original: str
    score: float | None
    score_after: float | None
    action: Action
    reason: Reason
    scoring_seconds: float
    rewriting_seconds: float
    tokens_scored: float
    tokens_written: float

    guard: ClassVar[str] = "protector"

    @property
    def flagged(self) -> bool | None:
        """The detector's verdict on the original; None if there is none."""
        return None if self.reason in NOT_SCORED else self.action != "passed"


class Spent(NamedTuple):
    """What a batch took: seconds (wall) of each model, tokens read by the detector and written by the detoxifier."""

    scoring_seconds: float
    rewriting_seconds: float
    tokens_scored: int
    tokens_written: int

    def since(self, before: Spent) -> Spent:
        """What was added after `before`."""
        return Spent(
            self.scoring_seconds - before.scoring_seconds,
            self.rewriting_seconds - before.rewriting_seconds,
            self.tokens_scored - before.tokens_scored,
            self.tokens_written - before.tokens_written,
        )


def guarded_rows(batch: Sequence[GenerationRow], results: Sequence[Guarded], spent: Spent) -> list[GuardedRow]:
    """The rows of one guarded batch. Scoring, that of rewrites too, is shared by all that were scored."""
    scored = [result.reason != "empty" for result in results]
    rewritten = [result.action != "passed" and result.reason not in NOT_SCORED for result in results]
    rows = []
    for row, result, was_scored, was_rewritten in zip(batch, results, scored, rewritten, strict=True):
        score_share, rewrite_share = was_scored / max(1, sum(scored)), was_rewritten / max(1, sum(rewritten))
        kept = {f.name: getattr(row, f.name) for f in fields(GenerationRow)} | {"answer": result.answer}
        rows.append(
            GuardedRow(
                **kept,
                original=result.original,
                score=result.score,
                score_after=result.score_after,
                action=result.action,
                reason=result.reason,
                scoring_seconds=spent.scoring_seconds * score_share,
                rewriting_seconds=spent.rewriting_seconds * rewrite_share,
                tokens_scored=spent.tokens_scored * score_share,
                tokens_written=spent.tokens_written * rewrite_share,
            )
        )
    return rows


class GuardedLog:
    """The guarded answers of one variant, in one append-only file. A later line replaces an earlier one."""

    def __init__(self, path: str | Path) -> None:
        self._file: RowFile[GuardedRow] = RowFile(path, GuardedRow)

    def __enter__(self) -> GuardedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def rows(self, generated: Iterable[GenerationRow]) -> list[GuardedRow]:
        """What the guard made of these answers, in their order; those it has not seen are left out."""
        known = self._known()
        return [known[key] for row in generated if (key := (row.id, row.answer)) in known]

    def todo(self, generated: Iterable[GenerationRow]) -> list[GenerationRow]:
        """The answers that the guard has not seen, or where one of its models broke."""
        known = self._known()
        settled = {key for key, row in known.items() if row.reason not in RETRIED}
        return [row for row in generated if (row.id, row.answer) not in settled]

    def append(self, rows: Sequence[GuardedRow]) -> None:
        """Adds one batch; it is on the disk when this returns."""
        self._file.append(rows)

    def _known(self) -> dict[tuple[str, str], GuardedRow]:
        return {(row.id, row.original): row for row in self._file.read()}
