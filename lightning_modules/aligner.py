"""What SFT and DPO share: adapters, one optimiser step from micro-batches, schedule, adapter-only checkpoints.

The encoder never runs: E is injected at the projector (SEA, arXiv 2502.12562, section 3.3). A batch is split into
micro-batches inside `training_step`, each normalised by the whole batch, so `micro_batch_size` decides memory and
nothing else: 1 x 8 gives the gradients of 8 x 1.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from configs.schema import AlignVariant, Model
from datamodules.alignment import AlignmentBatch, chunks
from lightning_modules.at_work import of_items
from lightning_modules.losses import token_logps
from lightning_modules.optimisation import PartlyTrained, adamw, average_gradients, clip_gradients, trained
from mllm.branches import BranchForward, BranchLogits, Item
from mllm.loading import MLLM
from mllm.sharding import decoder_layers, shard, shared_weights, whole_weights


def trainable_model(mllm: MLLM, variant: AlignVariant) -> nn.Module:
    """The model with LoRA on `model.lora_targets`, or with everything but the bypassed encoder unfrozen.

    Raises:
        ValueError: `model.lora_targets` is empty or matches no module.
    """
    return made_trainable(mllm.model, mllm.spec, tuple(mllm.anchor.encoder_modules), variant)


def made_trainable(model: Any, spec: Model, encoder: Sequence[str], variant: AlignVariant) -> nn.Module:
    """The same where there is no bundle: `encoder` are the paths of the bypassed modules."""
    if variant.full_finetune:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(tuple(f"{path}." for path in encoder)))
        whole: nn.Module = model
        return whole
    if not spec.lora_targets:
        raise ValueError(f"model {spec.name}: model.lora_targets is empty; give a regular expression of LLM modules")
    config = LoraConfig(
        r=variant.lora.r,
        lora_alpha=variant.lora.alpha,
        lora_dropout=variant.lora.dropout,
        target_modules=spec.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class Aligner(PartlyTrained, ABC):
    """Base of the two aligners; subclasses say what one micro-batch costs (`micro_step`).

    Args:
        noise: Gaussian noise on E, in units of the RMS of the blank's E.
        attack_radius: largest attack on E, in the same units. Half of the loss on examples with E is then taken where
            E has been moved against the model (`attacked`): what is learned holds around E, so for real media near it.
        calm_steps: first steps without attacks.
    """

    def __init__(
        self,
        mllm: MLLM,
        model: nn.Module,
        steps: int,
        micro_batch_size: int = 8,
        lr: float = 1e-3,
        warmup_steps: int = 10,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        noise: float = 0.0,
        attack_radius: float = 0.0,
        calm_steps: int = 0,
    ) -> None:
        super().__init__()
        self.noise, self.attack_radius, self.calm_steps = noise, attack_radius, calm_steps
        self.automatic_optimization = False
        self.lockstep = False  # every rank runs as many passes as the one with the most: sharded weights need it
        self.model = model
        self.anchor = mllm.anchor
        self.forward_branches = BranchForward(model, mllm.anchor)
        self.steps, self.micro_batch_size, self.grad_clip = steps, micro_batch_size, grad_clip
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay

    @abstractmethod
    def micro_step(
        self, items: list[Item], E: Mapping[str, torch.Tensor] | None, ids: list[str], total: float
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """Loss of one micro-batch, already divided by `total`, and sums for the log (divided by `total` here too)."""

    @abstractmethod
    def total(self, batch: AlignmentBatch) -> float:
        """What the whole batch is normalised by, over all ranks, divided by their number (DDP averages gradients)."""

    def training_step(self, batch: AlignmentBatch, batch_idx: int) -> torch.Tensor:
        optimizer = self.optimizers()
        total = self.total(batch)
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        logs: dict[str, Any] = {}
        loss_sum = torch.zeros((), device=self.device)
        parts = list(chunks(self.with_noise(batch), self.micro_batch_size))
        missing = self.passes_missing(parts)  # before the first pass: the ranks ask each other
        for items, E, ids in parts:
            self.at_work.on(self.global_step, partial(of_items, items))
            loss, sums = self.micro_backward(items, E, ids, total)
            loss_sum += loss
            for key, value in sums.items():
                logs[key] = logs.get(key, 0.0) + value
        if self.attack_radius:
            # A rank without media adds nothing. NaN if no rank attacks, or Lightning logs the last batch's again.
            media = len(batch.media) if batch.share is None else batch.share[1]
            logs.setdefault("attacked_loss", 0.0 if media and self.global_step >= self.calm_steps else math.nan)
        for _ in range(missing):
            self.backward_pass(self.micro_step(*parts[-1], total)[0] * 0)
        average_gradients(self)
        if self.grad_clip:
            logs["grad_norm"] = clip_gradients(trained(self), self.grad_clip)
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.log_dict({f"align/{k}": v for k, v in logs.items()}, batch_size=1, sync_dist=True)
        self.log("align/loss", loss_sum, prog_bar=True, batch_size=1, sync_dist=True)
        return loss_sum

    def backward_pass(self, loss: torch.Tensor) -> None:
        """Of one micro-batch; under lockstep every rank sends the same gradients."""
        if self.lockstep and not isinstance(self.model, PeftModel):
            loss = loss + shared_weights(self.model)
        self.manual_backward(loss)

    def passes_missing(self, parts: Sequence[tuple[Any, Any, Any]]) -> int:
        """How many forward and backward passes of this step other ranks have more than this one."""
        if not self.lockstep or self.trainer.world_size == 1:
            return 0
        mine = torch.tensor(sum(2 if self.attacks(E) else 1 for _, E, _ in parts), device=self.device)
        most = mine.clone()
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most - mine)

    def attacks(self, E: Mapping[str, torch.Tensor] | None) -> bool:
        return E is not None and self.attack_radius > 0 and self.global_step >= self.calm_steps

    def micro_backward(
        self, items: list[Item], E: Mapping[str, torch.Tensor] | None, ids: list[str], total: float
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """Adds the gradient of one micro-batch; returns its loss, detached, and the sums for the log."""
        if E is None or not self.attacks(E):
            loss, sums = self.micro_step(items, E, ids, total)
            self.backward_pass(loss)
            return loss.detach(), sums
        E = {path: e.to(self.device).detach().requires_grad_() for path, e in E.items()}
        clean, sums = self.micro_step(items, E, ids, total)
        self.backward_pass(clean / 2)
        attacked, _ = self.micro_step(items, self.attacked(E, ids[: len(items)]), ids, total)
        self.backward_pass(attacked / 2)
        return (clean + attacked).detach() / 2, {**sums, "attacked_loss": attacked.detach()}

    def attacked(self, E: Mapping[str, torch.Tensor], ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """E + r g / RMS(g) for each item: one step of the fast gradient method (arXiv 1412.6572, in L2) with
        g = d loss / dE and r uniform in [0, attack_radius], a function of step and id: resuming repeats it, and neither
        micro-batches nor ranks change it."""
        n = len(ids)
        draws = [random.Random(f"{self.global_step}/{id}").random() for id in ids]
        share = torch.tensor(draws, device=self.device)[:, None]
        out = {}
        for path, e in E.items():
            assert e.grad is not None
            grad = e.grad.view(n, -1)
            unit = grad / grad.square().mean(1, keepdim=True).sqrt().clamp(min=1e-20)
            out[path] = e.detach() + (self.attack_radius * self.unit(path) * share * unit).view_as(e)
        return out

    def unit(self, path: str) -> float:
        """Root mean square of the blank's E at this projector."""
        return float(self.anchor.E0_by_path[path].float().square().mean().sqrt())

    def shard(self, mesh: DeviceMesh) -> None:
        """Called by the strategy before the first step: the weights in shards over the ranks of `mesh`."""
        self.forward_branches.settle()
        whole = {p for module in self.anchor.encoder_modules.values() for p in module.parameters()}
        if isinstance(self.model, PeftModel):
            whole |= set(trained(self))
        shard(self.model, decoder_layers(self.model), mesh, whole)
        self.lockstep = True

    def with_noise(self, batch: AlignmentBatch) -> AlignmentBatch:
        """Gaussian noise on E, in units of the RMS of the blank's; a function of the step, so resuming repeats it. Each
        rank draws that of the whole batch and takes its share: their number changes nothing."""
        if not self.noise:
            return batch
        generator = torch.Generator().manual_seed(batch.step)
        places, n = batch.share or (list(range(len(batch.media))), len(batch.media))
        E = {}
        for path, e in batch.E.items():
            rows = e.shape[0] // len(places)
            drawn = torch.randn(n * rows, *e.shape[1:], generator=generator)
            own = drawn.unflatten(0, (n, rows))[places].flatten(0, 1)
            E[path] = e + self.noise * self.unit(path) * own
        return replace(batch, E=E)

    def logps(
        self, items: list[Item], E: Mapping[str, torch.Tensor] | None, shared: bool
    ) -> tuple[torch.Tensor, BranchLogits]:
        """Log-probability of every target token [T], with where it belongs."""
        if E is not None:
            E = {path: e.to(self.device) for path, e in E.items()}
        out = self.forward_branches(self.forward_branches.plan(items, shared=shared), E)
        return token_logps(out.logits, out.labels), out

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw(trained(self), self.lr, self.weight_decay, self.warmup_steps, self.steps)

    def transfer_batch_to_device(
        self, batch: AlignmentBatch, device: torch.device, dataloader_idx: int
    ) -> AlignmentBatch:
        return batch  # items are planned on the CPU, E moves micro-batch by micro-batch

    def whole_weights(self) -> dict[str, Any] | None:
        """All weights of a sharded, fully fine-tuned model; None for others. A collective."""
        return whole_weights(self.model)

    def export(self, folder: str, weights: Mapping[str, Any] | None = None) -> None:
        """The PEFT adapter (or, fully fine-tuned, the whole model) as safetensors in `folder`."""
        given = {} if weights is None else {"state_dict": weights}
        self.model.save_pretrained(folder, **given)  # type: ignore[operator]
