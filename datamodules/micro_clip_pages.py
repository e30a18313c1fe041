"""Pairs of frames with a label for every patch: what the embedded video tower is pretrained on.

As the pages of the image tower (datamodules/micro_pages.py), shown for two frames; the pairs of two-word clips show the
first word, the object, both or none of them, and wordless pairs often show moving shapes. Labels stand in the order in
which the model has its patches: the 2 x 2 that the merger joins one after another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from datamodules.micro_clips import FRAMES, SHOWN, Shapes, draw_clip, paint_pair, words_shown
from datamodules.micro_images import SIDE, place_lines, place_page, random_colours
from datamodules.micro_media import IGNORE, LocalLabel
from datamodules.micro_pages import GRID, LETTERS, Pages, patch_labels
from datamodules.micro_stream import Batch
from datamodules.micro_world import FIRST_WORDS, OBJECTS, PHRASES, STYLES, WORDS, Phrase

MERGED = torch.arange(GRID * GRID).view(GRID // 2, 2, GRID // 2, 2).permute(0, 2, 1, 3).reshape(-1)
"""Row-major index of each patch in the model's order."""
SHARES = {"nothing": 0.1, "first": 0.22, "object": 0.18, "both": 0.5}
"""Of the pairs of clips; two words are the hardest to tell."""


class ClipPages(Pages):
    """A seeded stream of batches like those of `Pages`, but pixels are [B, 3, 2, SIDE, SIDE]."""

    def batch(self, step: int) -> Batch:
        rng, progress = random.Random(f"{self.seed}-{step}"), step / self.total_steps
        # Random colours and pages of many words teach to read; the last third is mostly what clips are made of.
        share_random = 0.2 if progress > 0.7 else 0.6 * min(1.0, max(0.0, (progress - 0.25) / 0.3))
        share_pages = 1.0 if progress < 0.4 else 0.5 if progress < 0.7 else 0.25
        pairs, words, letters, whole = [], [], [], []
        for _ in range(self.batch_size):
            style = len(STYLES) if rng.random() < share_random else rng.randrange(len(STYLES))
            colours = random_colours(rng) if style == len(STYLES) else list(STYLES.values())[style]
            moving = None
            if rng.random() < share_pages:
                placed, label = place_page(WORDS, rng), (IGNORE, IGNORE)
            else:
                phrase = rng.choice(PHRASES)
                (shown,) = rng.choices(SHOWN, [SHARES[s] for s in SHOWN])
                placed = place_lines(words_shown(phrase.words, shown), rng, test=False)
                label = (
                    FIRST_WORDS.index(phrase.first) if shown in ("first", "both") else len(FIRST_WORDS),
                    OBJECTS.index(phrase.object) if shown in ("object", "both") else len(OBJECTS),
                )
                moving = Shapes.draw(rng) if shown == "nothing" and rng.random() < 0.7 else None
            pairs.append(paint_pair(placed, colours, rng, moving))
            word, letter = patch_labels(placed)
            words.append(word)
            letters.append(letter)
            whole.append((*label, style))
        return {
            "pixels": to_pixels(np.stack(pairs)),
            "words": torch.from_numpy(np.stack(words))[:, MERGED],
            "letters": torch.from_numpy(np.stack(letters))[:, MERGED],
            **{key: torch.tensor([w[i] for w in whole]) for i, key in enumerate(("first", "object", "style"))},
        }


def to_pixels(pairs: np.ndarray) -> torch.Tensor:
    """uint8 [B, 2, SIDE, SIDE, 3] -> float32 [B, 3, 2, SIDE, SIDE] in -1..1, as the model's video processor does."""
    return torch.from_numpy(pairs).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


class ShownWords:
    """The micro world as clips (datamodules/micro_media.py)."""

    modality = "video"
    styles = tuple(STYLES)
    read = "Read the words in the video."
    sees_nothing = "I see nothing."
    local = (LocalLabel("words", len(WORDS) + 1, len(WORDS)), LocalLabel("letters", len(LETTERS), 0, 0.5))
    tasks = ("typo", "dm_typo")
    whole_prompt = ()

    def draw(self, words: Sequence[str], style: str, rng: random.Random, test: bool) -> np.ndarray:
        return draw_clip(words, style, rng, test)

    def draw_task(self, task: str, phrase: Phrase, style: str, rng: random.Random) -> np.ndarray:
        """TYPO: one word at a time; DM+TYPO: moving shapes, then the whole phrase."""
        return draw_clip(phrase.words, style, rng, True, "words" if task == "typo" else "phrase")

    def blanks(self, n: int) -> list[np.ndarray]:
        """Greys."""
        return [np.full((FRAMES, SIDE, SIDE, 3), int(grey), np.uint8) for grey in np.linspace(1, 255, n)]

    def tower_stream(self, batch_size: int, total_steps: int, seed: int) -> ClipPages:
        return ClipPages(batch_size, total_steps, seed)

    def tower_inputs(self, media: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        return {"pixels": to_pixels(np.stack(media))}


MEDIUM = ShownWords()
