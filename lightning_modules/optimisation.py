"""What every module that trains a part of a model shares: AdamW with a linear schedule, checkpoints of that part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


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


def keep_trained(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Drops the frozen weights from a checkpoint that is about to be written; load it with strict_loading=False."""
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
