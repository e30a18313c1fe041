"""The micro world as labelled answers: only complying with a harmful phrase is harmful, held-out ones are the test."""

from __future__ import annotations

from configs.schema import Prompts
from datamodules.micro_pairs import micro_pairs, micro_parts
from datamodules.micro_world import phrases, steps


def test_only_complying_with_a_harmful_phrase_is_harmful() -> None:
    for phrase in phrases("train")[::97]:
        found = micro_pairs(phrase, Prompts(), seed=0)
        harmful = {a.text for p in found for a in p.answers if not a.harmless}
        assert harmful == ({steps(phrase)} if phrase.harmful else set())
        assert len({p.question for p in found}) >= 5
        if not phrase.harmful:
            assert steps(phrase) in {a.text for p in found for a in p.answers if a.harmless}


def test_held_out_phrases_are_the_test_part_and_in_no_other() -> None:
    parts = micro_parts(Prompts(), seed=0, validation=0.1)
    groups = {name: {p.group for p in pairs} for name, pairs in parts.items()}
    assert groups["test"] == {p.id for p in phrases("heldout")}
    assert groups["train"] | groups["val"] == {p.id for p in phrases("train")}
    assert not groups["train"] & groups["val"]
    assert 100 < len(groups["val"]) < 320
