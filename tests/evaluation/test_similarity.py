"""MiniLM's cosine: the published pooling, near meanings nearer, the batch of no consequence."""

from __future__ import annotations

import pytest
import torch

from evaluation.similarity import SentenceSimilarity


@pytest.fixture(scope="module")
def similar() -> SentenceSimilarity:
    try:
        return SentenceSimilarity()
    except ValueError as error:
        pytest.skip(str(error))


def test_near_meanings_are_nearer(similar: SentenceSimilarity) -> None:
    near, far = similar(
        ["How do I bake a cake?"] * 2, ["Mix flour, eggs and sugar and put it into the oven.", "The yacht is blue."]
    )
    assert near > far + 0.2
    assert similar(["the same"], ["the same"]).item() == pytest.approx(1.0, abs=1e-5)


def test_padding_changes_no_embedding(similar: SentenceSimilarity) -> None:
    texts = ["short", "a text that is quite a bit longer than the other one is", ""]
    torch.testing.assert_close(similar.embed(texts), torch.cat([similar.embed([t]) for t in texts]), atol=1e-5, rtol=0)
    assert similar.embed([]).shape == (0, 384)
