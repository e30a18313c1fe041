"""What every module that trains a part of a model shares: AdamW with a linear schedule, checkpoints of that part, and
one gradient over several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from lightning_modules.at_work import AtWork
from mllm.sharding import gathered, is_sharded


def adamw(
    parameters: Sequence[Any], lr: float, weight_decay: float, warmup_steps: int, steps: int
) -> OptimizerLRSchedulerConfig:
    """AdamW; linear warm-up, then linear decay to a tenth at `steps`. `parameters`: tensors, or groups of them."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.1, 1 - 0.9 * (step - warmup_steps) / max(1, steps - warmup_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(module: L.LightningModule) -> list[torch.nn.Parameter]:
    """The parameters that get gradients."""
    return [p for p in module.parameters() if p.requires_grad]


class PartlyTrained(L.LightningModule):
    """What has `requires_grad` is trained, and is all that checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.at_work = AtWork()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}


class OneBackwardAStep(PartlyTrained):
    """With automatic optimisation, each of several ranks with a share of the batch: the loss is that share of the
    batch's, times the number of ranks, since the average of their gradients divides by it."""

    def on_after_backward(self) -> None:
        average_gradients(self)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val:
            clip_gradients(trained(self), gradient_clip_val)


def average_gradients(module: L.LightningModule) -> None:
    """Over the ranks, once a step, with every gradient in one flight. Those of sharded weights are averaged by each
    backward pass already."""
    world = module.trainer.world_size
    if world == 1:
        return
    grads = []
    for p in trained(module):
        if is_sharded(p):
            continue
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads.append(p.grad)
    for work in [torch.distributed.all_reduce(grad, async_op=True) for grad in grads]:
        work.wait()
    for grad in grads:
        grad.div_(world)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
    """Scales all gradients such that their common norm is at most `most`; returns the norm before. As
    `torch.nn.utils.clip_grad_norm_`, also where some are shards and others whole."""
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [[g for g in grads if is_sharded(g)], [g for g in grads if not is_sharded(g)]]
    norms = [gathered(nn.utils.get_total_norm(part)) for part in parts if part]
    device = grads[0].device if grads else torch.device("cpu")
    norm = torch.stack([n.to(device).float() for n in norms]).norm() if norms else torch.zeros(())
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        for g in part:
            g.mul_(scale.to(g.dtype))
    return norm
