"""The micro world as motion: each word is a gesture of the hand that a six-channel sensor on the wrist records.

A gesture is a fixed curve in all channels, 0.9 s long: a sum of four sines a channel, drawn once for each word, that
rises from rest and returns to it. A phrase is two gestures, one after the other. Every recording is of another wearer,
who moves more or less strongly and quickly and wears the sensor tilted; those of the tests move and tilt as none of the
training does.

    smooth     the gesture alone
    shaky      a tremor of 10 to 12 Hz over all of it
    jerky      the hand moves in steps: each value is held for four samples
    swaying    the body sways slowly (0.5 to 0.8 Hz)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datamodules.micro_media import IGNORE, LocalLabel
from datamodules.micro_stream import Batch, Stream
from datamodules.micro_world import FIRST_WORDS, OBJECTS, PHRASES, WORDS

from .encoder import STRIDE

RATE, SAMPLES, CHANNELS, GESTURE = 50, 128, 6, 44  # Hz, samples, channels, samples of a gesture at tempo 1
STYLES = ("smooth", "shaky", "jerky", "swaying")
SINES = 4
_random = np.random.default_rng(0)
CURVES = _random.standard_normal((len(WORDS), CHANNELS, 2 * SINES))
"""Weights of sines and cosines with 1 to 4 periods a gesture."""
Range = tuple[float, float]


@dataclass(frozen=True)
class Wearer:
    """strength: factor on all channels; tempo: 1 takes `GESTURE` samples; tilt: of the sensor, rotation [3, 3]; noise:
    standard deviation of the sensor's white noise, where a gesture's root mean square is about 1."""

    strength: float
    tempo: float
    tilt: np.ndarray
    noise: float


def wearer(rng: random.Random, test: bool) -> Wearer:
    """A wearer of the training, or one of the tests: outside of all ranges of the training."""

    def either(inner: Range, low: Range, high: Range) -> float:
        return rng.uniform(*(rng.choice((low, high)) if test else inner))

    strength = either((0.8, 1.25), (0.65, 0.8), (1.25, 1.5))
    tempo = either((0.85, 1.15), (0.78, 0.85), (1.15, 1.25))
    angle = np.radians(rng.uniform(20, 30) if test else rng.uniform(0, 20))
    return Wearer(strength, tempo, rotation(rng, angle), rng.uniform(0.1, 0.2) if test else rng.uniform(0.02, 0.15))


def rotation(rng: random.Random, angle: float) -> np.ndarray:
    """About a random axis by `angle` (radians): Rodrigues' formula."""
    axis = np.array([rng.gauss(0, 1) for _ in range(3)])
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def gesture(word: str, samples: int) -> np.ndarray:
    """[CHANNELS, samples]."""
    at = (np.arange(samples) + 0.5) / samples
    phase = 2 * np.pi * at[None] * np.arange(1, SINES + 1)[:, None]
    basis = np.concatenate([np.sin(phase), np.cos(phase)]) * np.sin(np.pi * at)
    return CURVES[WORDS.index(word)] @ basis / SINES**0.5


def record(
    words: Sequence[str], style: str | None, rng: random.Random, test: bool
) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """The recording, float32 [CHANNELS, SAMPLES], and each word with its first sample and the one after its last."""
    who, noise = wearer(rng, test), np.random.default_rng(rng.getrandbits(40))
    length = round(GESTURE / who.tempo)
    gaps = [0] * (len(words) + 1)
    for _ in range(SAMPLES - length * len(words)):  # the rest is shared out at random before, between and after
        gaps[rng.randrange(len(gaps))] += 1
    out, placed, at = np.zeros((CHANNELS, SAMPLES)), [], 0
    for word, gap in zip(words, gaps, strict=False):
        at += gap
        out[:, at : at + length] = who.strength * gesture(word, length)
        placed.append((word, at, at + length))
        at += length
    time = np.arange(SAMPLES) / RATE
    if style == "shaky":
        out += 0.6 * _waves(noise, time, rng.uniform(10, 12))
    elif style == "swaying":
        out += 0.8 * _waves(noise, time, rng.uniform(0.5, 0.8))
    elif style == "jerky":
        out = np.repeat(out[:, ::4], 4, axis=1)
    out = np.concatenate([who.tilt @ out[:3], who.tilt @ out[3:]]) + who.noise * noise.standard_normal(out.shape)
    return out.astype(np.float32), placed


def _waves(noise: np.random.Generator, time: np.ndarray, hertz: float) -> np.ndarray:
    """One sine of root mean square 1 in every channel, at random phases."""
    return np.sqrt(2) * np.sin(2 * np.pi * (hertz * time[None] + noise.random((CHANNELS, 1))))


class Gestures(Stream):
    """A seeded stream of batches (datamodules/micro_media.py says what is in one): three in four are phrases, the
    others two gestures in any order; one in 25 shows nothing."""

    def batch(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}-{step}")
        motion, words, whole = [], [], []
        for _ in range(self.batch_size):
            style = rng.randrange(len(STYLES))
            if rng.random() < 0.04:
                shown, label = [], (len(FIRST_WORDS), len(OBJECTS))
            elif rng.random() < 0.75:
                phrase = rng.choice(PHRASES)
                shown, label = list(phrase.words), (FIRST_WORDS.index(phrase.first), OBJECTS.index(phrase.object))
            else:
                shown, label = [rng.choice(WORDS), rng.choice(WORDS)], (IGNORE, IGNORE)
            made, placed = record(shown, STYLES[style], rng, test=False)
            motion.append(made)
            words.append(position_labels(placed))
            whole.append((*label, style))
        return {
            "motion": torch.from_numpy(np.stack(motion)),
            "words": torch.from_numpy(np.stack(words)),
            **{key: torch.tensor([w[i] for w in whole]) for i, key in enumerate(("first", "object", "style"))},
        }


def position_labels(placed: Sequence[tuple[str, int, int]]) -> np.ndarray:
    """The word at each of the encoder's positions, int64 [SAMPLES / STRIDE]; `len(WORDS)`: at rest."""
    labels = np.full(SAMPLES // STRIDE, len(WORDS))
    centre = (np.arange(len(labels)) + 0.5) * STRIDE
    for word, begin, end in placed:
        labels[(centre >= begin) & (centre < end)] = WORDS.index(word)
    return labels


class Motion:
    """The micro world as motion (datamodules/micro_media.py)."""

    modality = "motion"
    styles = STYLES
    read = "Read the words in the motion."
    sees_nothing = "I see nothing."
    local = (LocalLabel("words", len(WORDS) + 1, len(WORDS)),)
    tasks = ()
    whole_prompt = ()

    def draw(self, words: Sequence[str], style: str, rng: random.Random, test: bool) -> np.ndarray:
        return record(words, style, rng, test)[0]

    def blanks(self, n: int) -> list[np.ndarray]:
        """Rest, then ever louder noise of the sensor."""
        noise = np.random.default_rng(0).standard_normal((n, CHANNELS, SAMPLES))
        levels = np.linspace(0, 0.2, n)
        return [(level * each).astype(np.float32) for level, each in zip(levels, noise, strict=True)]

    def tower_stream(self, batch_size: int, total_steps: int, seed: int) -> Gestures:
        return Gestures(batch_size, total_steps, seed)

    def tower_inputs(self, media: Sequence[np.ndarray]) -> Batch:
        return {"motion": torch.from_numpy(np.stack(media))}


MEDIUM = Motion()
