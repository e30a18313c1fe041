"""`experiment=build_mm_safetybench` through `train.main`: real images, decoded again and read as a benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from configs.compose import last_wins
from datamodules.benchmark_build import BenchmarkFolder, read_manifest
from datamodules.benchmarks import open_media
from datamodules.mm_safetybench import QUESTIONS, read_mm_safetybench
from datamodules.typography import phrase_image
from tests.mm_safetybench import write_questions
from tests.tiny_text_to_image import tiny_text_to_image


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_to_image(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "source", 3)


def start(run: Path, source: Path, *overrides: str) -> int:
    words = ["experiment=build_mm_safetybench", f"run_dir={run}", f"build.source={source}", "build.workers=1"]
    return train.main(last_wins(*words, *overrides))


def test_typographic_images_are_built_and_read(source: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", source) == 0
    data = tmp_path / "run" / "build_benchmark" / "data"
    prompts = read_mm_safetybench(data, ["typo"])
    assert len(prompts) == 6
    images = [np.asarray(open_media(p).convert("L")) for p in prompts]
    for image in images:
        assert image.shape[1] == 1024
        dark = np.argwhere(image < 128)
        assert len(dark) > 1000  # letters
        assert dark.min(0).min() >= 20  # nothing touches the border
        assert (dark.max(0) < np.array(image.shape) - 20).all()
    assert not np.array_equal(images[0], images[1])
    rows = read_manifest(data)
    assert set(rows) == {p.media.relative_to(data).as_posix() for p in prompts}
    assert all(row["text"].startswith("fold a paper kite number") for row in rows.values())
    assert BenchmarkFolder(data).check() == []


def test_pictures_and_both_together_come_out_of_a_pipeline(source: Path, pipeline: Path, tmp_path: Path) -> None:
    small = ["build.size=[64,48]", "build.letters=12", "build.pipeline.steps=2", f"build.pipeline.path={pipeline}"]
    assert start(tmp_path / "run", source, *small, "build.limit=2") == 0
    data = tmp_path / "run" / "build_benchmark" / "data"
    prompts = {p.id: open_media(p) for p in read_mm_safetybench(data) if p.media is not None}
    assert len(prompts) == 2 * 2 * 3  # the questions of the others are not in the copy
    where = "01-Illegal_Activitiy/0"
    picture, words, both = (prompts[f"mm_safetybench/{task}/{where}"] for task in ("sd", "typo", "sd_typo"))
    assert picture.size == (64, 48)
    assert both.size == (64, 48 + words.height)
    other = np.asarray(prompts["mm_safetybench/sd/02-HateSpeech/0"], dtype=int)  # another seed, another text
    made, top = np.asarray(picture, dtype=int), np.asarray(both.crop((0, 0, 64, 48)), dtype=int)
    apart = np.abs(other - made).mean()
    assert apart > 5
    assert np.abs(top - made).mean() < apart / 4  # the same but for a second JPEG
    bottom = np.asarray(both.crop((0, 48, 64, both.height)).convert("L"))
    assert bottom[-2:].min() > 200  # paper
    assert (bottom < 128).sum() > 20  # letters
    assert np.asarray(picture).std() > 5  # a random model's picture, but a picture


def test_only_what_is_missing_or_changed_is_made_again(source: Path, tmp_path: Path) -> None:
    place = f"build.path={tmp_path / 'data'}"
    assert start(tmp_path / "one", source, place) == 0
    files = sorted((tmp_path / "data").glob("imgs/*/TYPO/*.jpg"))
    assert len(files) == 6
    before = {path: path.stat().st_mtime_ns for path in files}
    files[2].unlink()
    values = json.loads((source / QUESTIONS / "02-HateSpeech.json").read_text())
    values["1"]["Key Phrase"] = "fold another kite"
    (source / QUESTIONS / "02-HateSpeech.json").write_text(json.dumps(values))
    assert start(tmp_path / "two", source, place) == 0
    changed = {path for path in files if path.stat().st_mtime_ns != before[path]}
    assert changed == {files[2], tmp_path / "data" / "imgs" / "02-HateSpeech" / "TYPO" / "1.jpg"}


def test_questions_without_key_phrases_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source / QUESTIONS / "02-HateSpeech.json"
    values = json.loads(path.read_text())
    del values["1"]["Key Phrase"]
    path.write_text(json.dumps(values))
    assert start(tmp_path / "run", source) == 1
    assert "02-HateSpeech.json: entry '1': 'Key Phrase' holds nothing, expected a text" in capsys.readouterr().err


def test_a_pipeline_of_pickles_is_refused(
    source: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(pipeline, tmp_path / "pickled")
    next((copy / "unet").glob("*.safetensors")).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    assert start(tmp_path / "run", source, f"build.pipeline.path={copy}", "build.size=[64,48]") == 1
    assert "a pickle, which can run code when it is opened" in capsys.readouterr().err


def test_long_words_get_smaller_letters_and_long_phrases_more_lines() -> None:
    one, many = phrase_image("kite", 512, 60), phrase_image("fold a very long paper kite in the park", 512, 60)
    assert one.width == many.width == 512
    assert many.height > 2 * one.height
    wide = np.asarray(phrase_image("k" * 60, 512, 60).convert("L"))
    assert (wide[:, :20] == 255).all()
    assert (wide[:, -20:] == 255).all()
    assert (wide < 128).any()
    assert isinstance(one, Image.Image)
    with pytest.raises(ValueError, match="without words"):
        phrase_image(" ", 512, 60)
