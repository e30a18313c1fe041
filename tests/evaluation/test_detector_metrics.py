"""The detector's metrics against sums done by hand, and its calibration on data whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.detector_metrics import (
    DetectorMetrics,
    calibrate,
    decision_threshold,
    platt,
    threshold_for,
)

SCORES = torch.tensor([0.9, 0.8, 0.4, 0.7, 0.2, 0.1])
HARMLESS = torch.tensor([1, 1, 1, 0, 0, 0])


def test_values_of_six_answers_by_hand() -> None:
    metrics = DetectorMetrics(threshold=0.5)
    metrics.update(SCORES[:2], HARMLESS[:2])
    metrics.update(SCORES[2:], HARMLESS[2:])
    metrics.update_pairs(torch.tensor([0.9, 0.4, 0.3]), torch.tensor([0.7, 0.5, 0.3]))
    found = metrics.compute()
    assert found["auroc"] == pytest.approx(8 / 9)  # one of nine (harmless, harmful) pairs stands the wrong way round
    # Harmful ones are found at ranks 1, 2 and 4 of the dangerous: (1 + 1 + 3/4) / 3.
    assert found["average_precision"] == pytest.approx(11 / 12)
    assert found["recall"] == pytest.approx(2 / 3)  # 0.2 and 0.1 of three
    assert found["false_positive_rate"] == pytest.approx(1 / 3)  # 0.4
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["pair_accuracy"] == pytest.approx(0.5)  # right, wrong, tie
    # One answer a bin: |0.9-1| + |0.8-1| + |0.4-1| + |0.7-0| + 0.2 + 0.1, over six.
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.7 + 0.2 + 0.1) / 6, abs=1e-6)
    assert found["recall_at_1_percent_fpr"] == pytest.approx(2 / 3)  # below 0.4, the lowest harmless score


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        DetectorMetrics().update(torch.tensor([0.5, math.nan]), torch.tensor([1, 0]))


@pytest.mark.parametrize(("rate", "flagged"), [(0.0, 0), (0.01, 1), (0.05, 5), (0.999, 99), (1.0, 99)])
def test_a_threshold_flags_at_most_its_share_and_no_fewer(rate: float, flagged: int) -> None:
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert int((scores < threshold_for(scores, rate)).sum()) == flagged


def test_the_decision_threshold_gives_false_positives_back_that_buy_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    harmless, harmful = 0.8 + 0.2 * torch.rand(200, generator=generator), 0.2 * torch.rand(50, generator=generator)
    scores = torch.cat([harmless, harmful])
    labels = torch.cat([torch.ones(200), torch.zeros(50)]).long()
    found = decision_threshold(scores, labels, 0.05)
    assert 0.2 < found < 0.8  # the gap; threshold_for would flag ten harmless answers and no harmful one more
    overlapping = torch.cat([torch.rand(200, generator=generator), torch.rand(200, generator=generator) * 0.9])
    labels = torch.cat([torch.ones(200), torch.zeros(200)]).long()
    low = decision_threshold(overlapping, labels, 0.1)
    high = threshold_for(overlapping[:200], 0.1)
    assert low <= high
    assert (overlapping[200:] < low).sum() == (overlapping[200:] < high).sum()


def test_calibration_recovers_the_temperature_and_bias_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20000, generator=generator)
    labels = (torch.rand(20000, generator=generator) < torch.sigmoid(logits / 2.5 + 0.7)).long()
    temperature, bias = platt(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.06)
    assert bias == pytest.approx(0.7, abs=0.06)
    metrics = DetectorMetrics()
    metrics.update(torch.sigmoid(logits / temperature + bias), labels)
    raw = DetectorMetrics()
    raw.update(torch.sigmoid(logits), labels)
    assert metrics.compute()["ece"] < 0.02 < 0.1 < raw.compute()["ece"]


def test_calibration_stays_finite_on_separable_data_and_never_turns_scores_upside_down() -> None:
    logits = torch.tensor([5.0, 4.0, -4.0, -5.0])
    temperature, bias, threshold = calibrate(logits, torch.tensor([1, 1, 0, 0]), 0.0)
    assert 0 < temperature < 1e3
    assert math.isfinite(bias)
    assert 0 < threshold < 1
    assert platt(logits, torch.tensor([0, 0, 1, 1]))[0] > 0


def test_calibration_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="harmless and harmful"):
        calibrate(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]), 0.05)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(torch.tensor([1.0, math.inf]), torch.tensor([1, 0]), 0.05)
