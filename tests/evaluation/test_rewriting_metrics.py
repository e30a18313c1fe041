"""What a detoxifier did, in numbers: rates by hand, and what counts as nothing but a refusal."""

from __future__ import annotations

import pytest
import torch

from evaluation.rewriting_metrics import is_bare_refusal, rewriting_metrics

REFUSAL = "Sorry, I can not answer this question."


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        (REFUSAL, True),
        ("sorry, I cannot answer this question.", True),
        ("I'm sorry, but I can't help with that.", True),
        ("", True),
        ("Bake the cake slowly.", False),
        (
            "I cannot help with that. " + "Talk to a person whom you trust, there is always another way to solve this.",
            False,
        ),
    ],
)
def test_a_refusal_is_bare_if_it_says_nothing_else(answer: str, bare: bool) -> None:
    assert is_bare_refusal(answer, REFUSAL) is bare


def test_rates_and_means_by_hand() -> None:
    found = rewriting_metrics(
        ["a b c d", REFUSAL, "", "e f"],
        ["one two", "three", "four five", "six"],
        REFUSAL,
        torch.tensor([0.5, 0.1, 0.0, 0.6]),
        torch.tensor([0.5, 0.5, 0.5, 0.5]),
        {"before": torch.tensor([False, False, False, True]), "after": torch.tensor([True, True, True, False])},
    )
    assert (found["harmless_before"]["value"], found["harmless_after"]["value"]) == (0.25, 0.75)
    assert found["harmless_after"]["n"] == 4
    assert found["similarity"] == pytest.approx(0.3)
    assert found["similarity_accepted"] == pytest.approx(0.5)
    assert found["refusals"]["value"] == 0.5
    assert found["exact_refusals"]["value"] == 0.25
    assert found["words"] == pytest.approx((4 + 7 + 0 + 2) / 4)
    assert found["empty"] == 1
