"""Clips from texts, on a random pipeline of the real classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Pipeline
from mllm.diffusion import check_pipeline, load_pipeline, make_clip
from tests.tiny_text_to_video import tiny_text_to_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_to_video(tmp_path_factory.mktemp("tiny"))


def settings(folder: Path | None, **changes: object) -> Pipeline:
    return Pipeline(path=folder and str(folder), frames=4, size=[16, 16], steps=2, **changes)  # type: ignore[arg-type]


def test_a_clip_has_the_frames_and_the_size_that_were_asked_for(folder: Path) -> None:
    pipeline = load_pipeline(settings(folder))
    assert next(pipeline.unet.parameters()).dtype == torch.float32
    clip = make_clip(pipeline, "a paper kite", settings(folder), (24, 16), 10, seed=0)
    assert (clip.shape, clip.dtype) == ((10, 16, 24, 3), np.uint8)
    distinct = [i for i in range(1, 10) if not np.array_equal(clip[i], clip[i - 1])]
    assert len(distinct) == 3  # four frames were made, and spread over ten
    again = make_clip(pipeline, "a paper kite", settings(folder), (24, 16), 10, seed=0)
    assert np.array_equal(clip, again)
    assert not np.array_equal(clip, make_clip(pipeline, "a paper kite", settings(folder), (24, 16), 10, seed=1))
    assert not np.array_equal(clip, make_clip(pipeline, "a loaf of bread", settings(folder), (24, 16), 10, seed=0))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (weights,) = (copy / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet: only .*\.bin, a pickle, which can run code"):
        load_pipeline(settings(copy))


def test_what_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"build.pipeline.path is not set"):
        load_pipeline(settings(None))
    with pytest.raises(ValueError, match=rf"build.pipeline.path={tmp_path}: cannot be loaded"):
        load_pipeline(settings(tmp_path))


def test_the_folder_above_a_pipeline_says_where_it_is(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"it holds no model_index\.json; did you mean {folder}\?"):
        check_pipeline(settings(folder.parent))
