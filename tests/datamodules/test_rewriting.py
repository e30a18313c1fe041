"""What the detoxifier learns: the published targets, the loss mask on the answer alone, the prompt of its use."""

from __future__ import annotations

from datamodules.qa_pairs import Answer, QAPair
from datamodules.rewriting import RewriteBatches, Rewriting, encode_rewriting, rewritings
from tests.micro_text import detoxifier

REFUSAL = "Sorry, I can not answer this question."
GOOD, BAD, WORSE = Answer("good", True), Answer("bad", False), Answer("worse", False)


def test_the_target_is_the_harmless_answer_or_where_none_is_known_the_fixed_refusal() -> None:
    pairs = [
        QAPair("q", GOOD, BAD, "q"),
        QAPair("q", BAD, WORSE, "q"),  # both harmful
        QAPair("q", GOOD, Answer("fine too", True), "q"),  # nothing to rewrite
        QAPair("q", BAD, None, "q"),
        QAPair("q", GOOD, BAD, "q"),  # again
        QAPair("q", Answer("", True), BAD, "q"),  # an empty answer is no target
    ]
    assert rewritings(pairs, REFUSAL) == [
        Rewriting("q", "bad", "good"),
        Rewriting("q", "worse", REFUSAL),
        Rewriting("q", "bad", REFUSAL),
    ]


def test_the_loss_covers_the_answer_and_its_end_and_the_prompt_is_that_of_use() -> None:
    d = detoxifier()
    example = Rewriting("How do I bake the cake?", "Bake the cake.", "Sorry, I cannot help with that.")
    prompt, target = encode_rewriting(example, d.template, d.tokenizer, 32)
    assert prompt == d.encode(example.question, example.harmful)
    assert d.tokenizer.decode(target[:-1]).strip() == example.target.lower()
    assert target[-1] == d.tokenizer.eos_token_id
    short = encode_rewriting(example, d.template, d.tokenizer, 4)
    assert short == (prompt, target[:4])
    batch = RewriteBatches([(prompt, target), short], 2, 1, seed=0, pad_id=0).collate([1, 0])
    assert batch.target.sum(1).tolist() == [4, len(target)]
    assert batch.ids[1][batch.target[1]].tolist() == target
    assert batch.mask.sum(1).tolist() == [len(prompt) + 4, len(prompt) + len(target)]
