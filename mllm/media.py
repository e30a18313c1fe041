"""What a medium of each modality is in memory, and how a processor takes it. Nothing else has to know.

    image   a PIL image
    video   its frames, uint8 [n, height, width, 3] (RGB)
    audio   float32 [n] in -1..1, mono, at the rate of the processor's feature extractor (Hz)
    other   float32 of as many axes as `model.blank_shape`, channels first; the processor takes a list of them under the
            modality's own name

The blank of a modality is what E starts from (SEA, arXiv 2502.12562): a grey image, a grey clip, silence, a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from configs.schema import MODALITIES, Model

MEDIA_ARGUMENT = {"image": "images", "video": "videos"}  # modality -> processor argument, where the names differ
MIN_SECONDS = 0.1
"""Of a clip shorter than 0.02 to 0.04 s some families make no token at all, and say nothing."""


def blank_medium(spec: Model, processor: ProcessorMixin) -> Any:
    """What E starts from."""
    width, height = spec.blank_size
    if spec.modality == "image":
        return Image.new("RGB", (width, height), (spec.blank_value,) * 3)
    if spec.modality == "audio":
        return np.zeros(round(spec.blank_seconds * sampling_rate(processor)), np.float32)
    if spec.modality == "video":
        return np.full((spec.blank_frames, height, width, 3), spec.blank_value, np.uint8)
    return np.full(spec.blank_shape, spec.blank_level, np.float32)


def sampling_rate(processor: ProcessorMixin) -> int:
    """What an audio model hears (Hz)."""
    return int(processor.feature_extractor.sampling_rate)


def media_arguments(spec: Model, processor: ProcessorMixin, media: Sequence[Any]) -> dict[str, Any]:
    """The processor's keyword arguments for these media.

    Raises:
        ValueError: an audio clip is no mono waveform, too short, or longer than `model.max_seconds`; a video is no
            array of frames; a medium of another modality is no array like the blank.
    """
    arguments: dict[str, Any] = {MEDIA_ARGUMENT.get(spec.modality, spec.modality): list(media)}
    if spec.modality == "audio":
        arguments["sampling_rate"] = sampling_rate(processor)
        for number, clip in enumerate(media):
            check_clip(clip, arguments["sampling_rate"], spec.max_seconds, f"clip {number + 1} of {len(media)}")
        shortest = round((spec.pad_seconds or 0) * arguments["sampling_rate"])
        arguments["audio"] = [np.pad(clip, (0, max(0, shortest - len(clip)))) for clip in media]
    if spec.modality == "video":
        for number, frames in enumerate(media):
            check_frames(frames, f"video {number + 1} of {len(media)}")
    if spec.modality not in MODALITIES:
        for number, array in enumerate(media):
            check_array(array, spec.blank_shape, f"{spec.modality} {number + 1} of {len(media)}")
    return arguments


def check_array(array: Any, blank_shape: Sequence[int], name: str) -> None:
    """Raises ValueError, naming the medium, unless it is float32, of the blank's axes and channels, finite.

    The other axes may have any length: what the model takes of them its processor says.
    """
    axes = ", ".join(["..."] * (len(blank_shape) - 1))
    expected = f"float32 of shape ({blank_shape[0]}, {axes}), as the blank (model.blank_shape)"
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: {got}, expected {expected}: array.astype(numpy.float32)")
    if array.ndim != len(blank_shape) or array.shape[0] != blank_shape[0] or not array.size:
        raise ValueError(f"{name}: shape {array.shape}, expected {expected}: turn its axes, or take the channels apart")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: not all of its values are finite numbers; mend or leave out what was not measured")


def check_frames(frames: Any, name: str) -> None:
    """Raises ValueError, naming the video, for what a video processor would misread without a word."""
    array = isinstance(frames, np.ndarray)
    if not array or frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        got = f"{frames.dtype} of shape {frames.shape}" if array else type(frames).__name__
        raise ValueError(f"{name}: {got}, expected RGB frames: uint8 of shape (frames, height, width, 3)")


def check_clip(clip: Any, rate: int, max_seconds: float | None, name: str) -> None:
    """Raises ValueError, naming the clip, for what a feature extractor would cut, drop or misread without a word.

    Args:
        rate: of the model (Hz).
        max_seconds: longest clip that the model takes; None: any.
    """
    if not isinstance(clip, np.ndarray) or clip.ndim != 1 or clip.dtype != np.float32:
        got = f"{clip.dtype} of shape {clip.shape}" if isinstance(clip, np.ndarray) else type(clip).__name__
        raise ValueError(f"{name}: {got}, expected a mono waveform: float32 of shape (samples,) at {rate} Hz")
    if len(clip) < MIN_SECONDS * rate:
        raise ValueError(
            f"{name}: {len(clip)} samples are {len(clip) / rate:.3f} s at {rate} Hz, expected {MIN_SECONDS} s or more: "
            "the model would hear nothing of it; leave it out, or add silence"
        )
    if max_seconds is not None and len(clip) > round(max_seconds * rate):
        raise ValueError(
            f"{name}: {len(clip) / rate:.2f} s at {rate} Hz, expected at most {max_seconds:g} s (model.max_seconds): "
            "the model would not hear the end; cut the clip, or split it"
        )
    if not np.isfinite(clip).all():
        raise ValueError(f"{name}: not all samples are finite numbers; decode the file again")
