"""Qwen2-VL's video processor without torchvision, so that the family runs where torch has no torchvision beside it.

Every video processor of transformers imports torchvision, of which there is no CPU build for recent torch; and a
processor with a place for videos cannot even be made without one. torchvision only resizes and normalises there. The
class below does both with torch alone and takes the real one's place in `AutoProcessor`, through transformers' own
register, if torchvision is missing; where it is installed, nothing is registered and the real one runs. Both give the
same numbers (tests/mllm/test_video_processing.py).

Sources: transformers 5.24, `models/qwen2_vl/video_processing_qwen2_vl.py` (sizes, order of the patches), and
torchvision 0.28, `transforms/v2/functional/_geometry.py` (resizing of uint8).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import Qwen2VLConfig, processing_utils
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

LARGEST_RATIO = 200  # of the sides; the family refuses longer strips


class VideoSettings(VideosKwargs, total=False):  # type: ignore[call-arg]
    """Keys of `preprocessor_config.json` that the family adds to those of every video processor."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


class Qwen2VLVideoProcessor(BaseVideoProcessor):
    """Of the real one's name, which checkpoints ask for. Takes frames (arrays [frames, height, width, 3], tensors
    [frames, 3, height, width], or lists of PIL images); choosing frames of a file is the caller's work.
    """

    resample = PILImageResampling.BICUBIC
    # Pixels of a frame, at least and at most.
    size: ClassVar[dict[str, int]] = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    image_mean, image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    do_sample_frames = False
    patch_size, temporal_patch_size, merge_size = 14, 2, 2
    min_frames, max_frames = 4, 768
    cap_pixels_per_frame = None
    max_video_tokens = 128000
    valid_kwargs = VideoSettings
    model_input_names: ClassVar[list[str]] = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, **kwargs: Any) -> None:
        size = dict(kwargs.pop("size", None) or self.size)
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):  # older checkpoints
            if (value := kwargs.pop(old, None)) is not None:
                size[new] = value
        super().__init__(size=size, **kwargs)

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """[frames, channels, height, width] -> 3 channels.

        Raises:
            ValueError: neither grey nor RGB.
        """
        if video.shape[1] not in (1, 3):
            raise ValueError(f"a video of {video.shape[1]} channels, expected 1 (grey) or 3 (RGB): drop transparency")
        return video.expand(-1, 3, -1, -1)

    def sample_frames(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("without torchvision the processor takes frames as they are: set do_sample_frames=false")

    def _preprocess(  # type: ignore[override]
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        patch_size: int,
        temporal_patch_size: int,
        merge_size: int,
        cap_pixels_per_frame: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        patches, grids = [], []
        for frames in videos:
            if do_resize:
                most = size.longest_edge
                if cap_pixels_per_frame:
                    factor = patch_size * merge_size
                    budget = int(self.max_video_tokens * factor * factor * 0.9) * temporal_patch_size // len(frames)
                    most = max(min(most, budget), int(size.shortest_edge * 1.05))
                height, width = frames.shape[-2:]
                side = smart_size(height, width, patch_size * merge_size, size.shortest_edge, most)
                frames = resize(frames, side)
            scale = rescale_factor if do_rescale else 1.0
            frames = normalise(frames, scale, image_mean, image_std) if do_normalize else frames * scale
            rows, grid = patchify(frames, patch_size, temporal_patch_size, merge_size)
            patches.append(rows)
            grids.append(grid)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def smart_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width (px) near the given ones: multiples of `factor`, between `least` and `most` pixels in all.

    Raises:
        ValueError: a strip more than 200 times as long as wide.
    """
    if max(height, width) > LARGEST_RATIO * min(height, width):
        raise ValueError(f"frames of {width} x {height} px: one side is more than {LARGEST_RATIO} times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic with antialias; frames [n, 3, height, width], uint8 stays uint8."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    on_cpu = frames.device.type == "cpu" and frames.dtype == torch.uint8  # torch resizes these in integers
    scaled = F.interpolate(
        frames if on_cpu else frames.float(), size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return scaled if on_cpu or frames.is_floating_point() else scaled.clamp(0, 255).round().to(frames.dtype)


def normalise(frames: torch.Tensor, factor: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(frames * factor - mean) / std as float32; the factor goes into mean and std first, as in transformers."""
    each = [torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) * (1.0 / factor) for value in (mean, std)]
    return frames.to(torch.float32).sub(each[0].to(frames.device)).div(each[1].to(frames.device))


def patchify(frames: torch.Tensor, patch: int, temporal: int, merge: int) -> tuple[torch.Tensor, list[int]]:
    """Frames [n, 3, height, width] -> patches [t * h * w, 3 * temporal * patch * patch] and [t, h, w].

    `temporal` frames make one patch, the last frame repeated if n is no multiple; the patches that the merger joins,
    merge x merge of them, stand one after another.
    """
    if missing := -len(frames) % temporal:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    n, channels, height, width = frames.shape
    t, h, w = n // temporal, height // patch, width // patch
    parts = frames.reshape(t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * temporal * patch * patch)
    return rows, [t, h, w]


def video_processor_class() -> type[BaseVideoProcessor]:
    """The real class where torchvision is installed, else the one above."""
    if importlib.util.find_spec("torchvision") is None:
        return Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl import video_processing_qwen2_vl

    return video_processing_qwen2_vl.Qwen2VLVideoProcessor


def register() -> None:
    """Makes `AutoProcessor` find the class above if torchvision is missing. Otherwise, and a second time: nothing."""
    if importlib.util.find_spec("torchvision") is None:
        AutoVideoProcessor.register(Qwen2VLConfig, Qwen2VLVideoProcessor, exist_ok=True)
        # transformers exports the base class with torchvision alone, and looks it up by name to check a processor.
        processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
