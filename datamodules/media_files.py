"""One way to open a medium: a picture, a video, a recording or an array, under the same rules, with the same errors.

    clip = open_medium(Path("clip.wav"), MediaRules("audio", sample_rate=16000))
    model_input(clip)      # what the model's processor takes

In memory a medium is plain: a PIL image (RGB), a `VideoClip` (datamodules/video_files.py), an `AudioClip`
(datamodules/audio_files.py) or, for a modality that is none of these, an array (datamodules/array_files.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.array_files import decode_array
from datamodules.audio_files import AudioClip, decode_audio
from datamodules.pictures import decode
from datamodules.video_files import VideoClip, decode_video

Medium = Image.Image | VideoClip | AudioClip | np.ndarray

MAX_PIXELS = 89_478_485
"""Pillow's own limit for a picture; beyond it lies a decompression bomb."""


@dataclass(frozen=True)
class MediaRules:
    """What the model expects of a medium, and what is too much.

    Args:
        modality: what the file is opened as: image, video, audio, or any other word: a .npy file.
        size: width and height (px) that a picture or every frame is scaled to; None leaves it.
        frames, fps: video: how many frames are taken, or how many a second; None and None takes all.
        sample_rate: audio: Hz that the model expects; None takes what comes.
        resample: audio: bring another rate to it; else another rate is an error.
        shape: array: the first axis (channels) and the number of axes must be these; None takes any.
        samples: audio: silence is added at the end up to this length; None adds none.
        cut_seconds: audio: what comes later is cut off; None cuts nothing.
        max_seconds, max_pixels, max_megabytes: longest clip, largest frame, largest file and decoded clip.
    """

    modality: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    sample_rate: int | None = None
    resample: bool = False
    samples: int | None = None
    cut_seconds: float | None = None
    shape: tuple[int, ...] | None = None
    max_seconds: float = 120.0
    max_pixels: int = MAX_PIXELS
    max_megabytes: float = 1024.0


def open_medium(path: Path, rules: MediaRules) -> Medium:
    """The medium in a file. Raises ValueError that names the file: absent, too large, damaged or against the rules."""
    try:
        size = path.stat().st_size
        if size > rules.max_megabytes * 1e6:
            raise ValueError(
                f"{path}: {size / 1e6:.0f} MB, at most {rules.max_megabytes:g} are taken (media.max_megabytes)"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror})") from error
    return decode_medium(data, path, rules)


def decode_medium(data: bytes, name: Path, rules: MediaRules) -> Medium:
    """The same from the bytes of the file; `name` is for messages."""
    if rules.modality == "video":
        return decode_video(data, name, rules)
    if rules.modality == "audio":
        return _lengthened(_cut(decode_audio(data, name, rules), rules), name, rules)
    if rules.modality != "image":
        return decode_array(data, name, rules)
    try:
        image = decode(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; fetch the file again") from error
    if image.width * image.height > rules.max_pixels:
        raise ValueError(f"{name}: {image.width} x {image.height} px, at most {rules.max_pixels} pixels are taken")
    return image.resize(rules.size, Image.Resampling.BICUBIC) if rules.size else image


def model_input(medium: Medium) -> Image.Image | np.ndarray:
    """What a processor takes: the image, frames uint8 [T, H, W, 3], samples float32 [N], or the array."""
    if isinstance(medium, VideoClip):
        return medium.frames
    return medium.samples if isinstance(medium, AudioClip) else medium


def described(medium: Medium) -> str:
    """Its size in words, for messages."""
    if isinstance(medium, VideoClip):
        t, h, w, _ = medium.frames.shape
        return f"{t} frames of {w} x {h} px"
    if isinstance(medium, AudioClip):
        return f"{medium.seconds:.2f} s at {medium.sample_rate} Hz"
    if isinstance(medium, np.ndarray):
        return f"{medium.dtype} of shape {medium.shape}"
    return f"{medium.width} x {medium.height} px"


def _cut(clip: AudioClip, rules: MediaRules) -> AudioClip:
    if rules.cut_seconds is None:
        return clip
    return AudioClip(clip.samples[: round(rules.cut_seconds * clip.sample_rate)], clip.sample_rate)


def _lengthened(clip: AudioClip, name: Path, rules: MediaRules) -> AudioClip:
    if rules.samples is None or len(clip.samples) == rules.samples:
        return clip
    if len(clip.samples) > rules.samples:
        raise ValueError(
            f"{name}: {clip.seconds:.2f} s, the model's blank has {rules.samples / clip.sample_rate:.2f} s; cut it, "
            "or set media.cut=true"
        )
    return AudioClip(np.pad(clip.samples, (0, rules.samples - len(clip.samples))), clip.sample_rate)
