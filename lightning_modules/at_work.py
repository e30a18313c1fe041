"""What a module is working on, so that an error for want of memory says which stage, which batch and what to lower.

    module.at_work = AtWork("align/sea_sft", {"variants.sea_sft.micro_batch_size": 32})     # by the stage
    with module.at_work.told():
        trainer.fit(module)
    self.at_work.on(step, batch)                                                            # by the module

CUDA raises `torch.OutOfMemoryError` (a RuntimeError), the CPU's allocator a plain RuntimeError, Python and NumPy a
MemoryError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm.items import Item

_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|"
    r"bad_alloc",
    re.IGNORECASE,
)

Batch = Callable[[], tuple[int, str, int]]
"""Says, when asked, how many examples there are, what they are called, and how many tokens the longest has."""


class OutOfMemory(RuntimeError):
    """Memory did not suffice; the message names stage, batch and the setting to lower."""


@dataclass
class AtWork:
    """stage: its name. lower: key -> present value of what decides how much memory one batch takes, best first."""

    stage: str = ""
    lower: Mapping[str, int] = field(default_factory=dict)
    _now: tuple[int, Batch] | None = None

    def on(self, step: int, batch: Batch) -> None:
        """From now on this batch is what is worked on."""
        self._now = step, batch

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, memory that does not suffice is told with stage, batch and what to lower.

        Raises:
            OutOfMemory: with the library's error as cause.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if (other := self.explained(error)) is not error:
                raise other from error
            raise

    def explained(self, error: BaseException) -> BaseException:
        """The error itself or, where memory did not suffice, an OutOfMemory in its place."""
        if self._now is None:
            return explained(error, self.stage, self.lower)
        step, batch = self._now
        number, name, longest = batch()
        return explained(
            error, self.stage, self.lower, f"step {step}, {number} {name}, the longest of {longest} tokens"
        )


def of_items(items: Sequence[Item]) -> tuple[int, str, int]:
    """A batch of prompts with their continuations."""
    longest = max((len(i.prefix) + sum(len(b.ids) for b in i.branches) for i in items), default=0)
    return len(items), "examples", longest


def advice(lower: Mapping[str, int]) -> str:
    """What to lower, with its present and its next value, or what is left where all is at one."""
    for key, value in lower.items():
        if value > 1:
            return (
                f"lower {key}={value} to {max(1, value // 2)} and start the same command again, it goes on where it "
                "stopped; plan=true tells beforehand what will fit (docs/memory.md)"
            )
    at_one = f"{', '.join(lower)} cannot be lowered any more; " if lower else ""
    return (
        f"{at_one}take model.dtype=bfloat16, trainer=fsdp2 on several devices (alignment), or a larger device; "
        "plan=true tells beforehand what will fit (docs/memory.md)"
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """By kind or, where the kind says nothing, by the words that allocators use."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _WORDS.search(str(error))):
            return True
        error = error.__cause__
    return False


def explained(error: BaseException, stage: str, lower: Mapping[str, int], what: str = "") -> BaseException:
    """The error itself or, where memory did not suffice and nobody has said so yet, an OutOfMemory in its place."""
    if isinstance(error, OutOfMemory) or not isinstance(error, Exception) or not is_out_of_memory(error):
        return error
    where = " at ".join(part for part in (f"stage {stage}" if stage else "", what) if part)
    return OutOfMemory(f"out of memory in {where or 'the start'} ({_first_line(error)})\n{advice(lower)}")


def _first_line(error: BaseException) -> str:
    """The sentence with the numbers, without the place in the allocator's source."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[enforce fail at .*?\]\s*(?:\.\s*)?(?:err == 0\.\s*)?", "", line)[:300].rstrip(". ")
