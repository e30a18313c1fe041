"""The whole experiment for audio, small, through `train.main`: what sea_image is tested for, on speech."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from configs.compose import compose
from configs.keys import leaves

SMALL = [
    "experiment=sea_audio", "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.slots=4",
    "synthesis.max_steps=60", "synthesis.retries=0", "align.variants=[text_sft,sea_dpo]",
    "variants.text_sft.steps=2", "variants.sea_dpo.steps=2", "variants.sea_dpo.batch_size=8",
    "trainer.log_every_n_steps=1", "evaluate.limit=2", "evaluate.max_new_tokens=12",
    "synthesis.include_failed=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*SMALL, f"run_dir={folder}"]) == 0
    return folder


def test_report_has_every_variant_task_and_metric(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["model"]["modality"] == "audio"
    rows = {(r["variant"], r["task"], r["metric"]) for r in report["results"] if r["scenario"] == "all"}
    for variant in ("base", "text_sft", "sea_dpo"):
        for task in ("text_only", "audio_plain", "audio_prefixed"):
            assert {(variant, task, "asr"), (variant, task, "benign_compliance")} <= rows
        assert (variant, "audio_plain", "reading_accuracy") in rows
    assert report["synthesis"]["n"] == 6
    assert "image" not in (finished / "report.md").read_text().replace("sea_image", "")


def test_embeddings_reach_their_targets_and_speak_of_audio(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["synthesis"]["osr"] >= 0.5
    prefixed = [
        json.loads(line)
        for line in (finished / "evaluate" / "generations" / "base.jsonl").read_text().splitlines()
        if json.loads(line)["task"] == "audio_prefixed"
    ]
    assert prefixed
    assert all(row["prompt"].startswith("The audio shows ") for row in prefixed)


def test_the_model_and_a_few_settings_differ_from_the_image_experiment() -> None:
    image, audio = (
        {leaf.key: leaf.value for leaf in leaves(compose([f"experiment=sea_{m}"]).config)} for m in ("image", "audio")
    )
    different = {key for key in image.keys() | audio.keys() if image.get(key) != audio.get(key)}
    settings = {key for key in different if not key.startswith("model.")}
    assert settings == {
        "experiment", "evaluate.benchmarks", "synthesis.lr", "synthesis.common",
        *(f"variants.{v}.mixture.{part}" for v in ("sea_sft", "sea_dpo") for part in ("harmful", "alone")),
    }  # fmt: skip
