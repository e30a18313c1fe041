"""Pretrains the vision tower of the embedded image model: it reads, then every patch knows the whole picture.

    loss = CE(word | patch) + 0.5 CE(letter | patch)                               after the layer before the last
         + CE(first word | patch) + CE(object | patch) + CE(style | patch)         after the last, two-word pictures

The local labels teach reading: the word and the letter at each patch. The background class is down-weighted to 0.2
(most patches are empty). The global labels are the same for all patches of a picture: what it says as a whole and in
which style. The towers of large models carry such global content in their patches too, and it is what makes a
synthetic embedding resemble a real one: a gradient with respect to E then points at the same content in every patch
(docs/LOG.md). The heads are thrown away afterwards.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel

IGNORE = -100


class MicroTower(L.LightningModule):
    """`tower(pixel_values).last_hidden_state` is [B, 1 + patches, d], CLS first.

    Args:
        n_words, n_letters: classes of the local labels; the last word and letter 0 are background.
        n_first, n_objects, n_styles: classes of the global labels; the last of each is "nothing", or no known style.
    """

    word_weight: torch.Tensor
    letter_weight: torch.Tensor

    def __init__(
        self,
        tower: PreTrainedModel,
        n_words: int,
        n_letters: int,
        n_first: int,
        n_objects: int,
        n_styles: int,
        total_steps: int = 3000,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        d = tower.config.hidden_size
        self.tower = tower
        self.word_head, self.letter_head = nn.Linear(d, n_words), nn.Linear(d, n_letters)
        self.first_head, self.object_head = nn.Linear(d, n_first), nn.Linear(d, n_objects)
        self.style_head = nn.Linear(d, n_styles)
        self.total_steps, self.lr, self.weight_decay = total_steps, lr, weight_decay
        self.register_buffer("word_weight", background_weight(n_words, n_words - 1), persistent=False)
        self.register_buffer("letter_weight", background_weight(n_letters, 0), persistent=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels: [B, 3, H, W] in -1..1 -> patches before and after the last layer, each [B, patches, d]."""
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states[-2][:, 1:], states[-1][:, 1:]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        local, whole = self(batch["pixels"])
        words, letters = self.word_head(local), self.letter_head(local)
        loss_word = F.cross_entropy(words.flatten(0, 1), batch["words"].flatten(), weight=self.word_weight)
        loss_letter = F.cross_entropy(letters.flatten(0, 1), batch["letters"].flatten(), weight=self.letter_weight)
        loss = loss_word + 0.5 * loss_letter
        logs = {"tower/word_loss": loss_word.detach(), "tower/letter_loss": loss_letter.detach()}
        if (chosen := batch["first"] != IGNORE).any():
            patches = whole[chosen]  # [pictures, patches, d]
            heads = {"first": self.first_head, "object": self.object_head, "style": self.style_head}
            losses = [every_patch(head(patches), batch[name][chosen]) for name, head in heads.items()]
            whole_loss = torch.stack(losses).sum()
            loss = loss + len(patches) / len(whole) * whole_loss
            logs["tower/whole_loss"] = whole_loss.detach()
        inked = (batch["words"] >= 0) & (batch["words"] < words.shape[-1] - 1)
        accuracy = (words.argmax(-1) == batch["words"])[inked].float().mean()
        self.log_dict({"tower/loss": loss.detach(), **logs})
        self.log("tower/patch_accuracy", accuracy, prog_bar=True)
        return loss

    @torch.no_grad()
    def named_by_patches(self, pixels: torch.Tensor, first: torch.Tensor, thing: torch.Tensor) -> torch.Tensor:
        """Share of patches that name both words, [B]; `first` and `thing` are their classes, [B]."""
        _, whole = self(pixels)
        hit = self.first_head(whole).argmax(-1) == first[:, None]
        return (hit & (self.object_head(whole).argmax(-1) == thing[:, None])).float().mean(1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = OneCycleLR(
            optimizer, self.lr, total_steps=self.total_steps, pct_start=0.08, anneal_strategy="linear"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def every_patch(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of one label a picture, asked of all its patches; logits [B, patches, classes], label [B]."""
    return F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(logits.shape[1]))


def background_weight(n: int, background: int, weight: float = 0.2) -> torch.Tensor:
    """Class weights [n]: 1 everywhere but `weight` for the background class."""
    out = torch.ones(n)
    out[background] = weight
    return out
