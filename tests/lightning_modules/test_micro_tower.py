"""The codes that the embedded tower's patches carry, and the loss that puts them there."""

from __future__ import annotations

import pytest
import torch
from transformers import MLCDVisionConfig, MLCDVisionModel

from datamodules.micro_media import LocalLabel
from lightning_modules.micro_tower import MicroTower, spread_codes
from mllm.micro_codes import SCALE
from mllm.micro_llava import states


@pytest.mark.parametrize(("n", "d", "largest"), [(102, 96, 0.1), (40, 96, 1e-5), (5, 4, 0.26)])
def test_codes_are_unit_vectors_as_far_apart_as_they_can_be(n: int, d: int, largest: float) -> None:
    codes = spread_codes(n, d)
    overlap = (codes @ codes.T).fill_diagonal_(0).abs().max()
    assert codes.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert overlap < largest
    assert torch.equal(codes, spread_codes(n, d))


def module() -> MicroTower:
    config = MLCDVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    labels = [LocalLabel("words", 5, 4), LocalLabel("letters", 3, 0, 0.5)]
    return MicroTower(MLCDVisionModel(config), states, 16, labels, (4, 3, 2))


def captioned(tower: MicroTower, labels: list[torch.Tensor]) -> torch.Tensor:
    """Patches [B, 4, d] that carry exactly the captions of `labels`."""
    codes = tower.codes.split(tower.sizes)
    f = sum((c[label] for c, label in zip(codes, labels, strict=True)), start=tower.offset)
    return SCALE * f[:, None].repeat(1, 4, 1)


def test_the_caption_loss_vanishes_where_every_patch_carries_the_caption() -> None:
    tower = module()
    labels = [torch.tensor([0, 3]), torch.tensor([2, 0]), torch.tensor([1, 1])]
    right = captioned(tower, labels)
    assert tower.caption_loss(right, labels) < 1e-3
    wrong = [torch.tensor([1, 3]), *labels[1:]]
    assert tower.caption_loss(right, wrong) > 5
    one_patch_off = right.clone()
    one_patch_off[0, 0] = 0
    assert tower.caption_loss(one_patch_off, labels) > 0.1
