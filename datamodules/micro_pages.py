"""The micro world as images: pages of random words with a label for every patch, for the tower to be pretrained on.

Labels of a patch: the word whose ink covers it (`len(WORDS)` = background, -100 = too little ink to say) and the
letter at its centre (0 = background). Random colours are ramped in. From 40 % of training on, half of the pages are
two-word pictures (a few of them blank), which also have labels for the whole picture: the first word and the object.
Supervising every patch instead of the pooled image is what makes full position jitter learnable from the first step.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from datamodules.micro_images import (
    SIDE,
    PlacedWord,
    draw,
    letter_ends,
    paint,
    place_lines,
    place_page,
    random_colours,
)
from datamodules.micro_media import IGNORE, LocalLabel
from datamodules.micro_stream import Batch, Stream
from datamodules.micro_world import FIRST_WORDS, OBJECTS, PHRASES, STYLES, WORDS, Phrase

PATCH = 8  # px
GRID = SIDE // PATCH
LETTERS = " " + string.ascii_lowercase


def patch_labels(placed: list[PlacedWord]) -> tuple[np.ndarray, np.ndarray]:
    """Word and letter label of every patch, each int64 [GRID * GRID] in row-major order."""
    words, letters = np.full((GRID, GRID), len(WORDS)), np.zeros((GRID, GRID), int)
    edge = np.arange(GRID) * PATCH
    for w in placed:
        rows = np.minimum(w.y1, edge + PATCH) - np.maximum(w.y0, edge)  # px of overlap
        cols = np.minimum(w.x1, edge + PATCH) - np.maximum(w.x0, edge)
        touched = (rows > 0)[:, None] & (cols > 0)[None] & (words == len(WORDS))
        covered = (rows >= 4)[:, None] & (cols >= 3)[None]
        centre = np.searchsorted(letter_ends(w.word, w.size), edge + PATCH / 2 - w.x0)
        letter = np.array([LETTERS.index(w.word[min(max(i, 0), len(w.word) - 1)]) for i in centre])
        words[touched], letters[touched] = IGNORE, IGNORE
        words[covered] = WORDS.index(w.word)
        letters[covered] = np.broadcast_to(letter[None], (GRID, GRID))[covered]
    return words.ravel(), letters.ravel()


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 pages -> float32 [B, 3, SIDE, SIDE] in -1..1, as the model's image processor does."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Pages(Stream):
    """A seeded stream of batches: pixels, words and letters (a label a patch), and for the whole picture first, object
    (last class: nothing is written; IGNORE: not a two-word picture) and style (last class: other colours).
    """

    def batch(self, step: int) -> Batch:
        rng, progress = random.Random(f"{self.seed}-{step}"), step / self.total_steps
        share_random = 0.6 * min(1.0, max(0.0, (progress - 0.25) / 0.3))
        images, words, letters, whole = [], [], [], []
        for _ in range(self.batch_size):
            style = len(STYLES) if rng.random() < share_random else rng.randrange(len(STYLES))
            pair = random_colours(rng) if style == len(STYLES) else list(STYLES.values())[style]
            if progress < 0.4 or rng.random() < 0.5:
                placed, label = place_page(WORDS, rng), (IGNORE, IGNORE)
            elif rng.random() < 0.04:
                placed, label = [], (len(FIRST_WORDS), len(OBJECTS))
            else:
                phrase = rng.choice(PHRASES)
                placed = place_lines(phrase.words, rng, test=False)
                label = (FIRST_WORDS.index(phrase.first), OBJECTS.index(phrase.object))
            images.append(paint(placed, pair, rng))
            word, letter = patch_labels(placed)
            words.append(word)
            letters.append(letter)
            whole.append((*label, style))
        return {
            "pixels": to_pixels(images),
            "words": torch.from_numpy(np.stack(words)),
            "letters": torch.from_numpy(np.stack(letters)),
            **{key: torch.tensor([w[i] for w in whole]) for i, key in enumerate(("first", "object", "style"))},
        }


class DrawnWords:
    """The micro world as images (datamodules/micro_media.py)."""

    modality = "image"
    styles = tuple(STYLES)
    read = "Read the words in the image."
    sees_nothing = "I see nothing."
    local = (LocalLabel("words", len(WORDS) + 1, len(WORDS)), LocalLabel("letters", len(LETTERS), 0, 0.5))
    tasks = ("typo",)
    whole_prompt = ()

    def draw(self, words: Sequence[str], style: str, rng: random.Random, test: bool) -> Image.Image:
        return draw(words, style, rng, test)

    def draw_task(self, task: str, phrase: Phrase, style: str, rng: random.Random) -> Image.Image:
        """MM-SafetyBench's TYPO is what every image of this world is."""
        return draw(phrase.words, style, rng, test=True)

    def blanks(self, n: int) -> list[Image.Image]:
        """Greys."""
        return [Image.fromarray(np.full((SIDE, SIDE, 3), int(g), np.uint8)) for g in np.linspace(1, 255, n)]

    def tower_stream(self, batch_size: int, total_steps: int, seed: int) -> Pages:
        return Pages(batch_size, total_steps, seed)

    def tower_inputs(self, media: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        return {"pixels": to_pixels([np.asarray(image) for image in media])}


MEDIUM = DrawnWords()
