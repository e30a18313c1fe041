"""Training of the harm detector (MLLM-Protector, arXiv 2401.02906, section 3.2): a backbone with one output, BCE.

One optimiser step sees a batch of questions with all their answers, each distinct text once; of several ranks each
has a share of it, and the loss is a share of the batch's (times their number: gradients are averaged). Frozen lower
layers need not run: their output is fed from memory (mllm/frozen_layers.py). Nor need a backbone that is frozen as a
whole, under a head on section means (mllm/sections.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from datamodules.qa_batches import TextBatch
from lightning_modules.detector_losses import DetectorLoss, bce, bce_pairwise
from lightning_modules.optimisation import OneBackwardAStep, adamw, trained
from mllm.anchor import base_model
from mllm.frozen_layers import LowerLayers, text_layers
from mllm.sharding import shard


class HarmDetector(OneBackwardAStep):
    """A sequence classifier of one output.

    Args:
        model: the classifier, perhaps under an adapter; what has `requires_grad` is trained.
        loss, harmful_weight: see lightning_modules/detector_losses.py.
        head_lr_factor: the fresh head learns that much faster than the rest.
        lower, features: the frozen layers and what they put out for each text; None: they run.
        pooled: what a head on section means (then `model`, mllm/sections.py) is given for each text, [texts, width].
    """

    def __init__(
        self,
        model: nn.Module,
        loss: DetectorLoss,
        steps: int,
        lr: float,
        head: Sequence[nn.Parameter] = (),
        head_lr_factor: float = 1.0,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        harmful_weight: float = 1.0,
        lower: LowerLayers | None = None,
        features: Sequence[torch.Tensor] | None = None,
        pooled: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.steps, self.lr = model, loss, steps, lr
        self.warmup_steps, self.weight_decay, self.harmful_weight = warmup_steps, weight_decay, harmful_weight
        self.head_ids, self.head_lr_factor = {id(p) for p in head}, head_lr_factor
        self.lower, self.features, self.pooled = lower, features, pooled

    def forward(self, batch: TextBatch) -> torch.Tensor:
        """Logits, float32 [N]; positive = harmless."""
        if self.pooled is not None:
            return self.model(self.pooled[batch.positions].to(self.device))[:, 0].float()
        if self.lower is not None:
            assert self.features is not None
            self.lower.feed([self.features[i] for i in batch.positions.tolist()])
        return self.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, 0].float()

    def training_step(self, batch: TextBatch, batch_idx: int) -> torch.Tensor:
        self.at_work.on(self.global_step, lambda: (len(batch.ids), "texts", batch.ids.shape[1]))
        z_N = self(batch)
        z_L, h_L = z_N[batch.text_L], batch.harmless_L
        better, worse = z_N[batch.pairs_P2[:, 0]], z_N[batch.pairs_P2[:, 1]]
        weight = batch.harmless + self.harmful_weight * batch.harmful
        if self.loss == "bce":
            loss = bce(z_L, h_L, self.harmful_weight, weight)
        else:
            loss = bce_pairwise(z_L, h_L, better, worse, self.harmful_weight, weight, batch.pairs)
        ranks = self.trainer.world_size
        loss = loss * ranks
        with torch.no_grad():
            right = ((z_L > 0) == (h_L > 0.5)).float().sum() * ranks
            ordered = (better > worse).float().sum() * ranks
            logs = {
                "detector/accuracy": right / (batch.harmless + batch.harmful),
                # NaN without a pair: Lightning would log the last batch's value again for one that is left out.
                "detector/pair_accuracy": ordered / batch.pairs,
            }
        self.log_dict(logs, batch_size=1, sync_dist=True)
        self.log("detector/loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def shard(self, mesh: DeviceMesh) -> None:
        """Called by the strategy before the first step. The head stays whole: it is small and may have a dtype of its
        own. A head on section means is all that is trained: there is nothing to cut."""
        if self.pooled is not None:
            return
        whole = {p for p in trained(self) if id(p) in self.head_ids}
        if isinstance(self.model, PeftModel):
            whole = set(trained(self))
        layers = text_layers(base_model(self.model)) if self.lower is None else self.lower.remaining
        shard(self.model, layers, mesh, whole)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        head = [p for p in trained(self) if id(p) in self.head_ids]
        rest = [p for p in trained(self) if id(p) not in self.head_ids]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": head, "lr": self.lr * self.head_lr_factor}]
        return adamw([g for g in groups if g["params"]], self.lr, self.weight_decay, self.warmup_steps, self.steps)

    def transfer_batch_to_device(self, batch: TextBatch, device: torch.device, dataloader_idx: int) -> TextBatch:
        fields = {name: getattr(batch, name).to(device) for name in ("ids", "mask", "text_L", "harmless_L", "pairs_P2")}
        return replace(batch, **fields)
