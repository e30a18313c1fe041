"""The fingerprint tells weights apart, and not dtypes."""

from __future__ import annotations

import torch

from mllm.fingerprint import fingerprint


def layers(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 7))


def test_it_follows_the_weights_wherever_they_change() -> None:
    assert fingerprint(layers(0)) == fingerprint(layers(0)) != fingerprint(layers(1))
    trained = layers(0)
    with torch.no_grad():
        trained[1].weight += 0.01 * torch.randn_like(trained[1].weight)  # as after some training, first layer frozen
    assert fingerprint(trained) != fingerprint(layers(0))


def test_a_checkpoint_is_the_same_in_bfloat16() -> None:
    assert fingerprint(layers(0).to(torch.bfloat16)) == fingerprint(layers(0))
