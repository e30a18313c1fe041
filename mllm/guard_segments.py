"""Where a growing answer is scored: at sentence ends, and at least every 32 tokens.

The places depend on the text alone, never on how the upstream happens to cut it into chunks: the same answer is
checked, released and stopped at the same characters whether it comes letter by letter or at once.

Legend. cut: an offset into the answer (characters); everything before a cut is scored before any of it is released.
piece: a word with the blanks before it, at most as many UTF-8 bytes as the limit has tokens. No tokenizer makes more
tokens than bytes, so a piece never exceeds the limit alone, and a text without blanks is cut as well.
"""

from __future__ import annotations

from collections.abc import Callable

ENDS = ".!?…"  # end a sentence where a blank follows (3.14 has no sentence end)
WIDE_ENDS = "。！？｡"  # end it at once: these scripts put no blank
CLOSERS = "\"')]}»”’*_`"  # may stand between the mark and the blank


class Segmenter:
    """Cuts of one answer as it grows.

    Args:
        count: number of tokens of a text, for the detector's tokenizer.
        every: most tokens between two cuts.
    """

    def __init__(self, count: Callable[[str], int], every: int = 32) -> None:
        if every < 1:
            raise ValueError(f"every={every}: expected 1 token or more between two checks")
        self._count, self._every = count, every
        self._end = 0  # of the text fed so far
        self._cut = 0  # the last cut
        self._tokens = 0  # of the complete pieces since the last cut
        self._piece = ""
        self._words = False  # is there anything but blanks since the last cut
        self._closing = False  # the last characters may end a sentence, if a blank follows

    def feed(self, text: str) -> list[int]:
        """The cuts that this text brings, ascending. A sentence's end is known one character late."""
        cuts: list[int] = []
        for char in text:
            self._add(char, cuts)
        return cuts

    def finish(self) -> list[int]:
        """The last cut, if anything follows the one before it."""
        if self._cut == self._end:
            return []
        cuts: list[int] = []
        self._new(self._end, cuts)
        return cuts

    def _add(self, char: str, cuts: list[int]) -> None:
        blank = char.isspace()
        if blank and self._words and (self._closing or char == "\n"):
            self._new(self._end, cuts)
        elif self._piece and ((blank and not self._piece[-1].isspace()) or self._is_full(char)):
            self._close_piece(cuts)
        self._piece += char
        self._end += 1
        self._words |= not blank
        self._closing = char in ENDS or (self._closing and char in CLOSERS)
        if char in WIDE_ENDS:
            self._new(self._end, cuts)

    def _is_full(self, char: str) -> bool:
        return len((self._piece + char).encode("utf-8", "replace")) > self._every

    def _close_piece(self, cuts: list[int]) -> None:
        tokens = self._count(self._piece)
        start = self._end - len(self._piece)
        if self._tokens + tokens > self._every and start > self._cut:
            cuts.append(start)
            self._cut, self._tokens, self._words = start, 0, not self._piece.isspace()
        self._tokens += tokens
        self._piece = ""

    def _new(self, at: int, cuts: list[int]) -> None:
        """A cut at the end of the text so far; the limit may call for one more before the unfinished piece."""
        if self._piece:
            self._close_piece(cuts)
        cuts.append(at)
        self._cut, self._tokens, self._piece, self._words, self._closing = at, 0, "", False, False
