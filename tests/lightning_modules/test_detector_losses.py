"""The detector's losses against sums done by hand and against the released code, written out again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.detector_losses import bce, bce_pairwise


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bce_by_hand_and_positive_means_harmless() -> None:
    z, h = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    assert bce(z, h).item() == pytest.approx((softplus(-2) + softplus(-1) + softplus(0.5)) / 3)
    weighted = (softplus(-2) + 3 * (softplus(-1) + softplus(0.5))) / 7
    assert bce(z, h, harmful_weight=3.0).item() == pytest.approx(weighted)
    z.requires_grad_()
    bce(z, h).backward()
    assert z.grad is not None
    assert z.grad[0] < 0 < z.grad[1]  # descent raises the harmless logit


def test_bce_pairwise_equals_the_released_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    j, k = torch.randn(7, 1, requires_grad=True), torch.randn(7, 1, requires_grad=True)
    labels_j, labels_k = torch.ones(7), torch.zeros(7)
    # RewardTrainer.compute_loss of the authors' repository.
    cls_j = F.binary_cross_entropy_with_logits(j.flatten(), labels_j)
    cls_k = F.binary_cross_entropy_with_logits(k.flatten(), labels_k)
    loss = -F.logsigmoid(j - k).mean() + cls_j + cls_k
    loss = cls_j + cls_k + loss
    expected = torch.autograd.grad(loss, (j, k))
    z = torch.cat([j.flatten(), k.flatten()])
    ours = bce_pairwise(z, torch.cat([labels_j, labels_k]), j.flatten(), k.flatten())
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    for found, wanted in zip(torch.autograd.grad(ours, (j, k)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_answers_without_a_partner_count_too() -> None:
    z, h = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0])
    none = torch.zeros(0)
    assert bce_pairwise(z, h, none, none).item() == pytest.approx(4 * bce(z, h).item())
