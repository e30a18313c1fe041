"""The whole experiment for video, small, through `train.main`: only the configuration differs from sea_image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import train
from configs.compose import compose
from configs.keys import leaves
from datamodules.embedding_store import EmbeddingStore
from mllm.generate import answer
from mllm.loading import load
from tests.stages.test_sea_image import SMALL

VIDEO = ["experiment=sea_video", *SMALL[1:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "video"
    assert train.main([*VIDEO, f"run_dir={folder}"]) == 0
    return folder


def test_the_model_and_a_few_settings_differ_from_the_experiment_for_images() -> None:
    image, video = (leaves(compose([f"experiment={name}"]).config) for name in ("sea_image", "sea_video"))
    one, other = ({leaf.key: leaf.value for leaf in found} for found in (image, video))
    differ = {key for key in one | other if one.get(key) != other.get(key)}
    assert {key for key in differ if not key.startswith("model.")} == {
        "experiment", "evaluate.benchmarks", "synthesis.common", "variants.sea_dpo.mixture.harmful",
        *(f"variants.sea_sft.{key}" for key in ("steps", "lr", "embedding_noise")),
    }  # fmt: skip


def test_embeddings_have_the_shape_of_a_clip_and_the_report_names_its_tasks(finished: Path) -> None:
    config = compose(["experiment=sea_video"]).config
    mllm = load(config.model)
    store = EmbeddingStore.create_or_open(finished / "synthesize" / "store", mllm.key, mllm.shapes, config.store.dtype)
    with store:
        assert len(store) == 6
        E = store.batch(store.ids())["model.visual.merger"]
    assert E.shape == (6, 4 * 64, 96)
    assert (E - mllm.anchor.E0_by_path["model.visual.merger"]).abs().amax((1, 2)).min() > 0.1
    report = json.loads((finished / "report.json").read_text())
    assert report["model"]["modality"] == "video"
    rows = {(r["variant"], r["task"], r["metric"]) for r in report["results"] if r["scenario"] == "all"}
    for variant in ("base", "text_sft", "sea_dpo"):
        for task in ("text_only", "video_plain", "video_prefixed"):
            assert {(variant, task, "asr"), (variant, task, "benign_compliance")} <= rows
        assert (variant, "video_plain", "reading_accuracy") in rows


def test_the_adapter_loads_over_the_model_and_answers_about_a_clip(finished: Path) -> None:
    mllm = load(compose(["experiment=sea_video"]).config.model)
    adapted = PeftModel.from_pretrained(mllm.model, finished / "align" / "sea_dpo" / "adapter").eval()
    clip = np.full((8, 64, 64, 3), 128, np.uint8)
    with torch.no_grad():
        (said,) = answer(mllm, ["Read the words in the video."], [clip], 8, adapted)
    assert said
