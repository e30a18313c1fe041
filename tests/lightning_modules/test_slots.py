"""SlotAdam is torch's Adam on every slot alone, however the slots are staggered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_modules.slots import SlotAdam, SlotTensors, schedule


def quadratic(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((x - target) ** 2 * torch.linspace(0.5, 2, x.numel()).view_as(x)).sum()


def test_equals_torch_adam_on_each_slot_when_slots_start_at_different_times() -> None:
    torch.manual_seed(0)
    targets = torch.randn(3, 4, 2)
    slots = nn.Parameter(torch.zeros(3, 4, 2))
    optimizer = SlotAdam([slots], [2.0], lr=0.05, betas=(0.8, 0.95), factor=schedule("cosine", 3, 20))
    starts = [0, 4, 7]
    for step in range(20):
        for slot, start in enumerate(starts):
            if step == start:
                optimizer.reset(slot)
        optimizer.active = [slot for slot, start in enumerate(starts) if step >= start]
        optimizer.zero_grad()
        sum(quadratic(slots[s], targets[s]) for s in range(3)).backward()
        optimizer.step()
    for slot, start in enumerate(starts):
        alone = nn.Parameter(torch.zeros(4, 2))
        adam = torch.optim.Adam([alone], lr=0.05 * 2.0, betas=(0.8, 0.95))
        rate = torch.optim.lr_scheduler.LambdaLR(adam, schedule("cosine", 3, 20))
        for _ in range(20 - start):
            adam.zero_grad()
            quadratic(alone, targets[slot]).backward()
            adam.step()
            rate.step()
        torch.testing.assert_close(slots[slot].detach(), alone.detach(), rtol=1e-5, atol=1e-6)
        assert optimizer.ages[slot] == 20 - start


def test_one_second_moment_for_an_embedding_keeps_the_direction_of_its_gradient() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(2, 4, 3)
    gradient[1] *= 1000  # each embedding is normalised by its own gradient
    slots = nn.Parameter(torch.zeros(2, 4, 3))
    optimizer = SlotAdam([slots], [2.0], lr=0.05, second_moment="embedding")
    (slots * gradient).sum().backward()
    optimizer.step()
    # The first step of Adam: lr * g / sqrt(mean g^2), whatever the betas.
    expected = -0.05 * 2.0 * gradient / gradient.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(slots.detach(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.state[slots]["exp_avg_sq"].shape == (2, 1, 1)
    optimizer.reset(0)
    assert optimizer.state[slots]["exp_avg_sq"].flatten().tolist()[0] == 0
    assert optimizer.state[slots]["exp_avg_sq"].flatten().tolist()[1] > 0


@pytest.mark.parametrize(("kind", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.525)])
def test_schedule_warms_up_then_decays_to_a_twentieth(kind: str, half: float) -> None:
    factor = schedule(kind, 3, 23)
    end = 1.0 if kind == "constant" else 0.05
    assert [factor(age) for age in (0, 1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [factor(age) for age in (13, 23, 30)] == pytest.approx([half, end, end])


def test_inactive_slots_do_not_move() -> None:
    slots = nn.Parameter(torch.ones(2, 3))
    optimizer = SlotAdam([slots], [1.0], lr=0.1)
    optimizer.active = [1]
    slots.sum().backward()
    optimizer.step()
    assert torch.equal(slots[0].detach(), torch.ones(3))
    assert not torch.equal(slots[1].detach(), torch.ones(3))
    assert optimizer.ages == [0, 1]


def test_restart_brings_a_slot_back_to_the_blank_and_leaves_the_others() -> None:
    blank = {"p": torch.arange(6.0).view(1, 3, 2), "q": torch.ones(2, 2)}
    tensors = SlotTensors(blank, slots=2)
    with torch.no_grad():
        for p in tensors.values:
            p.add_(1)
    tensors.restart(0, 0.0, torch.Generator())
    assert torch.equal(tensors.item(0)["p"], blank["p"])
    assert torch.equal(tensors.item(1)["q"], blank["q"] + 1)
    assert tensors.rows([1, 0])["p"].shape == (2, 3, 2)
    assert torch.equal(tensors.rows([1, 0])["q"][:2].detach(), blank["q"] + 1)


def test_restart_noise_has_the_size_asked_for_and_repeats_with_its_seed() -> None:
    tensors = SlotTensors({"p": torch.full((64, 64), 3.0)}, slots=1)
    tensors.restart(0, 0.1, torch.Generator().manual_seed(1))
    first = tensors.item(0)["p"]
    assert abs(float((first - 3.0).std()) - 0.3) < 0.02
    tensors.restart(0, 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(tensors.item(0)["p"], first)


def test_common_adds_the_mean_of_the_gradient_over_positions() -> None:
    """Equal to plain Adam on that gradient."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 1, 5, 3), torch.randn(2, 1, 5, 3)
    moved = []
    for common, given in ((4.0, gradient), (0.0, gradient + 4 * gradient.mean(2, keepdim=True)), (0.0, gradient)):
        slots = nn.Parameter(start.clone())
        optimizer = SlotAdam([slots], [1.0], lr=0.05, second_moment="embedding", common=common)
        slots.grad = given.clone()
        optimizer.step()
        moved.append(slots.detach() - start)
    torch.testing.assert_close(moved[0], moved[1])
    alike = [m.mean(2).square().sum() / m.square().mean(2).sum() for m in moved]
    assert alike[0] > 2 * alike[2]
