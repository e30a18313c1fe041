"""SFT that holds under small attacks on E: half of the loss is taken where E has been moved against the model.

    loss = 1/2 NLL(E) + 1/2 NLL(E + r u),   u = g / RMS(g) of g = d NLL / dE, r uniform in [0, radius]

One step of the fast gradient method (arXiv 1412.6572, in its L2 form). Gradients of a model trained so point at what
distinguishes real inputs (arXiv 1906.00945 makes images with them), which is what an embedding optimiser needs: without
it E reaches its target in directions that no real picture takes (docs/LOG.md). Used to pretrain the embedded models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_modules.sft_aligner import SFTAligner
from mllm.branches import Item


class RobustAligner(SFTAligner):
    """`radius` is in units of E itself (a root mean square); for the first `calm_steps` steps there is no attack."""

    def __init__(self, *args: Any, radius: float, calm_steps: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.radius, self.calm_steps = radius, calm_steps

    def micro_step(
        self, items: list[Item], E: Mapping[str, torch.Tensor] | None, ids: list[str], total: float
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        if E is None or self.global_step < self.calm_steps:
            return super().micro_step(items, E, ids, total)
        E = {path: e.to(self.device).detach().requires_grad_() for path, e in E.items()}
        clean, logs = super().micro_step(items, E, ids, total)
        self.manual_backward(clean / 2)
        moved = {path: e.detach() + self.attack(e, len(items)) for path, e in E.items()}
        attacked, _ = super().micro_step(items, moved, ids, total)
        return attacked / 2, {**logs, "clean_loss": clean.detach(), "attacked_loss": attacked.detach()}

    def attack(self, e: torch.Tensor, n: int) -> torch.Tensor:
        """The step away from low loss for each of the `n` items of `e`, from its gradient; same shape as `e`."""
        assert e.grad is not None
        grad = e.grad.view(n, -1)
        unit = grad / grad.square().mean(1, keepdim=True).sqrt().clamp(min=1e-20)
        generator = torch.Generator().manual_seed(self.global_step)
        radius = self.radius * torch.rand(n, 1, generator=generator).to(e.device)
        return (radius * unit).view_as(e)
