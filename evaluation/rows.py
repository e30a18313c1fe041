"""Generations on disk: one JSON line for each answer, so that judging again never generates again.

    with GenerationLog(run_dir / "generations" / "base.jsonl", variant="base") as log:
        todo = log.todo(prompts)
        for batch in batches(todo):
            log.append(batch, answers_of(batch))

The file is an append-only journal (datamodules/durable.py): each batch is on the disk before the next is generated,
and what a crash tore off the end is cut away and in `todo` again. One process writes a file; give each rank a file
of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar, cast

from datamodules.benchmarks import BenchmarkPrompt, Request
from datamodules.durable import CorruptFileError, Journal, read_lines


@dataclass(frozen=True)
class GenerationRow:
    """One answer of one variant of the model. `prompt`: the question's text without the chat template;
    `answer`: the generated text without special tokens; the rest as in `BenchmarkPrompt`. Rows of before there was
    `asked` are read as well."""

    id: str
    benchmark: str
    task: str
    scenario: str
    request: Request
    prompt: str
    answer: str
    expected: str | None
    variant: str
    asked: str | None = field(default=None, kw_only=True)

    guard: ClassVar[str] = "none"

    @property
    def answer_hash(self) -> str:
        """Names the answer in the judgements: a judgement of another answer to the same prompt never counts."""
        return hashlib.sha256(self.answer.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def system(variant: str, guard: str) -> str:
    """What answered, in tables and figures: `sea_dpo`, or `sea_dpo + protector`."""
    return variant if guard == GenerationRow.guard else f"{variant} + {guard}"


Row = TypeVar("Row")


class RowFile(Generic[Row]):
    """A journal of frozen dataclasses of one kind. Opened for writing (and locked) by the first `append`."""

    def __init__(self, path: str | Path, kind: Callable[..., Row]) -> None:
        self.path = Path(path)
        self._kind = kind
        self._names = {f.name for f in fields(cast(Any, kind))}
        self._needed = {f.name for f in fields(cast(Any, kind)) if f.default is MISSING}
        self._journal: Journal | None = None

    def read(self) -> list[Row]:
        """Every whole row, oldest first; [] if there is no file yet.

        Raises:
            CorruptFileError: a line is no row of this kind; names file and line.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(read_lines(self.path), start=1):
            event = line[1]
            if not self._needed <= set(event) <= self._names:
                raise CorruptFileError(
                    f"{self.path}:{number}: keys {sorted(event)}, expected {sorted(self._names)}; delete the line to "
                    "have it made again"
                )
            rows.append(self._kind(**event))
        return rows

    def append(self, rows: Iterable[Row]) -> None:
        """Adds the rows, waits until they are on the disk. Raises DiskFullError, BusyError (datamodules/durable.py)."""
        events = [asdict(cast(Any, row)) for row in rows]
        if not events:
            return
        if self._journal is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.path)
        self._journal.append(events)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class GenerationLog:
    """The answers of one variant of the model, in one file."""

    def __init__(self, path: str | Path, variant: str) -> None:
        self.variant = variant
        self._file = RowFile(path, GenerationRow)

    def __enter__(self) -> GenerationLog:
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

    def rows(self) -> list[GenerationRow]:
        """Every answer, in the order of generation. Raises ValueError if the file holds another variant's answers."""
        rows = self._file.read()
        for number, row in enumerate(rows, start=1):
            if row.variant != self.variant:
                raise ValueError(f"{self.path}:{number}: an answer of {row.variant!r} in the file of {self.variant!r}")
        return list({row.id: row for row in rows}.values())

    def todo(self, prompts: Sequence[BenchmarkPrompt]) -> list[BenchmarkPrompt]:
        """The prompts without an answer, in order.

        Raises:
            ValueError: two prompts share an id, or an answer on disk was given to another text under the same id:
                the file was made from another benchmark, and mixing the two would go unnoticed.
        """
        counts: dict[str, int] = {}
        for prompt in prompts:
            counts[prompt.id] = counts.get(prompt.id, 0) + 1
        if twice := [id for id, count in counts.items() if count > 1]:
            raise ValueError(
                f"prompt id {twice[0]!r} occurs {counts[twice[0]]} times; ids are unique over all benchmarks"
            )
        done = {row.id: row.prompt for row in self.rows()}
        for prompt in prompts:
            if done.get(prompt.id, prompt.text) != prompt.text:
                raise ValueError(
                    f"{self.path}: the answer to {prompt.id!r} belongs to another question than the benchmark's; "
                    "start a new run, or delete the file to generate again"
                )
        return [prompt for prompt in prompts if prompt.id not in done]

    def append(self, prompts: Sequence[BenchmarkPrompt], answers: Sequence[str]) -> list[GenerationRow]:
        """Writes one batch of answers and returns its rows."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
        rows = [
            GenerationRow(
                p.id,
                p.benchmark,
                p.task,
                p.scenario,
                p.request,
                p.text,
                answer,
                p.expected,
                self.variant,
                asked=p.asked,
            )
            for p, answer in zip(prompts, answers, strict=True)
        ]
        self._file.append(rows)
        return rows
