"""Audio files to samples and back, through libsndfile (soundfile) and the resampler soxr.

What the header promises is bounded before anything is read: neither years of sound nor a thousand channels cost memory.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datamodules.media_files import MediaRules

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG", "AIFF")
"""What is opened; libsndfile knows two dozen more, whose readers are little tested."""
MAX_RATE, MAX_CHANNELS = 384_000, 64
SHORTEST = 0.05
"""Seconds. Feature extractors make no token at all of less (0.04 s and below), and say nothing."""


@dataclass(frozen=True)
class AudioClip:
    """Samples float32 [N] in -1..1 (one channel), and how many of them make a second (Hz)."""

    samples: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate


def decode_audio(data: bytes, name: Path, rules: MediaRules) -> AudioClip:
    """The mean of the channels, at `rules.sample_rate` (None: the file's own).

    Raises:
        ValueError: names the file; it is no audio, damaged, empty, too long, or of another rate than is expected while
            `rules.resample` is off.
    """
    sf = _soundfile()
    try:
        with sf.SoundFile(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                raise _Refused(f"is {file.format}, expected one of {', '.join(FORMATS)}: convert it")
            _check(file, rules)
            samples = _read(file)
            rate = int(file.samplerate)
    except _Refused as refusal:
        raise ValueError(f"{name}: {refusal}") from None
    except (sf.LibsndfileError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read as audio ({_reason(error)}); fetch the file again") from error
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are no numbers; expected values in -1..1: make it again")
    if len(samples) < SHORTEST * rate:
        raise ValueError(f"{name}: {len(samples)} samples, {len(samples) / rate:.3f} s; expected {SHORTEST} s or more")
    clip = AudioClip(samples, rate)
    if rules.sample_rate is None or rate == rules.sample_rate:
        return clip
    if not rules.resample:
        raise ValueError(f"{name}: {rate} Hz, the model expects {rules.sample_rate}; set media.resample=true")
    return resampled(clip, rules.sample_rate)


def encode_audio(clip: AudioClip, suffix: str) -> bytes:
    """A file of the kind that its suffix says: .wav (16 bit), .flac, .mp3 or .ogg. Raises ValueError for others."""
    kinds = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".mp3": ("MP3", None), ".ogg": ("OGG", "VORBIS")}
    if suffix not in kinds:
        raise ValueError(f"audio files {suffix}: expected one of {', '.join(kinds)}")
    kind, subtype = kinds[suffix]
    buffer = io.BytesIO()
    _soundfile().write(buffer, np.clip(clip.samples, -1, 1), clip.sample_rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def resampled(clip: AudioClip, sample_rate: int) -> AudioClip:
    """The same sound at another rate (soxr, high quality)."""
    if clip.sample_rate == sample_rate:
        return clip
    try:
        import soxr
    except ImportError as error:
        raise ValueError("resampling needs soxr: pip install seawall[media]") from error
    samples = soxr.resample(clip.samples, clip.sample_rate, sample_rate, quality="HQ")
    return AudioClip(np.asarray(samples, dtype=np.float32), sample_rate)


class _Refused(Exception):
    """What a file is told apart from what libsndfile says about it."""


def _check(file: Any, rules: MediaRules) -> None:
    if not 1000 <= file.samplerate <= MAX_RATE or file.channels > MAX_CHANNELS:
        raise _Refused(
            f"{file.channels} channels at {file.samplerate} Hz, expected at most {MAX_CHANNELS} at 1000 to "
            f"{MAX_RATE} Hz"
        )
    if (seconds := file.frames / file.samplerate) > rules.max_seconds:
        raise _Refused(
            f"{seconds:.1f} s long, at most {rules.max_seconds:g} are taken; cut it (media.max_seconds, "
            "model.max_seconds), or set media.cut=true"
        )
    if (size := 4e-6 * file.frames * file.channels) > rules.max_megabytes:
        raise _Refused(f"{file.channels} channels of {file.frames} samples take {size:.0f} MB; mix it down first")
    # libsndfile reads a WAV file that is cut short up to its end and says so only here.
    for line in file.extra_info.splitlines():
        if line.split(":")[0].strip() == "data" and "should be" in line:
            raise _Refused("it is cut short (its header promises more samples than it has): fetch the file again")


def _read(file: Any) -> np.ndarray:
    """float32 [N], the mean of the channels. In one piece: soundfile seeks after every block, and MP3 cannot."""
    samples = file.read(dtype="float32", always_2d=True)
    # A lossy format may differ by a part of its last block; a hole of a tenth of a second is damage.
    if len(samples) < file.frames - 0.1 * file.samplerate:
        raise _Refused(
            f"only {len(samples)} of its {file.frames} samples can be decoded; it is cut short: fetch the file again"
        )
    return np.asarray(samples.mean(axis=1))


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("audio files need soundfile: pip install seawall[media]") from error
    return soundfile
