"""The stage encode on video and audio files: the same rows, the same store, a model of that modality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from configs.compose import compose
from datamodules.embedding_store import EmbeddingStore
from datamodules.speech import synthesize
from mllm.encode import MediaEncoder
from mllm.loading import load
from stages.media import media_rules
from tests.clips import audio, colours, video
from tests.pictures import write_rows

MODELS = {"video": "micro_qwen2_vl", "audio": "micro_qwen2_audio"}


@pytest.fixture(scope="module", params=["video", "audio"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """(modality, its file of configs/model, a folder with random weights)"""
    name = MODELS[request.param]
    module = pytest.importorskip(f"mllm.{name}", reason=f"there is no embedded {request.param} model yet")
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    processor = module.build_processor(["fold", "kite", "audio", "video"])
    module.build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, name, folder


def medium(folder: Path, modality: str, i: int, long: bool = False) -> str:
    """A file of the model's own size; `long`: of another."""
    if modality == "video":
        size = (96, 80) if long else (64, 64)
        video(folder / f"{i}.mp4", np.roll(colours(20, size), i, axis=0))
        return f"{i}.mp4"
    speech = synthesize(f"fold {i + 1} kites", "en-us", rate=16000).samples
    whole = speech if long else np.pad(speech, (0, 5 * 16000 - len(speech)))
    audio(folder / f"{i}.wav", whole)
    return f"{i}.wav"


def rows(folder: Path, modality: str, n: int, long: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    row = {"question": "How do I fold a kite?", "chosen": "Twice.", "rejected": "No.", "harmful": False}
    row |= {"phrase": "fold a kite", "kind": "activity"}
    return write_rows(folder, [row | {"id": f"r{i}", "media": medium(folder, modality, i, long)} for i in range(n)])


def overrides(model: tuple[str, str, Path], run: Path, path: Path, *more: str) -> list[str]:
    _, name, folder = model
    quiet = ["logger.tensorboard=false", "logger.csv=false", "stages=[encode]"]
    return [
        "experiment=sea_image",
        f"model={name}",
        f"model.path={folder}",
        f"run_dir={run}",
        f"real.path={path}",
        *quiet,
        *more,
    ]


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "encode" / "stage.json").read_text())["result"]


def test_files_become_the_embeddings_that_the_encoder_makes_of_them(model: Any, tmp_path: Path) -> None:
    path, run = rows(tmp_path / "data", model[0], 3), tmp_path / "run"
    command = overrides(model, run, path)
    assert train.main(command) == 0
    assert result(run)["encoded"] == 3
    cfg = compose(command).config
    mllm = load(cfg.model)
    rules = media_rules(cfg, mllm)
    assert (rules.frames, rules.sample_rate) == ((8, None) if model[0] == "video" else (None, 16000))
    encoder = MediaEncoder(mllm)
    store = EmbeddingStore.open(run / "synthesize" / "store")
    from datamodules.media_files import model_input, open_medium

    with store:
        made = []
        for i, line in enumerate(path.read_text().splitlines()):
            file = path.parent / json.loads(line)["media"]
            e = encoder.encode([encoder.prepare(model_input(open_medium(file, rules)))])
            (id,) = [known for known in store.ids() if known.startswith(f"r{i}@")]
            for key, value in e.items():
                stored = store.batch([id])[key]
                assert (stored - value).abs().max() < 1e-4 < value.std()
                made.append(stored)
        assert (made[0] - made[1]).abs().max() > 1e-3  # other files, other embeddings


def test_a_medium_of_another_size_says_how_to_mend_it(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = rows(tmp_path / "data", model[0], 2, long=True), tmp_path / "run"
    unpadded = ["model.pad_seconds=null"] if model[0] == "audio" else []  # else silence would make it fit
    assert train.main(overrides(model, run, path, *unpadded)) == 1
    told = capsys.readouterr().err
    assert "rows.jsonl:1: " in told
    assert {"video": "8 frames of 96 x 80 px", "audio": "s at 16000 Hz"}[model[0]] in told
    assert "real.resize=true" in told
    assert train.main(overrides(model, run, path, *unpadded, "real.resize=true", "overwrite=true")) == 0
    assert result(run)["encoded"] == 2


def test_another_sample_rate_is_an_error_until_it_is_resampled(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model[0] != "audio":
        pytest.skip("a video has no sample rate")
    path, run = rows(tmp_path / "data", "audio", 1), tmp_path / "run"
    speech = synthesize("fold a kite", "en-us").samples  # 22050 Hz
    audio(path.parent / "0.wav", np.pad(speech, (0, 5 * 22050 - len(speech))), 22050)
    assert train.main(overrides(model, run, path)) == 1
    assert "0.wav: 22050 Hz, the model expects 16000; set media.resample=true" in capsys.readouterr().err
    assert train.main(overrides(model, run, path, "media.resample=true", "overwrite=true")) == 0
