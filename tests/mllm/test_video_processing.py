"""The video processor without torchvision gives the numbers of the real one.

`qwen2_vl_video_reference.json` holds what `transformers.Qwen2VLVideoProcessor` (transformers 5.24, torchvision 0.28.0,
torch 2.13) made of the cases below: `python -m tests.mllm.test_video_processing` writes it where torchvision is
installed. (There is no CPU build for this torch; the CUDA wheel works if the schemas of its compiled `nms` and `qnms`
are defined before it is imported.) Where torchvision is installed, the tests compare with the real class as well.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mllm.micro_qwen2_vl import build_processor
from mllm.video_processing import Qwen2VLVideoProcessor, patchify, smart_size

REFERENCE = Path(__file__).with_name("qwen2_vl_video_reference.json")
SMALL = {"shortest_edge": 256, "longest_edge": 512 * 512}
# name -> (settings of the processor, frames, height, width)
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "legal size": ({"patch_size": 8, "size": SMALL}, 8, 64, 48),
    "odd number of frames": ({"patch_size": 8, "size": SMALL}, 5, 48, 64),
    "one frame": ({"patch_size": 8, "size": SMALL}, 1, 64, 64),
    "patches of 14": ({"patch_size": 14, "size": SMALL}, 4, 56, 84),
    "resized to a multiple": ({"patch_size": 8, "size": SMALL}, 4, 60, 50),
    "scaled down": ({"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 2304}}, 4, 90, 70),
    "scaled up": ({"patch_size": 8, "size": {"shortest_edge": 9216, "longest_edge": 90000}}, 2, 48, 40),
    "capped": ({"patch_size": 8, "size": SMALL, "cap_pixels_per_frame": True, "max_video_tokens": 40}, 6, 96, 96),
    "older keys": ({"patch_size": 8, "min_pixels": 256, "max_pixels": 1024}, 2, 48, 48),
    "other mean": ({"patch_size": 8, "size": SMALL, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 2, 32, 32),
    "not normalised": ({"patch_size": 8, "size": SMALL, "do_normalize": False}, 2, 32, 32),
    "defaults": ({}, 2, 280, 420),
}


def clip(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3], all values and no generator whose stream could change."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    return ((7 * y + 13 * x + 29 * c + 41 * t + (x * y) // 5) % 256).astype(np.uint8)


def run(processor: Any, case: tuple[dict[str, Any], int, int, int]) -> tuple[torch.Tensor, list[list[int]]]:
    out = processor(videos=[clip(*case[1:])], return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"].tolist()


def fingerprint(pixels: torch.Tensor) -> dict[str, Any]:
    """Enough to tell two results apart: shape, sum, sum weighted by place, and 64 single values."""
    flat = pixels.flatten().double()
    some = flat[:: max(1, len(flat) // 64)][:64]
    place = torch.linspace(0, 1, len(flat), dtype=torch.float64)
    return {
        "shape": list(pixels.shape),
        "sum": float(flat.sum()),
        "weighted": float((flat * place).sum()),
        "some": some.tolist(),
    }


@pytest.mark.parametrize("name", CASES)
def test_gives_what_the_real_processor_was_recorded_to_give(name: str) -> None:
    expected = json.loads(REFERENCE.read_text())[name]
    pixels, grid = run(Qwen2VLVideoProcessor(**CASES[name][0]), CASES[name])
    assert grid == expected["grid"]
    got = fingerprint(pixels)
    assert got["shape"] == expected["shape"]
    assert got["some"] == pytest.approx(expected["some"], abs=1e-6)
    assert got["sum"] == pytest.approx(expected["sum"], abs=1e-6 * pixels.numel())
    assert got["weighted"] == pytest.approx(expected["weighted"], abs=1e-6 * pixels.numel())


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_real_processor_bit_for_bit(name: str) -> None:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor as Real

    settings = CASES[name][0]
    (real, real_grid), (own, grid) = (run(cls(**settings), CASES[name]) for cls in (Real, Qwen2VLVideoProcessor))
    assert grid == real_grid
    assert torch.equal(own, real)


def test_patches_lie_where_they_are_expected() -> None:
    """By hand: patches of 1 px, the merge of 2 x 2 after one another, channels before the two frames."""
    frames = torch.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
    rows, grid = patchify(frames, patch=1, temporal=2, merge=2)
    assert grid == [1, 2, 4]
    at = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]  # y, x
    expected = [[int(frames[t, c, y, x]) for c in range(3) for t in range(2)] for y, x in at]
    assert rows.tolist() == expected


def test_a_strip_and_transparency_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 200 times"):
        smart_size(10, 2010, 16, 256, 4096)
    with pytest.raises(ValueError, match="4 channels"):
        Qwen2VLVideoProcessor(patch_size=8, size=SMALL)(
            videos=[torch.zeros(2, 4, 32, 32, dtype=torch.uint8)], input_data_format="channels_first"
        )


def test_frames_may_be_pictures_and_videos_of_different_sizes_go_together() -> None:
    processor = Qwen2VLVideoProcessor(patch_size=8, size=SMALL)
    array, other = clip(4, 32, 48), clip(2, 48, 32)
    pictures = [Image.fromarray(frame) for frame in array]
    both = processor(videos=[array, other], return_tensors="pt")
    assert both["video_grid_thw"].tolist() == [[2, 4, 6], [1, 6, 4]]
    alone = processor(videos=[pictures], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(both["pixel_values_videos"][: len(alone)], alone)


def test_auto_processor_loads_a_checkpoint_with_a_place_for_videos(tmp_path: Path) -> None:
    made = build_processor(["show"])
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Qwen2VLProcessor"
    text, video = ["<|vision_start|><|video_pad|><|vision_end|> show"], [clip(8, 64, 64)]
    a, b = (p(text=text, videos=video, return_tensors="pt") for p in (made, loaded))
    assert a["input_ids"].shape == (1, 4 * 16 + 3)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_published_checkpoints_older_file_is_read(tmp_path: Path) -> None:
    """Qwen2-VL-7B's `preprocessor_config.json` names an image processor and has no file for videos."""
    made = build_processor(["show"])
    made.tokenizer.save_pretrained(tmp_path)
    older = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded.video_processor).__name__ == "Qwen2VLVideoProcessor"
    out = loaded(text="<|vision_start|><|video_pad|><|vision_end|> show", videos=[clip(4, 56, 84)], return_tensors="pt")
    assert out["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert out["input_ids"].shape == (1, 2 * 2 * 3 + 3)


def record() -> None:
    """Writes the reference from the real class."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor as Real

    out = {}
    for name, case in CASES.items():
        pixels, grid = run(Real(**case[0]), case)
        out[name] = fingerprint(pixels) | {"grid": grid}
    REFERENCE.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    record()
