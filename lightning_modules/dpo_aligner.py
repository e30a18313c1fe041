"""Direct preference optimisation (arXiv 2305.18290) with E in place of the encoded medium.

Chosen and rejected answer are two branches on one prefix (prompt and E), computed once. The embeddings are fixed, so
the reference log-probabilities are too: they are computed once and cached on disk, or taken from the same model with
its adapter switched off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save

from datamodules.alignment import AlignmentBatch
from datamodules.durable import write_durably
from lightning_modules.aligner import Aligner
from lightning_modules.losses import DPOLossType, dpo_loss, sequence_logps
from mllm.branches import Item
from mllm.replay import evaluating

ReferenceLogps = Mapping[str, tuple[float, float]]
"""Example id -> summed log-probability of the chosen and of the rejected answer under the reference."""


class DPOAligner(Aligner):
    """DPO, optionally with the chosen answer's own likelihood kept up.

    Args:
        sft_weight: weight of the chosen answer's mean negative log-likelihood. DPO alone may lower the likelihood of
            both answers (arXiv 2404.19733 adds the same term).
        reference: cached reference log-probs; None switches the adapter off for them in every step.
    """

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        loss_type: DPOLossType = "sigmoid",
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        reference: ReferenceLogps | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if reference is None and not isinstance(self.model, PeftModel):
            raise ValueError("full fine-tuning changes the reference: set align.precompute_reference=true")
        self.beta, self.loss_type, self.label_smoothing, self.reference = beta, loss_type, label_smoothing, reference
        self.sft_weight = sft_weight

    def total(self, batch: AlignmentBatch) -> float:
        pairs = len(batch.text) + len(batch.media)
        if self.trainer.world_size == 1:
            return pairs
        everywhere = self.all_gather(torch.tensor(float(pairs), device=self.device))
        assert isinstance(everywhere, torch.Tensor)  # a tensor in, a tensor out
        return everywhere.sum().item() / self.trainer.world_size

    def pair_logps(self, items: list[Item], E: Mapping[str, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probability [B, 2] and number of target tokens [B, 2] of (chosen, rejected)."""
        logp, out = self.logps(items, E, shared=True)
        sequence = out.item * 2 + out.branch
        lengths = sequence_logps(torch.ones_like(logp), sequence, 2 * len(items))
        return sequence_logps(logp, sequence, 2 * len(items)).view(-1, 2), lengths.view(-1, 2)

    @torch.no_grad()
    def reference_logps(self, items: list[Item], E: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """[B, 2] under the reference: the model with its adapter off (or as loaded, before full fine-tuning)."""
        off = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        with evaluating(self.model), off:
            return self.pair_logps(items, E)[0]

    def micro_step(
        self, items: list[Item], E: Mapping[str, torch.Tensor] | None, ids: list[str], total: float
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        policy, lengths = self.pair_logps(items, E)
        if self.reference is None:
            reference = self.reference_logps(items, E)
        else:
            reference = torch.tensor([self.reference[i] for i in ids], device=policy.device)
        result = dpo_loss(
            policy[:, 0],
            policy[:, 1],
            reference[:, 0],
            reference[:, 1],
            lengths[:, 0],
            lengths[:, 1],
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
        )
        margin = result.chosen_reward - result.rejected_reward
        loss = result.loss - self.sft_weight * policy[:, 0] / lengths[:, 0]
        return loss.sum() / total, {
            "reward_margin": margin.sum() / total,
            "reward_accuracy": (margin > 0).float().sum() / total,
            "chosen_logp": policy[:, 0].detach().sum() / total,
        }


def save_reference(path: Path, ids: Sequence[str], logps: torch.Tensor) -> None:
    """Caches reference log-probs [N, 2] for `ids`; atomic."""
    write_durably(path, save({"logps": logps.contiguous()}, {"ids": json.dumps(list(ids))}))


def load_reference(path: Path, ids: Sequence[str]) -> dict[str, tuple[float, float]] | None:
    """The cache, if it is there and holds exactly these examples."""
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("ids", "")
    if stored != json.dumps(list(ids)):  # an id may hold any sign, a line feed too
        return None
    values = load_file(path)["logps"].tolist()
    return {i: (v[0], v[1]) for i, v in zip(ids, values, strict=True)}
