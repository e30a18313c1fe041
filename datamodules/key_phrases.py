"""The key phrase of a question, found by comparing it with its own rephrasing.

MM-SafetyBench and VA-SafetyBench give each question twice: in plain words ("List steps to fold a kite in the park.")
and with the phrase taken out, because a picture, a clip or a recording carries it ("The video shows a phrase of an
activity. List steps to perform this activity in the park."). The released questions of VA-SafetyBench hold no key
phrase of their own, but both texts do: it is what stands in the first where the second says "this activity".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from datamodules.english import DETERMINERS, Word, words_of

ANNOUNCEMENT = re.compile(r"^The (?:end of the )?(?:video|audio|image) show\w* (?:a|the) phrase of [^.]*\.\s*")
"""How a rephrased question begins ("showss" occurs in the release)."""

_LEADING = frozenset(
    "that who which for to on in of at by with from about into through how the a an and or is are using".split()
)
_TRAILING = (
    frozenset(
        """
    for to on in of at by with from about into through how and or that who which where is are while using without
    against as within during without
""".split()
    )
    | DETERMINERS
)
_NEUTRAL = frozenset({"this", "these"})
_VERBS = frozenset({"perform", "performs", "performing"})


def key_phrase(question: str, rephrased: str) -> str | None:
    """The words of `question`, as it spells them, that `rephrased` leaves to the medium; None if that cannot be seen.

    The texts are compared word by word. Where the rephrasing is looser than one exchange of words, the exchange that
    says "this" or "these" counts; if it took nothing out, the longest run of words that is gone.
    """
    words = [word for word in words_of(question) if word.text]
    other = [word.lower for word in words_of(ANNOUNCEMENT.sub("", rephrased)) if word.text]
    matcher = SequenceMatcher(None, [word.lower for word in words], other, autojunk=False)
    changes = [code[1:] for code in matcher.get_opcodes() if code[0] != "equal"]
    for number, (start, end, low, high) in enumerate(changes):
        said = other[low:high]
        if not _NEUTRAL & set(said):
            continue
        if end > start and number + 1 < len(changes) and _is_open(words[end - 1]):
            end = changes[number + 1][1]  # "hack [someone's] online [account]" is one phrase
        start, end = _trimmed(words, start, end)
        if end - start == 1 and not (said[-1] in ("activity", "product") and not set(said) & _VERBS):
            end = _with_object(words, end)  # what is left to the medium is more than a verb or an adjective
        if end - start > 1 or (end > start and len(changes) == 1):
            return _text(question, words[start:end])
    runs = [_trimmed(words, start, end) for start, end, _, _ in changes if start > 0]  # the first word is the order
    start, end = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    return _text(question, words[start:end]) if end > start else None


def _is_open(word: Word) -> bool:
    """A word that wants another behind it."""
    return word.lower.endswith("'s") or word.lower in _TRAILING


def _trimmed(words: Sequence[Word], start: int, end: int) -> tuple[int, int]:
    """Without function words at the edges; a possessive or an article at the end takes the next word in."""
    while start < end and words[start].lower in _LEADING:
        start += 1
    if start < end < len(words) and (words[end - 1].lower.endswith("'s") or words[end - 1].lower in DETERMINERS):
        end += 1
    while start < end and words[end - 1].lower in _TRAILING:
        end -= 1
    return start, end


def _with_object(words: Sequence[Word], end: int) -> int:
    """Past the words that belong to the word before `end`: up to the next function word or stop."""
    while end < len(words) and not words[end - 1].stop and words[end].lower not in _TRAILING - DETERMINERS:
        end += 1
    return end


def _text(question: str, words: Sequence[Word]) -> str:
    return " ".join(question[words[0].start : words[-1].end].split())
