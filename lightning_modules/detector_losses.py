"""Losses of the harm detector as pure functions. Label h = 1 harmless, 0 harmful; a positive logit means harmless.

z_L   logit of each labelled answer, [L]        h_L   its label, 0.0 or 1.0
z+, z-   logits of the better and the worse answer of a pair, [P]
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

DetectorLoss = Literal["bce", "bce_pairwise"]


def bce(z_L: torch.Tensor, h_L: torch.Tensor, harmful_weight: float = 1.0, total: float | None = None) -> torch.Tensor:
    """Mean of -[h log s(z) + w (1 - h) log(1 - s(z))] (MLLM-Protector, arXiv 2401.02906, eq. 1, with w = 1).

    `harmful_weight` w above 1 makes up for harmful answers being rarer. The mean is over the weights, whose sum is
    `total` where these are a share of a batch: the results of all shares add up to that of the batch.
    """
    weight = torch.where(h_L > 0.5, 1.0, harmful_weight)
    loss = F.binary_cross_entropy_with_logits(z_L, h_L, weight, reduction="sum")
    return loss / (weight.sum() if total is None else total)


def bce_pairwise(
    z_L: torch.Tensor,
    h_L: torch.Tensor,
    better_P: torch.Tensor,
    worse_P: torch.Tensor,
    harmful_weight: float = 1.0,
    total: float | None = None,
    pairs: int | None = None,
) -> torch.Tensor:
    """The released code's loss: mean of -log s(z+ - z-), plus 2 BCE(better) + 2 BCE(worse), each a mean of its own.

    With as many better as worse answers, 2 BCE(better) + 2 BCE(worse) = 4 BCE over all of them: that is computed (so
    that answers without a partner count too). Source: RewardTrainer.compute_loss of the authors' repository, which
    adds the two BCE terms twice. `total`, `pairs`: of the whole batch, where these are a share of one.
    """
    n = len(better_P) if pairs is None else pairs
    pairwise = -F.logsigmoid(better_P - worse_P).sum() / max(1, n)
    return pairwise + 4 * bce(z_L, h_L, harmful_weight, total)
