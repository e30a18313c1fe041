"""Detector and detoxifier on several devices, as real processes on CPUs: the same weights as on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from configs.compose import last_wins
from tests.stages.test_devices import end, start

pytestmark = pytest.mark.slow
COMMON = ["trainer.accelerator=cpu", "trainer.precision=32-true", "logger.tensorboard=false", "pairs.limit=24"]
# A low rate: Adam moves a weight by it however small its gradient, and so makes rounding large.
DETECTOR = [
    "experiment=harm_detector_micro", "detector.epochs=1", "detector.batch_size=5", "detector.lr=1e-4",
    "detector.head_lr_factor=1", *COMMON,
]  # fmt: skip
DETOXIFIER = [
    "experiment=detoxifier_micro", "detoxifier.epochs=1", "detoxifier.batch_size=5", "detoxifier.lr=1e-4",
    "detoxifier.evaluate=8", "detoxifier.max_new_tokens=8", *COMMON,
]  # fmt: skip
LORA = ["backbone.full_finetune=false", "backbone.frozen_layers=1"]
CASES = {
    "detector, adapter on fed features": ([*DETECTOR, *LORA], "train_detector/detector/adapter_model", "ddp"),
    "detector, all weights": (
        ["detector.loss=bce_pairwise", *DETECTOR],
        "train_detector/detector/model",
        "fsdp2",
    ),
    "detoxifier, adapter": ([*DETOXIFIER, *LORA], "train_detoxifier/detoxifier/adapter_model", "fsdp2"),
}


@pytest.mark.parametrize(("words", "file", "trainer"), CASES.values(), ids=CASES)
def test_two_devices_give_the_weights_and_figures_of_one(
    words: list[str], file: str, trainer: str, tmp_path: Path
) -> None:
    run, two = tmp_path / "one", tmp_path / "two"
    assert train.main(last_wins(*words, f"run_dir={run}")) == 0
    end(start(two, *words, f"trainer={trainer}", "trainer.devices=2"))
    found, expected = (load_file(r / f"{file}.safetensors") for r in (two, run))
    assert found.keys() == expected.keys()
    assert max((found[k].float() - v.float()).abs().max().item() for k, v in expected.items()) < 2e-6
    ours, theirs = results(two), results(run)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours


def results(run: Path) -> dict[str, float]:
    """Every number that the training stage has noted down."""
    (path,) = [p for p in run.glob("train_*/stage.json") if "evaluation" not in str(p)]
    flat: dict[str, float] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, (int, float)):
            flat[name] = value

    walk(json.loads(path.read_text())["result"], "")
    return flat


def test_a_batch_smaller_than_the_number_of_devices_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DETECTOR, "detector.batch_size=1", "trainer=ddp", "trainer.devices=2"]
    assert train.main(last_wins(*words, f"run_dir={tmp_path / 'run'}")) == 1
    assert "expected one at least for each of 2 devices" in capsys.readouterr().err
    assert torch.distributed.is_initialized() is False
