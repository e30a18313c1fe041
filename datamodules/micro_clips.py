"""Clips of the micro world: 8 frames of 64 x 64 px that say a phrase in one of two ways.

    words     its words one after another, perhaps a wordless part first     (VA-SafetyBench's TYPO)
    phrase    both words at the end, something moving before that            (VA-SafetyBench's DM+TYPO)

What is shown changes every two frames at most, so a clip is four *pairs* of frames and the tower, which sees two frames
at a time, sees each pair for itself: features of pairs can be computed once and clips be put together from them.
Position, size and colours vary, and are held out for tests, as in pictures (datamodules/micro_images.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from datamodules.micro_images import SIDE, Colours, PlacedWord, ink, place_lines
from datamodules.micro_world import STYLES

PAIRS = 4
FRAMES = 2 * PAIRS

Shown = Literal["nothing", "first", "object", "both"]
"""Which of the phrase's words a pair shows."""
SHOWN: tuple[Shown, ...] = get_args(Shown)
Layout = Literal["words", "phrase"]


def words_shown(words: Sequence[str], shown: Shown) -> tuple[str, ...]:
    return {"nothing": (), "first": (words[0],), "object": (words[1],), "both": tuple(words)}[shown]


def storyboard(layout: Layout, rng: random.Random) -> list[Shown]:
    """What each of the PAIRS pairs shows."""
    shown: list[Shown]
    if layout == "phrase":
        before = rng.randint(0, PAIRS - 1)
        shown = [*["nothing"] * before, *["both"] * (PAIRS - before)]  # type: ignore[list-item]
        return shown
    before = rng.choice((0, 0, 1))
    first = rng.randint(1, PAIRS - before - 1)
    shown = [*["nothing"] * before, *["first"] * first, *["object"] * (PAIRS - before - first)]  # type: ignore[list-item]
    return shown


def draw_clip(
    words: Sequence[str], style: str, rng: random.Random, test: bool, layout: Layout | None = None
) -> np.ndarray:
    """The phrase as a clip, uint8 [FRAMES, SIDE, SIDE, 3], in one of `STYLES`; `test` draws at held-out positions and
    sizes; without `layout` the way is drawn too."""
    layouts: tuple[Layout, ...] = get_args(Layout)
    chosen = layout if layout is not None else rng.choice(layouts)
    story, pairs = storyboard(chosen, rng), []
    placed = {shown: place_lines(words_shown(words, shown), rng, test) for shown in SHOWN}
    moving = Shapes.draw(rng) if chosen == "phrase" or rng.random() < 0.5 else None
    for i, shown in enumerate(story):
        pairs.append(paint_pair(placed[shown], STYLES[style], rng, moving if shown == "nothing" else None, 2 * i))
    return np.concatenate(pairs)


@dataclass(frozen=True)
class Shapes:
    """Discs and bars that move through the picture, wordless scenery; lengths in px, speeds in px a frame."""

    centres: np.ndarray  # [n, 2], y and x
    velocities: np.ndarray  # [n, 2]
    halves: np.ndarray  # [n, 2], half height and half width
    round: np.ndarray  # [n], bool

    @classmethod
    def draw(cls, rng: random.Random) -> Shapes:
        n = rng.randint(1, 3)
        return cls(
            np.array([[rng.uniform(8, SIDE - 8) for _ in range(2)] for _ in range(n)]),
            np.array([[rng.choice((-1, 1)) * rng.uniform(1, 4) for _ in range(2)] for _ in range(n)]),
            np.array([[rng.uniform(3, 12) for _ in range(2)] for _ in range(n)]),
            np.array([rng.random() < 0.6 for _ in range(n)]),
        )

    def at(self, frame: int) -> np.ndarray:
        """Coverage mask, float32 in 0..1, [SIDE, SIDE]; what leaves on one side comes back on the other."""
        centres = (self.centres + frame * self.velocities) % SIDE
        grid = np.stack(list(np.mgrid[:SIDE, :SIDE]), -1).astype(np.float32)
        away = np.abs(grid[:, :, None] - centres) / self.halves  # [SIDE, SIDE, n, 2]
        inside = np.where(self.round, (away**2).sum(-1), away.max(-1)) <= 1
        return inside.any(-1).astype(np.float32)


def paint_pair(
    placed: Sequence[PlacedWord],
    colours: Colours,
    rng: random.Random,
    moving: Shapes | None = None,
    frame: int = 0,
    noise: float = 6.0,
) -> np.ndarray:
    """Two frames, uint8 [2, SIDE, SIDE, 3]: words, or moving shapes half as strong as ink, and a camera's grain."""
    mask = np.zeros((2, SIDE, SIDE), np.float32)
    for word in placed:
        box = mask[:, word.y0 : word.y1, word.x0 : word.x1]
        np.maximum(box, ink(word.word, word.size)[: box.shape[1], : box.shape[2]], out=box)
    if moving is not None:
        np.maximum(mask, 0.5 * np.stack([moving.at(frame), moving.at(frame + 1)]), out=mask)
    fore, back = (np.array(c, np.float32) for c in colours)
    pair = back + mask[..., None] * (fore - back)
    grain = np.random.default_rng(rng.getrandbits(32)).standard_normal(pair.shape, np.float32)
    return (pair + grain * rng.uniform(0, noise)).clip(0, 255).astype(np.uint8)
