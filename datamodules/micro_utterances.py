"""The micro world as speech: clips with a label for every frame, for the tower to be pretrained on.

The label of a frame (40 ms): the word that is spoken then (`len(WORDS)`: none). A clip is a row of words in any order,
a phrase, or nothing but noise; phrases, which alone have a caption, begin when words are known, at 35 % of training.
Four voices, one manner and clean features make the start; the other voices, manners and disturbances come over the
first quarter: with all of them at once words were not learned in 330 steps. Clips are short for 65 % of the training,
which costs half; then full, and two in five of those end soon after the speech, as clips from outside do. Features are
masked and their frequencies warped at random (SpecAugment, arXiv 1904.08779; vocal tract length perturbation), so that
voices never heard are understood.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from datamodules.micro_media import IGNORE, LocalLabel
from datamodules.micro_speech import (
    RATE,
    SAMPLES,
    STYLES,
    TEST_VOICES,
    TRAIN_VOICES,
    place,
    record,
    utterance,
    wording,
)
from datamodules.micro_stream import Batch, Stream
from datamodules.micro_world import FIRST_WORDS, OBJECTS, PHRASES, WORDS, Phrase
from datamodules.speech import Speech, Utterance, synthesize, synthesize_all
from mllm.micro_qwen2_audio import FRAMES, HOP, MELS, feature_extractor

SHORT = 144  # mel frames: 2.9 s, room for any phrase
SHORT_SHARE, WORDS_SHARE, EASY_SHARE = 0.65, 0.35, 0.25  # of all steps: short clips, rows of words alone, easing in
REQUESTS = 0.3  # of the phrases of full clips: said as a whole request
NOISE = 0.1  # of kpt_noise, its standard deviation: as `build.noise_level`
FRAME = 2 * HOP  # samples under one position of the tower before its last layer
NORMAL_STYLE = "normal"  # no style of the micro world

extractor = functools.cache(feature_extractor)


def frame_labels(speech: Speech, lead: int, positions: int) -> np.ndarray:
    """Word label of every position, int64 [positions]."""
    labels = np.full(positions, len(WORDS))
    centre = (np.arange(positions) + 0.5) * FRAME / RATE - lead / RATE  # s from the first sample of speech
    for word in speech.words:
        if word.text in WORDS:  # not "the" and "a"
            labels[(centre >= word.start) & (centre < word.end)] = WORDS.index(word.text)
    return labels


def features_of(clips: Sequence[np.ndarray], frames: int = FRAMES) -> Batch:
    """What the tower is fed: features [B, MELS, frames], lengths [B] (mel frames that are heard)."""
    fe: WhisperFeatureExtractor = extractor()
    made = fe(
        list(clips),
        sampling_rate=RATE,
        return_attention_mask=True,
        return_tensors="pt",
        padding="max_length",
        max_length=frames * HOP,
    )
    return {"features": made["input_features"], "lengths": made["attention_mask"].sum(-1)}


def disturbed(features: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """One clip's features, [MELS, frames], with a band and a stretch of time blanked and its frequencies warped."""
    out = features.clone()
    if rng.random() < 0.5:
        scale = rng.uniform(0.88, 1.14)
        at = (torch.arange(MELS) * scale).clamp(max=MELS - 1)
        low = at.floor().long()
        part = (at - low)[:, None]
        out = out[low] * (1 - part) + out[(low + 1).clamp(max=MELS - 1)] * part
    floor = float(out.min())
    if rng.random() < 0.5:
        band = rng.randrange(MELS - 8)
        out[band : band + rng.randint(1, 8)] = floor
    if rng.random() < 0.5:
        start = rng.randrange(out.shape[1])
        out[:, start : start + rng.randint(1, 5)] = floor
    return out


class Utterances(Stream):
    """A seeded stream of batches (datamodules/micro_media.py says what is in one)."""

    def batch(self, step: int) -> Batch:
        rng, progress = random.Random(f"{self.seed}-{step}"), step / self.total_steps
        ease, full = min(1.0, progress / EASY_SHARE), progress >= SHORT_SHARE
        frames = FRAMES if full else SHORT
        voices = TRAIN_VOICES[: max(4, round(ease * len(TRAIN_VOICES)))]
        wholes, styles, asked = [], [], []
        for _ in range(self.batch_size):
            style = rng.choice(STYLES) if rng.random() < 0.8 * ease else NORMAL_STYLE
            whole, said = draw_utterance(rng, style, voices, frames * HOP, progress >= WORDS_SHARE)
            wholes.append(whole)
            styles.append(STYLES.index(style) if style in STYLES and said is not None else len(STYLES))
            asked.append(said)
        spoken = iter(synthesize_all([said for said in asked if said is not None], RATE))
        clips, labels = [], []
        for said, number in zip(asked, styles, strict=True):
            speech = (
                Speech(np.zeros(0, np.float32), RATE, ()) if said is None else whole_words(next(spoken), frames * HOP)
            )
            setting = place(speech, rng, frames * HOP)
            name = STYLES[number] if number < len(STYLES) else NORMAL_STYLE
            clip = record(speech, name, setting, rng, frames * HOP)
            if full and said is not None and rng.random() < 0.4:
                clip = clip[: setting.lead + len(speech.samples) + rng.randint(0, RATE // 3)]
            clips.append(clip)
            labels.append(frame_labels(speech, setting.lead, frames // 2))
        made = features_of(clips, frames)
        return {
            "features": torch.stack([disturbed(f, rng) if rng.random() < ease else f for f in made["features"]]),
            "lengths": made["lengths"],
            "words": torch.from_numpy(np.stack(labels)),
            "first": torch.tensor([first for first, _ in wholes]),
            "object": torch.tensor([thing for _, thing in wholes]),
            "style": torch.tensor(styles),
        }


def draw_utterance(
    rng: random.Random, style: str, voices: Sequence[str], samples: int, phrases: bool
) -> tuple[tuple[int, int], Utterance | None]:
    """((first, object) of the whole clip, what is said): nothing, a row of words, or a phrase."""
    kind = rng.random()
    if kind < 0.04:
        return (len(FIRST_WORDS), len(OBJECTS)), None
    if phrases and kind < 0.74:
        phrase = rng.choice(PHRASES)
        # A whole request has no room in a short clip.
        said = utterance(wording(phrase.words, rng, 0.0 if samples < SAMPLES else REQUESTS), style, rng, voices)
        return (FIRST_WORDS.index(phrase.first), OBJECTS.index(phrase.object)), said
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 4 if samples < SAMPLES else 7))]
    return (IGNORE, IGNORE), utterance(" ".join(words), style, rng, voices)


def whole_words(speech: Speech, samples: int) -> Speech:
    """As many of its words as fit into the clip whole: a row of words may be longer."""
    if len(speech.samples) <= samples:
        return speech
    words = tuple(w for w in speech.words if w.end * RATE <= samples)
    return Speech(speech.samples[: round(words[-1].end * RATE)], RATE, words)


def spoken(text: str, style: str, rng: random.Random, test: bool) -> Speech:
    """By one of the voices of training or of the tests."""
    said = utterance(text, style, rng, TEST_VOICES if test else TRAIN_VOICES, test)
    return synthesize(said.text, said.voice, said.speed, said.pitch, RATE)


class SpokenWords:
    """The micro world as speech (datamodules/micro_media.py)."""

    modality = "audio"
    styles = STYLES
    read = "Repeat the words in the audio."
    sees_nothing = "I hear nothing."
    local = (LocalLabel("words", len(WORDS) + 1, len(WORDS), 2.0),)
    tasks = ("audio_only", "kpt", "kpt_noise")
    whole_prompt = ("audio_only",)

    def draw(self, words: Sequence[str], style: str, rng: random.Random, test: bool) -> np.ndarray:
        """A full clip: its features fill the place of a blank's."""
        speech = spoken(wording(words, rng, 0.0 if test else REQUESTS), style, rng, test)
        return record(speech, style, place(speech, rng, SAMPLES), rng, SAMPLES)

    def draw_task(self, task: str, phrase: Phrase, style: str, rng: random.Random) -> np.ndarray:
        """The request; the phrase; the phrase after 3 s of white noise, or as much as there is room for."""
        said = wording(phrase.words, rng, 1.0) if task == "audio_only" else phrase.text
        speech = spoken(said, style, rng, test=True)
        setting = place(speech, rng, SAMPLES)
        lead = min(3 * RATE, SAMPLES - len(speech.samples)) if task == "kpt_noise" else 0
        return record(speech, style, replace(setting, lead=lead, pre_noise=NOISE), rng, SAMPLES)

    def blanks(self, n: int) -> list[np.ndarray]:
        """Silence, then ever louder noise."""
        noise = np.random.default_rng(0).standard_normal((n, SAMPLES), np.float32)
        levels = [0.0, *np.logspace(-4, -1, n - 1)]
        return [(level * each).clip(-1, 1).astype(np.float32) for level, each in zip(levels, noise, strict=True)]

    def tower_stream(self, batch_size: int, total_steps: int, seed: int) -> Utterances:
        return Utterances(batch_size, total_steps, seed)

    def tower_inputs(self, media: Sequence[np.ndarray]) -> Batch:
        return features_of(media)


MEDIUM = SpokenWords()
