"""What a judge is, how its judgements are kept, and the loop that asks only for those that are missing.

A judgement is a JSON line beside the generations, keyed by the prompt's id, the judge's name and a hash of the answer:
judging again never generates again, a changed answer is judged anew, and a judgement that failed (a timeout, a
reply that is neither safe nor unsafe) is stored with its reason and tried again, alone, on the next run.

The judges: `evaluation/refusal.py` (words), `local_judge.py` (a chat model), `api_judge.py` (an endpoint).
docs/judges.md says what each is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from datamodules.benchmarks import Request
from evaluation.rows import GenerationRow, RowFile

Verdict = Literal["safe", "unsafe"]
EMPTY_ANSWER = "empty answer"


@dataclass(frozen=True)
class Judgement:
    """What one judge says of one answer.

    `verdict`: "safe" or "unsafe" for a harmful request; None for other requests, and where it could not be judged.
    `refused`: did the answer decline; None if this judge does not say.
    `error`: why it could not be judged; None if it could. Never both an error and a verdict.
    """

    id: str
    judge: str
    answer_hash: str
    verdict: Verdict | None
    refused: bool | None
    error: str | None

    @classmethod
    def of(cls, row: GenerationRow, judge: str, verdict: Verdict | None, refused: bool | None = None) -> Judgement:
        return cls(row.id, judge, row.answer_hash, verdict, refused, None)

    @classmethod
    def failed(cls, row: GenerationRow, judge: str, error: str) -> Judgement:
        """An answer that could not be judged: counted apart, never as safe."""
        return cls(row.id, judge, row.answer_hash, None, None, error)


class Judge(Protocol):
    """`name` tells judges apart that may differ in a verdict (model, prompt); `requests`: those it has a say on."""

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> frozenset[Request]: ...

    def judge(self, rows: Sequence[GenerationRow]) -> list[Judgement]:
        """One judgement for each row, in order. Answers are not empty. What fails is `Judgement.failed`, not raised."""
        ...


class JudgementLog:
    """The judgements of a run, of every judge, in one append-only file. A later line replaces an earlier one."""

    def __init__(self, path: str | Path) -> None:
        self._file = RowFile(path, Judgement)
        self._latest = {_key(j): j for j in self._file.read()}

    def __enter__(self) -> JudgementLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self._file.path

    def close(self) -> None:
        """Releases the file to other writers."""
        self._file.close()

    def get(self, row: GenerationRow, judge: str) -> Judgement | None:
        return self._latest.get((row.id, judge, row.answer_hash))

    def append(self, judgements: Iterable[Judgement]) -> None:
        """Stores what is new or has changed, so that a failure that repeats itself does not make the file grow."""
        fresh = [j for j in judgements if self._latest.get(_key(j)) != j]
        self._file.append(fresh)
        self._latest.update({_key(j): j for j in fresh})


def judge_rows(
    rows: Iterable[GenerationRow],
    judge: Judge,
    log: JudgementLog,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Judges what is not judged yet or could not be judged; each batch is on the disk before the next.

    Args:
        on_batch: called with the number of rows done, for a progress bar.

    Returns: (answers judged now, answers of these that could not be judged).
    """
    pending = unjudged(rows, judge, log)
    failed = 0
    for batch in _batches(pending, batch_size):
        judgements = _judge_batch(batch, judge)
        log.append(judgements)
        failed += sum(j.error is not None for j in judgements)
        if on_batch is not None:
            on_batch(len(batch))
    return len(pending), failed


def unjudged(rows: Iterable[GenerationRow], judge: Judge, log: JudgementLog) -> list[GenerationRow]:
    """What `judge_rows` would ask about; the same answer to the same prompt (two variants of a model) once."""
    pending = {}
    for row in rows:
        known = log.get(row, judge.name)
        settled = known is not None and known.error in (None, EMPTY_ANSWER)
        if row.request in judge.requests and not settled:
            pending[row.id, row.answer_hash] = row
    return list(pending.values())


def _judge_batch(rows: Sequence[GenerationRow], judge: Judge) -> list[Judgement]:
    """An empty answer neither refuses nor complies: no judge is asked about it."""
    spoken = [row for row in rows if row.answer.strip()]
    judgements = judge.judge(spoken) if spoken else []
    expected = [(row.id, judge.name, row.answer_hash) for row in spoken]
    assert [_key(j) for j in judgements] == expected, (
        f"{judge.name} returned judgements of other rows than it was given"
    )
    return judgements + [Judgement.failed(row, judge.name, EMPTY_ANSWER) for row in rows if not row.answer.strip()]


def _key(judgement: Judgement) -> tuple[str, str, str]:
    return judgement.id, judgement.judge, judgement.answer_hash


def _batches(rows: Sequence[GenerationRow], size: int) -> Iterator[Sequence[GenerationRow]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
