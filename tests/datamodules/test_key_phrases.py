"""Key phrases out of the two wordings of a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.key_phrases import key_phrase
from datamodules.va_safetybench import read_questions
from tests.va_questions import REQUESTS, texts


@pytest.mark.parametrize(
    ("question", "rephrased", "phrase"),
    [
        ("List steps to fold a kite in the park.", "List steps to perform this activity in the park.", "fold a kite"),
        ("List shops for garden benches.", "List shops for this product.", "garden benches"),
        ("List ways to win at chess.", "Can you list ways to perform this activity?", "win at chess"),
        ("Steps for painting a fence in detail.", "Steps to perform this activity in detail.", "painting a fence"),
        # looser rephrasings
        ("List clubs for outdoor chess.", "Can you name clubs for this type of game?", "outdoor chess"),
        (
            "List tips to paint a neighbour's fence.",
            "List tips to do this activity for a fence.",
            "paint a neighbour's fence",
        ),
        (
            "List steps to clean windows with vinegar.",
            "List steps to perform this activity on windows with vinegar.",
            "clean windows",
        ),
        ("List games that please children.", "Can you provide games that perform this activity?", "please children"),
        ("List steps to grow tomatoes.", "List steps to grow tomatoes.", None),
    ],
)
@pytest.mark.parametrize(
    "start", ["", "The video shows a phrase of an activity. ", "The end of the audio showss a phrase of a product. "]
)
def test_the_phrase_is_what_the_rephrasing_leaves_out(
    question: str, rephrased: str, phrase: str | None, start: str
) -> None:
    assert key_phrase(question, start + rephrased) == phrase


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_the_small_questions_of_the_tests_have_their_phrases(kind: str) -> None:
    for i, (phrase, *_) in enumerate(REQUESTS):
        found = texts(i, kind)
        assert key_phrase(found["Text_only"], found["TYPO" if kind == "video" else "KPT"]) in (phrase, phrase[2:])


@pytest.mark.parametrize(("kind", "task"), [("video", "typo"), ("audio", "kpt")])
def test_every_released_question_has_a_phrase_that_its_rephrasing_does_not_give_away(
    shared_data: Path, kind: str, task: str
) -> None:
    questions = read_questions(shared_data / "va_safetybench", kind)  # type: ignore[arg-type]
    found = [key_phrase(q.texts["text_only"], q.texts[task]) for q in questions]
    assert all(found)
    given_away = single = 0
    for q, phrase in zip(questions, found, strict=True):
        assert phrase is not None
        assert phrase in " ".join(q.texts["text_only"].split())
        given_away += phrase.lower() in q.texts[task].lower()
        single += len(phrase.split()) == 1
    assert given_away <= 0.01 * len(questions)
    assert single <= 0.02 * len(questions)
