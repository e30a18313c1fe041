"""A question and an answer as token ids, by one template that is kept with the checkpoint and used everywhere.

The released code of MLLM-Protector (arXiv 2401.02906) trains its detector on `Question: ...\\n\\nAnswer: ...` and feeds
it the answer alone afterwards. Here training, calibration, scoring, streaming and rewriting call the same
`QATemplate.encode`.

The whole text is tokenized at once; what is too long is cut out of the *ids*: the END of the question stays (the
request proper comes last) and the START of the answer (that is where a model complies or declines). Cuts are counted.
Both limits are fixed numbers, so the ids of a growing answer only ever grow: a key-value cache of them can be reused.
Special tokens written out in a text ("</s>") are plain text: nobody can end his question for the detector.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


class QAIds(list[int]):
    """Token ids of one text that know where their answer begins: `ids[ids.answer:]`, the template's end included."""

    def __init__(self, ids: Iterable[int], answer: int) -> None:
        super().__init__(ids)
        self.answer = answer


@dataclass
class Cuts:
    """What truncation did, since it was made: `texts` encoded, and in how many of them each part lost tokens."""

    texts: int = 0
    questions: int = 0
    answers: int = 0


@dataclass(frozen=True)
class QATemplate:
    """`text` with `{question}` before `{answer}`; lengths in tokens, the template's own and special tokens included.

    Attributes:
        max_length: of all ids of one text.
        max_question: of the question's part; the answer gets what is left.
    """

    text: str
    tokenizer: Any = field(repr=False)
    max_length: int
    max_question: int
    cuts: Cuts = field(default_factory=Cuts, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^{}]*\{question\}[^{}]*\{answer\}[^{}]*", self.text):
            raise ValueError(f"template {self.text!r}: expected {{question}}, then {{answer}}, each once")
        room = self.max_length - len(self._pieces("", "")[0]) - self.max_question
        if self.max_question < 1 or room < 1:
            raise ValueError(
                f"max_length={self.max_length}, max_question={self.max_question}: {room} tokens are left for "
                "the answer; set a larger max_length or a smaller max_question"
            )

    def encode(self, question: str, answer: str) -> QAIds:
        """Token ids, at most `max_length`; what was cut is added to `cuts`."""
        ids, (q0, q1), (a0, a1) = self._pieces(question, answer)
        ids, a0, a1, cut = self._cut_question(ids, q0, q1, a0, a1)
        over = max(0, min(len(ids) - self.max_length, a1 - a0))
        self._count(cut, over)
        return QAIds(ids[: a1 - over] + ids[a1:], a0)

    def windows(self, question: str, answer: str) -> list[QAIds]:
        """As `encode`, but an answer that is too long yields several texts: every token of it is in one of them.

        The first window is what `encode` returns.
        """
        ids, (q0, q1), (a0, a1) = self._pieces(question, answer)
        ids, a0, a1, cut = self._cut_question(ids, q0, q1, a0, a1)
        room = self.max_length - (len(ids) - (a1 - a0))
        starts = range(a0, max(a1, a0 + 1), room)
        self._count(cut, len(starts) - 1)
        return [QAIds(ids[:a0] + ids[at : min(at + room, a1)] + ids[a1:], a0) for at in starts]

    def _cut_question(self, ids: list[int], q0: int, q1: int, a0: int, a1: int) -> tuple[list[int], int, int, int]:
        cut = max(0, q1 - q0 - self.max_question)
        return ids[:q0] + ids[q0 + cut :], a0 - cut, a1 - cut, cut

    def _count(self, question: int, answer: int) -> None:
        self.cuts.texts += 1
        self.cuts.questions += question > 0
        self.cuts.answers += answer > 0

    def _pieces(self, question: str, answer: str) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
        """Ids of the whole text, and the runs [start, end) of them that are the question and the answer."""
        head, rest = self.text.split("{question}")
        middle, tail = rest.split("{answer}")
        encoded = self.tokenizer(
            head + question + middle + answer + tail,
            return_offsets_mapping=True,
            split_special_tokens=True,
            verbose=False,  # a text longer than the model is cut below: no warning
        )
        begin = len(head)
        then = begin + len(question) + len(middle)
        spans = encoded["offset_mapping"]
        return (
            encoded["input_ids"],
            _run(spans, begin, begin + len(question)),
            _run(spans, then, then + len(answer)),
        )


def _run(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that end inside the characters [start, end]; special tokens have empty spans and belong to nothing.

    A token across the left border (a space merged with the first word) belongs here, one across the right does not.
    """
    inside = [i for i, (s, e) in enumerate(spans) if s < e and start < e <= end]
    if not inside:
        at = next((i for i, (s, e) in enumerate(spans) if s < e and e > start), _last(spans))
        return at, at
    return inside[0], inside[-1] + 1


def _last(spans: Sequence[tuple[int, int]]) -> int:
    """One past the last token that is not special."""
    return 1 + max((i for i, (s, e) in enumerate(spans) if s < e), default=-1)
