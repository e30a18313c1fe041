"""The schedule that all trained modules share."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.optimisation import adamw


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    made = adamw([torch.nn.Parameter(torch.zeros(1))], lr=2.0, weight_decay=0.0, warmup_steps=3, steps=23)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(31):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert [rates[step] for step in (13, 23, 30)] == pytest.approx([1.1, 0.2, 0.2])
