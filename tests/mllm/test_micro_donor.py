"""What the embedded video model takes over from the image model, before any training."""

from __future__ import annotations

import pytest
import torch

from configs.compose import compose
from datamodules.micro_lessons import all_texts
from datamodules.micro_media import micro_medium
from datamodules.micro_world import phrases, question, steps
from evaluation.phrases import words_of as words_in
from mllm.generate import answer
from mllm.loading import MLLM, assemble
from mllm.micro_codes import like_captions
from mllm.micro_donor import keep_strongest
from mllm.micro_qwen2_vl import build_model, build_processor
from mllm.micro_tokenizer import words_of
from tests.micro import micro


@pytest.fixture(scope="module")
def fresh() -> MLLM:
    spec = compose(["experiment=sea_video"]).config.model
    processor = build_processor(words_of(all_texts(spec.prompts, micro_medium("video"))))
    torch.manual_seed(0)
    return assemble(build_model(processor), processor, spec)


def test_a_fresh_model_talks_as_the_image_model_does(fresh: MLLM) -> None:
    """A fifth of the units of each MLP is left out."""
    chosen = phrases("heldout")[::20]
    said = answer(fresh, [question(p, 0) for p in chosen], None, 24)
    hits = [words_in(a) == words_in(steps(p)) for a, p in zip(said, chosen, strict=True)]
    assert sum(hits) >= 0.9 * len(hits)


def test_the_merger_reads_four_like_patches_as_the_projector_reads_one(fresh: MLLM) -> None:
    torch.manual_seed(1)
    patches = like_captions(8, 96)
    with torch.no_grad():
        expected = micro().model.model.multi_modal_projector(patches)
        got = fresh.model.model.visual.merger(patches.repeat_interleave(4, 0))
    assert torch.cosine_similarity(expected, got).min() > 0.9


def test_the_units_kept_are_those_that_add_most() -> None:
    weights = {
        "mlp.gate_proj.weight": torch.tensor([[1.0], [1.0], [3.0]]),
        "mlp.up_proj.weight": torch.tensor([[2.0], [0.1], [1.0]]),
        "mlp.down_proj.weight": torch.tensor([[1.0, 9.0, 1.0]]),  # products 2, 0.9, 3
    }
    keep_strongest(weights, "mlp.", 2)
    assert weights["mlp.gate_proj.weight"].tolist() == [[1.0], [3.0]]
    assert weights["mlp.up_proj.weight"].tolist() == [[2.0], [1.0]]
    assert weights["mlp.down_proj.weight"].tolist() == [[1.0, 1.0]]
