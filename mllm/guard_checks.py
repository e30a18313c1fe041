"""What the guard asks of the detector. Apart from the scoring itself, so that the command line starts without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Reader:
    """How far one growing answer was read.

    cache: keys and values of each layer, [H, len(ids), D]. states: what a head on section means keeps, [len(ids), c].
    """

    ids: list[int] = field(default_factory=list)
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: Tensor | None = None
    full: dict[tuple[int, ...], float] = field(default_factory=dict)  # scores of windows that grow no more
    used: int = 0


@dataclass(frozen=True)
class Check:
    """One thing to score; with a reader, the answer is the one of the reader's last check, grown."""

    question: str
    answer: str
    reader: Reader | None = None
