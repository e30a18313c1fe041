"""Losses as pure functions: tensors in, a named result out. Parity with TRL is tested in tests/lightning_modules.

T   target tokens of a (micro-)batch, all examples concatenated      B   pairs
logp_T   log-probability of each target token under the policy
chosen, rejected   summed log-probability of each answer, [B]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

DPOLossType = Literal["sigmoid", "ipo", "hinge", "robust"]


def token_logps(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, [T], in fp32."""
    logits = logits_TV.float()
    return logits.gather(-1, labels_T[:, None])[:, 0] - logits.logsumexp(-1)


def sequence_logps(logp_T: torch.Tensor, sequence_T: torch.Tensor, n: int) -> torch.Tensor:
    """Sums token log-probabilities by sequence: [T], index [T] -> [n]."""
    return logp_T.new_zeros(n).index_add(0, sequence_T, logp_T)


def sft_loss(logp_T: torch.Tensor, normalizer: int | float) -> torch.Tensor:
    """Negative log-likelihood summed over the targets of a micro-batch, over the targets of the *whole* batch.

    Adding the results of all micro-batches gives the token mean of the batch, however it was split.
    """
    return -logp_T.sum() / normalizer


class DPOResult(NamedTuple):
    """loss: [B] before any mean. Rewards: beta * log(policy / reference), [B], detached."""

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_length: torch.Tensor,
    rejected_length: torch.Tensor,
    beta: float = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> DPOResult:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) and three relatives. All inputs [B].

    sigmoid  -log s(b d), d = log-ratio of the chosen answer minus that of the rejected one
    hinge    max(0, 1 - b d)                                        (SLiC, arXiv 2305.10425)
    ipo      (d' - 1 / 2b)^2, d' with log-ratios averaged over tokens  (arXiv 2310.12036, eq. 17; the average as in TRL)
    robust   [-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e)      (arXiv 2403.00409), e = `label_smoothing`

    Raises:
        ValueError: unknown `loss_type`, or robust with label_smoothing outside [0, 0.5).
    """
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    delta = chosen_ratio - rejected_ratio
    if loss_type == "sigmoid":
        loss = -F.logsigmoid(beta * delta)
    elif loss_type == "hinge":
        loss = torch.relu(1 - beta * delta)
    elif loss_type == "ipo":
        mean_delta = chosen_ratio / chosen_length.clamp(min=1) - rejected_ratio / rejected_length.clamp(min=1)
        loss = (mean_delta - 1 / (2 * beta)).square()
    elif loss_type == "robust":
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"loss_type=robust needs 0 <= label_smoothing < 0.5, got {label_smoothing}")
        clean, flipped = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
        loss = (-(1 - label_smoothing) * clean + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"loss_type={loss_type}: expected sigmoid, ipo, hinge or robust")
    return DPOResult(loss, (beta * chosen_ratio).detach(), (beta * rejected_ratio).detach())
