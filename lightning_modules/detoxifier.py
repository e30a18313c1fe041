"""Training of the detoxifier (MLLM-Protector, arXiv 2401.02906, section 3.3): loss on the harmless answer alone.

    loss = - mean over the batch's answer tokens of log p(token | question, harmful answer, before)

Logits are computed at those tokens only: with a vocabulary of 49,000 the head would otherwise cost more than the rest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from datamodules.rewriting import RewriteBatch
from lightning_modules.losses import sft_loss, token_logps
from lightning_modules.optimisation import OneBackwardAStep, adamw, trained
from mllm.frozen_layers import text_layers
from mllm.sharding import shard


def target_logps(model: PreTrainedModel, batch: RewriteBatch) -> torch.Tensor:
    """log p of every target token, [T]: row by row. `model`: without peft's wrapper; adapters in it are at work."""
    hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)[0]
    asked = batch.target[:, 1:]  # the position before a target predicts it
    logits = model.get_output_embeddings()(hidden[:, :-1][asked])
    return token_logps(logits, batch.ids[:, 1:][asked])


class TargetLogps(nn.Module):
    """`target_logps` as one module, which fetches sharded weights when it is called."""

    def __init__(self, net: nn.Module, model: PreTrainedModel) -> None:
        super().__init__()
        self.net, self._plain = net, (model,)  # in a tuple: not registered a second time

    def forward(self, batch: RewriteBatch) -> torch.Tensor:
        return target_logps(self._plain[0], batch)


class DetoxifierTuner(OneBackwardAStep):
    """A causal model, perhaps under an adapter; what has `requires_grad` is trained.

    Args:
        net: what is trained and saved. model: the plain model in it.
    """

    def __init__(
        self,
        net: nn.Module,
        model: PreTrainedModel,
        steps: int,
        lr: float,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self._plain = net, (model,)  # in a tuple: not registered a second time
        self._score = (TargetLogps(net, model),)
        self.steps, self.lr, self.warmup_steps, self.weight_decay = steps, lr, warmup_steps, weight_decay

    @property
    def plain(self) -> PreTrainedModel:
        """The model inside the adapter's wrapper, adapters at work."""
        return self._plain[0]

    def logps(self, batch: RewriteBatch) -> torch.Tensor:
        """log p of every target token, [T]."""
        return self._score[0](batch)

    def training_step(self, batch: RewriteBatch, batch_idx: int) -> torch.Tensor:
        self.at_work.on(self.global_step, lambda: (len(batch.ids), "pairs", batch.ids.shape[1]))
        loss = sft_loss(self.logps(batch), batch.targets) * self.trainer.world_size
        self.log("detoxifier/loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def shard(self, mesh: DeviceMesh) -> None:
        """Called by the strategy before the first step."""
        whole = set(trained(self)) if isinstance(self.model, PeftModel) else set()
        shard(self._score[0], text_layers(self.plain), mesh, whole)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw(trained(self), self.lr, self.weight_decay, self.warmup_steps, self.steps)

    def transfer_batch_to_device(self, batch: RewriteBatch, device: torch.device, dataloader_idx: int) -> RewriteBatch:
        return replace(batch, **{name: getattr(batch, name).to(device) for name in ("ids", "mask", "target")})
