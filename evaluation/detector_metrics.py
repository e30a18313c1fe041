"""How good is a harm detector: ranking, decisions and calibration, from harmless scores and labels.

    metrics = DetectorMetrics(threshold=0.31)
    metrics.update(scores, harmless)                 # of single answers
    metrics.update_pairs(better, worse)              # scores of pairs of answers to one question
    metrics.compute()                                # {"auroc": 0.81, "pair_accuracy": 0.79, ...}

Harmful is the class to be found: average precision, F1 and recall are about it, a false positive is a harmless answer
that is flagged (score below the threshold). ECE: Naeini et al. 2015 (AAAI), 15 equal bins, on P(harmless).

`calibrate` fits temperature and bias on validation data (Platt scaling: one logistic regression on the logit;
Guo et al. 2017, arXiv 1706.04599, is the case bias = 0), and sets the threshold for a share of false positives.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
)
from torchmetrics.utilities import dim_zero_cat

FALSE_POSITIVE_RATES = (0.01, 0.05)


class DetectorMetrics(Metric):
    """See above. Scores are kept (a ranking cannot be summed), and gathered over ranks by `compute`."""

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    harmless: list[Tensor]
    better: list[Tensor]
    worse: list[Tensor]

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        for name in ("scores", "harmless", "better", "worse"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, harmless: Tensor) -> None:
        """harmless_score in 0..1 and labels (1 = harmless), [N] each. Raises ValueError for a score that is NaN."""
        if not scores.isfinite().all():
            raise ValueError(f"{int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")
        self.scores.append(scores.float())
        self.harmless.append(harmless.long())

    def update_pairs(self, better: Tensor, worse: Tensor) -> None:
        """Scores of the harmless and the harmful answer of each pair, [P] each."""
        self.better.append(better.float())
        self.worse.append(worse.float())

    def compute(self) -> dict[str, float]:
        """Every value in 0..1; `pair_accuracy` counts a tie as half, and is missing where no pair was seen."""
        scores, harmless = dim_zero_cat(self.scores), dim_zero_cat(self.harmless)
        harmful, danger = 1 - harmless, 1 - scores
        flagged = ~(scores >= self.threshold)
        out = {
            "auroc": float(binary_auroc(scores, harmless)),
            "average_precision": float(binary_average_precision(danger, harmful)),
            "f1": float(binary_f1_score(flagged.long(), harmful)),
            "ece": float(binary_calibration_error(scores, harmless, n_bins=15, norm="l1")),
            "recall": _share(flagged, harmful),
            "false_positive_rate": _share(flagged, harmless),
            "harmful_share": float(harmful.float().mean()),
        }
        for rate in FALSE_POSITIVE_RATES:
            cut = threshold_for(scores[harmless == 1], rate)
            out[f"recall_at_{rate * 100:.0f}_percent_fpr"] = _share(scores < cut, harmful)
        if self.better:
            better, worse = dim_zero_cat(self.better), dim_zero_cat(self.worse)
            out["pair_accuracy"] = float(((better > worse).float() + 0.5 * (better == worse).float()).mean())
        return out


class Calibration(NamedTuple):
    """What makes scores of logits, and decisions of scores (mllm/detector.py)."""

    temperature: float
    bias: float
    threshold: float


def calibrate(logits: Tensor, harmless: Tensor, false_positive_rate: float) -> Calibration:
    """Temperature, bias and threshold from validation data.

    Args:
        logits: positive = harmless, [N]. harmless: labels, 1 = harmless, [N].
        false_positive_rate: at most this share of the harmless answers is flagged.

    Raises:
        ValueError: only one label, or a logit that is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError(f"{int((~logits.isfinite()).sum())} of {len(logits)} logits are not finite")
    if harmless.unique().numel() != 2:
        raise ValueError("validation data needs harmless and harmful answers")
    temperature, bias = platt(logits, harmless)
    scores = torch.sigmoid(logits.float() / temperature + bias)
    return Calibration(temperature, bias, decision_threshold(scores, harmless, false_positive_rate))


def platt(logits: Tensor, harmless: Tensor) -> tuple[float, float]:
    """(temperature, bias) of the likeliest p = sigmoid(logit / temperature + bias).

    Labels are softened as by Platt (1999): with separable data the likeliest slope is infinite. A detector that ranks
    the wrong way round keeps its direction: the temperature is positive, so a score is never turned upside down.
    """
    n1, n0 = int(harmless.sum()), int((1 - harmless).sum())
    target = torch.where(harmless == 1, (n1 + 1) / (n1 + 2), 1 / (n0 + 2)).double()
    x = logits.double()
    log_slope, bias = torch.zeros((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    optimizer = torch.optim.LBFGS(
        [log_slope.requires_grad_(), bias.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x * log_slope.exp() + bias, target)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    slope = min(max(math.exp(log_slope.item()), 1e-3), 1e3)
    return 1 / slope, bias.item()


def threshold_for(harmless_scores: Tensor, false_positive_rate: float) -> float:
    """The largest threshold that flags (score < threshold) at most this share of the harmless scores."""
    ordered = harmless_scores.sort().values
    allowed = min(math.floor(false_positive_rate * len(ordered) + 1e-9), len(ordered) - 1)
    return float(ordered[allowed])


def decision_threshold(scores: Tensor, harmless: Tensor, false_positive_rate: float) -> float:
    """As `threshold_for`, then lowered as far as it flags no harmful answer less: into the middle of the gap there.

    A detector that separates well does not spend its allowance of false positives.
    """
    ceiling = threshold_for(scores[harmless == 1], false_positive_rate)
    caught = scores[(harmless == 0) & (scores < ceiling)]
    if not len(caught):
        return ceiling
    highest = caught.max()
    above = scores[(harmless == 1) & (scores > highest)].min()  # the ceiling is such a score
    return float((highest.double() + above.double()) / 2)


def _share(chosen: Tensor, members: Tensor) -> float:
    return float(chosen[members == 1].float().mean())
