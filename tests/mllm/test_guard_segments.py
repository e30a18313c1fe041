"""Where a growing answer is checked: by its text alone, at sentence ends and at least every so many tokens."""

from __future__ import annotations

import itertools
import random

import pytest

from mllm.guard_segments import Segmenter


def letters(text: str) -> int:
    """The worst tokenizer: a token a byte."""
    return len(text.encode())


def by_words(text: str) -> int:
    return len(text.split())


def parts(text: str, sizes: list[int], count: object = by_words, every: int = 32) -> list[str]:
    """The text between the cuts, fed in chunks of these sizes in turn."""
    segmenter = Segmenter(count, every)  # type: ignore[arg-type]
    cuts, at, turn = [0], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        cuts += segmenter.feed(text[at : at + size])
        at, turn = at + size, turn + 1
    cuts += segmenter.finish()
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three!  Four? Five", ["One two.", " Three!", "  Four?", " Five"]),
        ('He said "no." Then (yes!) and so on...', ['He said "no."', " Then (yes!)", " and so on..."]),
        ("It is 3.14 or v1.2.3 here.", ["It is 3.14 or v1.2.3 here."]),
        ("first\nsecond\n\n- third", ["first", "\nsecond", "\n\n- third"]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("ends. ", ["ends.", " "]),
        ("\n\n \n", ["\n\n \n"]),
        ("", []),
    ],
)
def test_cuts_are_sentence_ends(text: str, expected: list[str]) -> None:
    assert parts(text, [1]) == expected
    assert parts(text, [1000]) == expected


def test_cuts_do_not_depend_on_how_the_text_arrives() -> None:
    rng = random.Random(0)
    alphabet = "ab  .!?\n\"') é漢。🙂-"
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 200)))
        expected = parts(text, [len(text) or 1], letters, 8)
        assert "".join(expected) == text
        assert parts(text, [1], letters, 8) == expected
        assert parts(text, rng.choices(range(1, 20), k=5), letters, 8) == expected


@pytest.mark.parametrize("text", ["word " * 200, "x" * 1000, "漢" * 300, "🙂" * 100, " " * 500, "a b" * 300])
@pytest.mark.parametrize("every", [4, 32])
def test_no_part_has_more_tokens_than_the_limit_even_where_every_byte_is_one(text: str, every: int) -> None:
    found = parts(text, [7], letters, every)
    assert max(letters(p) for p in found) <= every
    assert min(letters(p) for p in found[:-1]) > every - 4 - 5  # nor are they needlessly short: a letter or word less


def test_a_part_is_known_one_character_after_its_end() -> None:
    segmenter = Segmenter(by_words)
    assert segmenter.feed("One two.") == []
    assert segmenter.feed(" ") == [8]
    assert segmenter.feed("Three") == []
    assert segmenter.finish() == [14]


def test_the_limit_must_be_one_token_or_more() -> None:
    with pytest.raises(ValueError, match="every=0"):
        Segmenter(by_words, 0)
