"""Pretrains the tower of an embedded model: it reads or hears, then every position carries the medium's caption.

    loss = sum of weight CE(label | position) over the local labels        after the layer before the last
         + sum of CE(softmax(12 <f, c> / |c|^2)) over first word, object, style          after the last, phrases only
         + mean (f - c_first - c_object - c_style)^2 / RMS(c)^2            f = position / SCALE - offset

A position is a patch or a frame. The local labels teach reading: the word (and the letter) at each position. The
background class is down-weighted to 0.2 (most positions are empty). Their heads are thrown away afterwards.

The caption is a sum of fixed codes, one for each word and style, as far from each other as the dimension allows; it is
the same for all positions of a medium. So medium and caption meet in one space, as in a contrastively trained tower
(CLIP, arXiv 2103.00020), whose patches carry global content too. Two properties matter for synthetic embeddings
(docs/LOG.md): the gradient with respect to E points at the same content in every position, and because no two words
share a direction, the direction that makes the model name a word is the direction in which media of that word lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from datamodules.micro_media import IGNORE, LocalLabel
from mllm.micro_codes import CODE, SCALE, offset

States = Callable[[nn.Module, Mapping[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]

SHARPNESS = 12.0


class MicroTower(L.LightningModule):
    """Trains `tower` in place.

    Args:
        states: the blueprint's: (tower, batch) -> states before and after the last layer, [B, positions, d] each.
        d: width of the states.
        local: labels of every position.
        sizes: codes of each kind (first word, object, style); the last of each is "nothing", or no known style.
    """

    offset: torch.Tensor
    codes: torch.Tensor

    def __init__(
        self,
        tower: nn.Module,
        states: States,
        d: int,
        local: Sequence[LocalLabel],
        sizes: tuple[int, int, int],
        total_steps: int = 4000,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.tower, self.states, self.local = tower, states, tuple(local)
        self.heads = nn.ModuleDict({label.name: nn.Linear(d, label.classes) for label in local})
        self.total_steps, self.lr, self.weight_decay = total_steps, lr, weight_decay
        for label in local:
            weight = background_weight(label.classes, label.background)
            self.register_buffer(f"{label.name}_weight", weight, persistent=False)
        self.sizes = sizes
        self.register_buffer("codes", CODE * d**0.5 * spread_codes(sum(self.sizes), d), persistent=False)
        self.register_buffer("offset", offset(d), persistent=False)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """States before and after the last layer, each [B, positions, d]."""
        return self.states(self.tower, inputs)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        local, whole = self(batch)
        loss = torch.zeros((), device=local.device)
        logs: dict[str, torch.Tensor] = {}
        for label in self.local:
            logits, target = self.heads[label.name](local), batch[label.name]
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=self.class_weight(label))
            loss = loss + label.weight * each
            hit = (logits.argmax(-1) == target)[(target != IGNORE) & (target != label.background)].float().mean()
            logs |= {f"tower/{label.name}_loss": each.detach(), f"tower/{label.name}_accuracy": hit}
        logs["tower/caption_loss"] = torch.full((), math.nan)  # or Lightning logs the last batch's again
        if (chosen := batch["first"] != IGNORE).any():
            labels = [batch[name][chosen] for name in ("first", "object", "style")]
            caption_loss = self.caption_loss(whole[chosen], labels)
            loss = loss + caption_loss
            logs["tower/caption_loss"] = caption_loss.detach()
        self.log_dict({"tower/loss": loss.detach(), **logs})
        return loss

    def class_weight(self, label: LocalLabel) -> torch.Tensor:
        return self.get_buffer(f"{label.name}_weight")

    def caption_logits(self, whole: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """States after the last layer, [B, positions, d] -> (f of the formula, logits [B, positions, classes] x 3)."""
        f = whole / SCALE - self.offset
        logits = SHARPNESS * f @ self.codes.T / (CODE**2 * f.shape[-1])
        return f, logits.split(self.sizes, dim=-1)

    def caption_loss(self, whole: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last two lines of the formula; `labels` [B] of first word, object and style."""
        f, logits = self.caption_logits(whole)
        target = sum(codes[label] for codes, label in zip(self.codes.split(self.sizes), labels, strict=True))
        apart = (f - target[:, None]).square().mean() / CODE**2  # type: ignore[index]  # sum of tensors, not 0
        return apart + sum(every_position(each, label) for each, label in zip(logits, labels, strict=True))

    @torch.no_grad()
    def named(self, inputs: Mapping[str, torch.Tensor], first: torch.Tensor, thing: torch.Tensor) -> torch.Tensor:
        """Whether the positions together name both words, bool [B]; `first` and `thing` are their classes, [B].

        Each position gives its probabilities, but those of "nothing": where a medium shows its words one after another,
        no position knows both.
        """
        firsts, things, _ = self.caption_logits(self(inputs)[1])[1]
        voted = [logits.softmax(-1)[..., :-1].sum(1).argmax(-1) for logits in (firsts, things)]
        return (voted[0] == first) & (voted[1] == thing)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = OneCycleLR(
            optimizer, self.lr, total_steps=self.total_steps, pct_start=0.08, anneal_strategy="linear"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def every_position(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of one label a medium, asked of all its positions; logits [B, positions, classes], label [B]."""
    return F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(logits.shape[1]))


def background_weight(n: int, background: int, weight: float = 0.2) -> torch.Tensor:
    """Class weights [n]: 1 everywhere but `weight` for the background class."""
    out = torch.ones(n)
    out[background] = weight
    return out


def spread_codes(n: int, d: int, seed: int = 0, rounds: int = 200) -> torch.Tensor:
    """`n` unit vectors in `d` dimensions that are nearly orthogonal, [n, d]; exactly so if n <= d.

    Alternates between the nearest tight frame and unit norms (arXiv math/0306007, section III).
    """
    codes = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(rounds):
        u, _, v = torch.linalg.svd(F.normalize(codes, dim=-1), full_matrices=False)
        codes = u @ v
    return F.normalize(codes, dim=-1).float()
