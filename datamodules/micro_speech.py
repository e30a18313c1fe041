"""The micro world as speech: phrases spoken by espeak-ng in one of four manners, with noise, at any place of a clip.

    slow, quick    the speaker's tempo
    distant        a room's echo
    telephone      the band of a telephone line, 300 to 3400 Hz

Held out for tests: every test voice (speaker, and one accent) is in no training clip, nor are the test tempi.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.micro_world import N_FORMS, PHRASES, Phrase, question
from datamodules.speech import Speech, Utterance
from mllm.micro_qwen2_audio import RATE, SECONDS

TRAIN_VOICES: tuple[str, ...] = (
    "en", "en-us", "en+f3", "en-us+m1", "en-029", "en-gb-scotland", "en-gb-x-gbcwmd", "en-us-nyc", "en+f1", "en-us+f2",
    "en-us+f5", "en+m2", "en-us+m3", "en+m4", "en-us+m7", "en+klatt2", "en-us+klatt4", "en+Alicia",
    "en-us+Andy", "en+belinda", "en-us+david", "en+edward", "en-us+gustave", "en+ian", "en-us+marcelo", "en+michel",
    "en-us+steph", "en+travis", "en-us-nyc+f4", "en-gb-scotland+m8",
)  # fmt: skip
"""The first are the easiest to begin with."""
TEST_VOICES: tuple[str, ...] = ("en-gb-x-rp", "en+m5", "en-us+m6", "en-us+Annie", "en+linda", "en-us+john", "en+quincy")
STYLES = ("slow", "quick", "distant", "telephone")
TEMPI = {"slow": (90, 105), "quick": (230, 260)}  # words/minute, lowest and highest
NORMAL = (140, 180)
WORDINGS = ("{} {}", "{} the {}", "a {} {}")
"""How the two words of a phrase are said; said as a whole request it is one of its questions."""
SAMPLES = SECONDS * RATE
_PHRASE_OF: dict[tuple[str, ...], Phrase] = {phrase.words: phrase for phrase in PHRASES}


@dataclass(frozen=True)
class Setting:
    """Where and how an utterance is heard. lead: samples before it; pre_noise, noise: standard deviation of white noise
    in `lead` and everywhere; gain: factor."""

    lead: int
    pre_noise: float
    noise: float
    gain: float


def wording(words: Sequence[str], rng: random.Random, requests: float) -> str:
    """The two words of a phrase in one of `WORDINGS`, or, with probability `requests`, the whole request."""
    if rng.random() < requests:
        return question(_PHRASE_OF[tuple(words)], rng.randrange(N_FORMS)).rstrip(".?").lower()
    return rng.choice(WORDINGS).format(*words)


def utterance(text: str, style: str, rng: random.Random, voices: Sequence[str], test: bool = False) -> Utterance:
    """What is asked of espeak-ng: the text by one of the voices."""
    low, high = TEMPI.get(style, NORMAL)
    # Training has the tempi that five divides, tests those between.
    speed = rng.randrange(low, high + 1, 5) + (rng.choice((-2, 2)) if test else 0)
    return Utterance(text, rng.choice(voices), speed, rng.randint(30, 70))


def place(speech: Speech, rng: random.Random, samples: int) -> Setting:
    """A random setting in a clip of so many samples."""
    room = samples - len(speech.samples)
    if room < 0:
        raise ValueError(f"{speech.seconds:.2f} s of speech do not fit into {samples / RATE:.2f} s")
    noisy = rng.random() < 0.3
    return Setting(
        lead=rng.randint(0, room),
        pre_noise=10 ** rng.uniform(-2.5, -0.7) if noisy else 0.0,
        noise=10 ** rng.uniform(-4, -2),
        gain=10 ** rng.uniform(-0.5, 0.2),
    )


def record(speech: Speech, style: str, setting: Setting, rng: random.Random, samples: int) -> np.ndarray:
    """What the microphone hears: float32 [samples] in -1..1."""
    generator = np.random.default_rng(rng.getrandbits(32))
    clip = np.zeros(samples, np.float32)
    end = setting.lead + len(speech.samples)
    clip[setting.lead : end] = speech.samples * setting.gain
    if style == "distant":
        clip = echo(clip, generator)
    elif style == "telephone":
        clip = band(clip, 300, 3400)
    clip[: setting.lead] += setting.pre_noise * generator.standard_normal(setting.lead, np.float32)
    clip += setting.noise * generator.standard_normal(samples, np.float32)
    return clip.clip(-1, 1).astype(np.float32)


def echo(clip: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A room whose sound falls by 60 dB in 0.4 s, half as loud as the speaker: float32 [n] -> [n]."""
    n = round(0.4 * RATE)
    room = generator.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    room[: round(0.02 * RATE)] = 0  # the first wall is seven metres of way off
    room *= 0.7 / np.sqrt(np.square(room).sum())
    size = len(clip) + n
    reflected = np.fft.irfft(np.fft.rfft(clip, size) * np.fft.rfft(room, size), size)[: len(clip)]
    return (0.7 * clip + reflected).astype(np.float32)


def band(clip: np.ndarray, low: float, high: float) -> np.ndarray:
    """Frequencies from `low` to `high` (Hz) of a clip at `RATE`."""
    spectrum = np.fft.rfft(clip)
    frequency = np.fft.rfftfreq(len(clip), 1 / RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, len(clip)).astype(np.float32)
