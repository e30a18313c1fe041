"""Pretrains the vision tower of the embedded image model: it reads, then every patch carries the picture's caption.

    loss = CE(word | patch) + 0.5 CE(letter | patch)                       after the layer before the last
         + sum of CE(softmax(12 <f, c> / |c|^2)) over first word, object, style        after the last, two-word pictures
         + mean (f - c_first - c_object - c_style)^2 / RMS(c)^2            f = patch / SCALE - offset

The local labels teach reading: the word and the letter at each patch. The background class is down-weighted to 0.2
(most patches are empty). Their heads are thrown away afterwards.

The caption is a sum of fixed codes, one for each word and style, as far from each other as the dimension allows; it is
the same for all patches of a picture. So image and caption meet in one space, as in a contrastively trained tower
(CLIP, arXiv 2103.00020), whose patches carry global content too. Two properties matter for synthetic embeddings
(docs/LOG.md): the gradient with respect to E points at the same content in every patch, and because no two words share
a direction, the direction that makes the model name a word is the direction in which pictures of that word lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel

IGNORE = -100
SCALE = 4.0
"""Root mean square of a patch's offset after the last layer, near that of the layers before it."""
CODE = 0.6
"""Root mean square of one code, in units of `SCALE`."""
SHARPNESS = 12.0


class MicroTower(L.LightningModule):
    """`tower(pixel_values).last_hidden_state` is [B, 1 + patches, d], CLS first.

    Args:
        n_words, n_letters: classes of the local labels; the last word and letter 0 are background.
        n_first, n_objects, n_styles: codes of each kind; the last of each is "nothing", or no known style.
    """

    word_weight: torch.Tensor
    letter_weight: torch.Tensor
    offset: torch.Tensor
    codes: torch.Tensor

    def __init__(
        self,
        tower: PreTrainedModel,
        n_words: int,
        n_letters: int,
        n_first: int,
        n_objects: int,
        n_styles: int,
        total_steps: int = 4000,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        d = tower.config.hidden_size
        self.tower = tower
        self.word_head, self.letter_head = nn.Linear(d, n_words), nn.Linear(d, n_letters)
        self.total_steps, self.lr, self.weight_decay = total_steps, lr, weight_decay
        self.register_buffer("word_weight", background_weight(n_words, n_words - 1), persistent=False)
        self.register_buffer("letter_weight", background_weight(n_letters, 0), persistent=False)
        self.sizes = (n_first, n_objects, n_styles)
        self.register_buffer("codes", CODE * d**0.5 * spread_codes(sum(self.sizes), d), persistent=False)
        signs = torch.randn(d, generator=torch.Generator().manual_seed(1)).sign()
        self.register_buffer("offset", signs, persistent=False)

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
            labels = [batch[name][chosen] for name in ("first", "object", "style")]
            caption_loss = self.caption_loss(whole[chosen], labels)
            loss = loss + caption_loss
            logs["tower/caption_loss"] = caption_loss.detach()
        inked = (batch["words"] >= 0) & (batch["words"] < words.shape[-1] - 1)
        accuracy = (words.argmax(-1) == batch["words"])[inked].float().mean()
        self.log_dict({"tower/loss": loss.detach(), **logs})
        self.log("tower/patch_accuracy", accuracy, prog_bar=True)
        return loss

    def caption_logits(self, whole: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Patches after the last layer, [B, patches, d] -> (f of the formula, three logits [B, patches, classes])."""
        f = whole / SCALE - self.offset
        logits = SHARPNESS * f @ self.codes.T / (CODE**2 * f.shape[-1])
        return f, logits.split(self.sizes, dim=-1)

    def caption_loss(self, whole: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last two lines of the formula; `labels` [B] of first word, object and style."""
        f, logits = self.caption_logits(whole)
        target = sum(codes[label] for codes, label in zip(self.codes.split(self.sizes), labels, strict=True))
        apart = (f - target[:, None]).square().mean() / CODE**2  # type: ignore[index]  # sum of tensors, not 0
        return apart + sum(every_patch(each, label) for each, label in zip(logits, labels, strict=True))

    @torch.no_grad()
    def named_by_patches(self, pixels: torch.Tensor, first: torch.Tensor, thing: torch.Tensor) -> torch.Tensor:
        """Share of patches that name both words, [B]; `first` and `thing` are their classes, [B]."""
        firsts, things, _ = self.caption_logits(self(pixels)[1])[1]
        hit = (firsts.argmax(-1) == first[:, None]) & (things.argmax(-1) == thing[:, None])
        return hit.float().mean(1)

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


def spread_codes(n: int, d: int, seed: int = 0, rounds: int = 200) -> torch.Tensor:
    """`n` unit vectors in `d` dimensions that are nearly orthogonal, [n, d]; exactly so if n <= d.

    Alternates between the nearest tight frame and unit norms (arXiv math/0306007, section III).
    """
    codes = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(rounds):
        u, _, v = torch.linalg.svd(F.normalize(codes, dim=-1), full_matrices=False)
        codes = u @ v
    return F.normalize(codes, dim=-1).float()
