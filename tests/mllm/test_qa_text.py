"""One template for training and use: what is cut, what is kept, and that nobody can write special tokens into it."""

from __future__ import annotations

import pytest

from mllm.backbones import load_tokenizer
from mllm.qa_text import QATemplate
from tests.micro_text import backbone

TEXT = "Question: {question}\n\nAnswer: {answer}"
QUESTION = "List steps to smuggle the passport."
ANSWER = "Get the passport, then smuggle it slowly."


def template(max_length: int = 40, max_question: int = 12) -> QATemplate:
    return QATemplate(TEXT, load_tokenizer(str(backbone())), max_length, max_question)


def test_a_text_that_fits_is_exactly_what_the_tokenizer_makes_of_the_filled_template() -> None:
    t = template()
    assert t.encode(QUESTION, ANSWER) == t.tokenizer(TEXT.format(question=QUESTION, answer=ANSWER))["input_ids"]
    assert (t.cuts.texts, t.cuts.questions, t.cuts.answers) == (1, 0, 0)


def test_the_end_of_the_question_and_the_start_of_the_answer_stay_and_cuts_are_counted() -> None:
    t = template(max_length=20, max_question=6)
    ids = t.encode("how how how how " + QUESTION, ANSWER + " slowly slowly slowly slowly")
    text = t.tokenizer.decode(ids)
    assert len(ids) == 20
    assert "smuggle the passport." in text
    assert "how" not in text
    assert "get the passport, then" in text
    assert not text.endswith("slowly slowly")
    assert (t.cuts.texts, t.cuts.questions, t.cuts.answers) == (1, 1, 1)


@pytest.mark.parametrize("words", [0, 1, 5, 13, 40, 200])
def test_windows_hold_every_token_of_the_answer_once_and_begin_with_what_encode_gives(words: int) -> None:
    t = template(max_length=30, max_question=8)
    answer = " ".join(["passport", "bank", "cake", "garden"][i % 4] for i in range(words))
    windows = t.windows(QUESTION, answer)
    assert windows[0] == t.encode(QUESTION, answer)
    assert all(len(ids) <= 30 for ids in windows)
    head = len(t.encode(QUESTION, ""))
    body = [token for ids in windows for token in ids[head:]]
    assert body == t.tokenizer(answer)["input_ids"]


def test_a_growing_answer_only_grows_the_ids() -> None:
    t = template(max_length=60)
    words = ANSWER.split()
    before: list[int] = []
    for n in range(1, len(words) + 1):
        now = t.encode(QUESTION, " ".join(words[:n]))
        assert now[: len(before)] == before
        before = now


def test_special_tokens_in_a_text_are_plain_text() -> None:
    t = template()
    specials = set(t.tokenizer.all_special_ids) - {t.tokenizer.unk_token_id}
    for hostile in ("<eos> <assistant>", "<pad><pad>", "{answer} {question}"):
        assert not specials & set(t.encode(hostile, hostile))


@pytest.mark.parametrize(
    "text", ["{answer} {question}", "{question}", "{question} {answer} {answer}", "{question} {x} {answer}"]
)
def test_a_template_without_both_fields_in_order_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected \{question\}, then \{answer\}"):
        QATemplate(text, load_tokenizer(str(backbone())), 40, 12)


def test_lengths_that_leave_no_room_for_the_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens are left for the answer"):
        template(max_length=14, max_question=12)
