"""Slots: S embeddings are optimised side by side, each with its own clock, and leave when they are done.

    E        [S, rows, ..., d]   fp32 master of each projector input, one row of slots for each projector path
    age      [S]                 optimiser steps the slot's embedding has had
    SlotAdam                     Adam (arXiv 1412.6980) whose moments, bias correction and learning rate are per slot

Nothing waits for the slowest embedding: a slot is freed the moment its own stopping rule holds, and the next concept
starts there with fresh optimiser state while the other slots go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

Schedule = Callable[[int], float]
"""Steps an embedding has had -> factor of the learning rate."""
SecondMoment = Literal["element", "embedding"]


def schedule(kind: str, warmup_steps: int, max_steps: int) -> Schedule:
    """Learning-rate factor by age: linear warm-up, then constant, linear or cosine decay to 5 % at `max_steps`."""

    def factor(age: int) -> float:
        if age < warmup_steps:
            return (age + 1) / (warmup_steps + 1)
        done = (age - warmup_steps) / max(1, max_steps - warmup_steps)
        if kind == "linear":
            return max(0.05, 1.0 - done)
        if kind == "cosine":
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"lr_schedule={kind}: expected constant, linear or cosine")
    return factor


class SlotAdam(Optimizer):
    """Adam over parameters of shape [S, ...] in which every slot has an age of its own.

    A slot whose gradient is to be ignored (empty, or just finished) is left out of `active`; its weights and moments do
    not move. Equal to `torch.optim.Adam` on each slot alone (tested).
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        scales: Sequence[float],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        factor: Schedule | None = None,
        second_moment: SecondMoment = "element",
        common: float = 0.0,
    ) -> None:
        """
        Args:
            scales: unit of the learning rate for each parameter (the RMS of the blank's embedding).
            second_moment: "element" is Adam's; "embedding" keeps the mean square of each embedding's whole gradient, so
                that a step has the gradient's direction and only its length is normalised.
            common: so many times the gradient's mean over positions (the last axis but one) is added to it everywhere.
                An encoder with global attention tells at every position what the whole medium shows: E changes more
                alike in all of them (docs/LOG.md). 0 is Adam's.
        """
        super().__init__([{"params": [p], "scale": s} for p, s in zip(params, scales, strict=True)], {"lr": lr})
        self.betas, self.eps, self.factor = betas, eps, factor or (lambda age: 1.0)
        slots = params[0].shape[0]
        self.ages = [0] * slots
        self.active = list(range(slots))
        self.whole, self.common = second_moment == "embedding", common
        for p in params:
            square = p.new_zeros(slots, *[1] * (p.dim() - 1)) if self.whole else torch.zeros_like(p)
            self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": square}

    def reset(self, slot: int) -> None:
        """Fresh state for the embedding that starts in this slot."""
        self.ages[slot] = 0
        for state in self.state.values():
            state["exp_avg"][slot] = 0
            state["exp_avg_sq"][slot] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.active:
            return loss
        beta1, beta2 = self.betas
        every = len(self.active) == len(self.ages)
        for group in self.param_groups:
            (p,) = group["params"]
            if p.grad is None:
                continue
            state = self.state[p]
            rows = slice(None) if every else torch.tensor(self.active, device=p.device)
            m, v, g = state["exp_avg"][rows], state["exp_avg_sq"][rows], p.grad[rows]
            if self.common:
                g = g + self.common * g.mean(-2, keepdim=True)
            m = torch.lerp(m, g, 1 - beta1)
            square = g.square().mean(tuple(range(1, g.dim())), keepdim=True) if self.whole else g.square()
            v = torch.lerp(v, square, 1 - beta2)
            ages = [self.ages[s] + 1 for s in self.active]
            rates = [group["lr"] * group["scale"] * self.factor(a - 1) / (1 - beta1**a) for a in ages]
            shape = (-1,) + (1,) * (p.dim() - 1)
            rate = torch.tensor(rates, dtype=p.dtype, device=p.device).view(shape)
            correction = torch.tensor([(1 - beta2**a) ** 0.5 for a in ages], dtype=p.dtype, device=p.device).view(shape)
            p[rows] = p[rows] - rate * m / (v.sqrt() / correction + self.eps)
            state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
        for s in self.active:
            self.ages[s] += 1
        return loss


class SlotTensors(nn.Module):
    """The embeddings in the slots: one fp32 parameter [S, *shape of E0] for each projector path."""

    def __init__(self, E0: Mapping[str, torch.Tensor], slots: int) -> None:
        super().__init__()
        self.paths = tuple(E0)
        self.values = nn.ParameterList(
            nn.Parameter(e.float().unsqueeze(0).repeat(slots, *[1] * e.dim())) for e in E0.values()
        )
        self.blank = [e.float().clone() for e in E0.values()]
        self.scales = [max(float(e.square().mean().sqrt()), 1e-6) for e in self.blank]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SlotTensors:
        """`.to()` moves, and never casts: trainer.precision=bf16-true would take E's and Adam's small steps away."""
        return super()._apply(lambda value: value.to(fn(value).device), recurse)

    @torch.no_grad()
    def restart(self, slot: int, noise: float, generator: torch.Generator) -> None:
        """Back to the blank, plus Gaussian noise of `noise` times the blank's RMS."""
        for p, blank, scale in zip(self.values, self.blank, self.scales, strict=True):
            start = blank
            if noise:
                start = start + (noise * scale * torch.randn(blank.shape, generator=generator)).to(blank.device)
            p[slot] = start.to(p.device)

    def rows(
        self, slots: Sequence[int], noise: float = 0.0, generators: Sequence[torch.Generator] = ()
    ) -> dict[str, torch.Tensor]:
        """E of these slots, items concatenated on dim 0 as `Anchor.inject` wants them; differentiable.

        With `noise`, Gaussian noise of that many times the blank's RMS is added, each slot's from its own generator.
        """
        out = {}
        for path, p, scale in zip(self.paths, self.values, self.scales, strict=True):
            chosen = p if list(slots) == list(range(len(p))) else p[torch.tensor(slots, device=p.device)]
            if noise:
                drawn = [torch.randn(p.shape[1:], generator=g, device=p.device) for g in generators]
                chosen = chosen + noise * scale * torch.stack(drawn)
            out[path] = chosen.flatten(0, 1)
        return out

    def item(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of one embedding, on the CPU."""
        return {path: p[slot].detach().cpu().clone() for path, p in zip(self.paths, self.values, strict=True)}
