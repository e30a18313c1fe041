"""Small media for tests: clips of plain colours and recordings of a tone, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.audio_files import AudioClip, encode_audio
from datamodules.video_files import encode_video


def colours(n: int, size: tuple[int, int] = (32, 16)) -> np.ndarray:
    """n grey frames, uint8 [n, H, W, 3], each of another level, dark to light."""
    levels = np.linspace(20, 235, n).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, size[1], size[0], 3)).copy()


def video(path: Path, frames: np.ndarray, fps: int = 10) -> Path:
    path.write_bytes(encode_video(frames, fps))
    return path


def tone(seconds: float = 1.0, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    """float32 [seconds * rate]"""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def audio(path: Path, samples: np.ndarray | None = None, rate: int = 16000) -> Path:
    path.write_bytes(encode_audio(AudioClip(tone(rate=rate) if samples is None else samples, rate), path.suffix))
    return path


def levels(frames: np.ndarray) -> Sequence[int]:
    """The mean grey of every frame."""
    return [round(float(v)) for v in frames.mean(axis=(1, 2, 3))]
