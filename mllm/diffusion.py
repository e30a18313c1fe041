"""Pictures and clips from texts, through any pipeline of `diffusers` that says so in its `model_index.json`.

Only safetensors are read, and no code out of the folder or from the hub is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import Pipeline


def check_pipeline(settings: Pipeline) -> None:
    """Before anything is done for it: a folder must be a pipeline, without pickled weights.

    Raises:
        ValueError: it is none.
    """
    folder = Path(settings.path or "").expanduser()
    if settings.path is None or not folder.is_dir():  # a hub id
        return
    if not (folder / "model_index.json").is_file():
        inside = [path.parent.name for path in sorted(folder.glob("*/model_index.json"))]
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise ValueError(f"build.pipeline.path={settings.path}: cannot be loaded: it holds no model_index.json{hint}")
    _refuse_pickles(folder)


def load_pipeline(settings: Pipeline, device: torch.device | str = "cpu") -> Any:
    """The pipeline, on `device`.

    Raises:
        ValueError: the package is missing, there is no such pipeline, or it has no safetensors.
    """
    if settings.path is None:
        raise ValueError("build.pipeline.path is not set: give the folder or hub id of a pipeline of diffusers")
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils.logging import disable_progress_bar, set_verbosity_error
        from transformers.utils.logging import disable_progress_bar as disable_loading_bar
    except ImportError as error:
        raise ValueError("pictures and clips from texts need diffusers: pip install -e '.[generate]'") from error
    set_verbosity_error()
    disable_progress_bar()
    disable_loading_bar()
    folder = Path(settings.path).expanduser()
    check_pipeline(settings)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder) if folder.is_dir() else settings.path,
            revision=settings.revision,
            torch_dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"build.pipeline.path={settings.path}: cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_clip(
    pipeline: Any, text: str, settings: Pipeline, size: tuple[int, int], frames: int, seed: int
) -> np.ndarray:
    """`frames` frames of a clip, uint8 [frames, H, W, 3] at `size` (width, height).

    The pipeline makes `settings.frames` of them at `settings.size`; they are spread evenly and scaled.

    Raises:
        ValueError: the pipeline makes no clips.
    """
    width, height = settings.size or size
    made = settings.frames or frames
    found = _call(pipeline, text, settings, seed, width=width, height=height, num_frames=made)
    if not hasattr(found, "frames"):
        raise ValueError(f"build.pipeline.path={settings.path}: {type(pipeline).__name__} makes no clips")
    clip = _bytes(np.asarray(found.frames[0]))
    if clip.ndim != 4:
        raise ValueError(f"build.pipeline.path={settings.path}: gives an array of shape {clip.shape}, no clip")
    chosen = np.linspace(0, len(clip) - 1, frames).round().astype(int)
    return _scaled(clip[chosen], size)


def make_picture(pipeline: Any, text: str, settings: Pipeline, size: tuple[int, int], seed: int) -> np.ndarray:
    """A picture, uint8 [H, W, 3] at `size` (width, height), made at `settings.size` and scaled.

    Raises:
        ValueError: the pipeline makes no pictures.
    """
    width, height = settings.size or size
    found = _call(pipeline, text, settings, seed, width=width, height=height)
    if not hasattr(found, "images"):
        raise ValueError(f"build.pipeline.path={settings.path}: {type(pipeline).__name__} makes no pictures")
    return _scaled(_bytes(np.asarray(found.images[0]))[None], size)[0]


def _call(pipeline: Any, text: str, settings: Pipeline, seed: int, **size: int) -> Any:
    """Seeded on the CPU: so the noise is the same on every device."""
    return pipeline(
        prompt=text,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **size,
        **settings.arguments,
    )


def _bytes(values: np.ndarray) -> np.ndarray:
    """0..1 to uint8; a random or half-precision pipeline may give NaN, which is black."""
    return (np.nan_to_num(values.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)


def _scaled(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if (clip.shape[2], clip.shape[1]) == size:
        return clip
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in clip])


def _refuse_pickles(folder: Path) -> None:
    """diffusers falls back to pickled weights for a part without safetensors, whatever it was asked for."""
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        names = [p.name for p in part.iterdir()]
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".ckpt", ".pth", ".pkl"))]
        if pickled and not any(n.endswith(".safetensors") for n in names):
            raise ValueError(
                f"{part}: only {pickled[0]}, a pickle, which can run code when it is opened; expected .safetensors: "
                "save the pipeline again with save_pretrained(safe_serialization=True)"
            )
