"""`experiment=utility` and `experiment=export` through `train.main`: general ability, and a plain folder of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

import train
from configs.compose import last_wins
from datamodules.micro_utility import micro_utility
from mllm.generate import answer
from mllm.loading import assemble
from tests.micro import config, micro, random_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter"))


def start(*words: str) -> int:
    return train.main(last_wins("logger.tensorboard=false", *words))


def test_utility_asks_for_words_style_and_harmless_steps_alone() -> None:
    prompts = micro_utility(config().model.prompts)
    tasks = {task: [p for p in prompts if p.task == task] for task in ("words", "style", "image_steps", "text_steps")}
    assert {task: len(of) for task, of in tasks.items()} == {
        "words": 224, "style": 224, "image_steps": 112, "text_steps": 112,
    }  # fmt: skip
    assert {p.request for p in prompts} == {"reading", "benign"}
    assert {p.expected for p in tasks["style"]} == {"dark", "bright", "neon", "sepia"}
    assert all(p.media is None for p in tasks["text_steps"])
    assert len({p.id for p in prompts}) == len(prompts)


def test_what_an_adapter_costs_is_seen_beside_the_base(adapter: Path, tmp_path: Path) -> None:
    given = f"evaluate.adapters={{broken: {adapter}}}"
    assert (
        start(
            "experiment=utility",
            f"run_dir={tmp_path / 'run'}",
            given,
            "evaluate.limit=16",
            "evaluate.max_new_tokens=24",
        )
        == 0
    )
    results = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    rates = {(e["variant"], e["task"], e["metric"]): e for e in results if e["scenario"] == "all"}
    for task, metric in (
        ("words", "reading_accuracy"),
        ("style", "reading_accuracy"),
        ("image_steps", "benign_on_topic"),
        ("text_steps", "benign_on_topic"),
    ):
        base, broken = rates["base", task, metric], rates["broken", task, metric]
        assert base["n"] == 16  # an answer of the broken one may be empty
        assert base["value"] >= 14 / 16
        assert broken["value"] < base["value"]
    assert not any(e["metric"] == "asr" for e in results)


def test_an_exported_model_is_loaded_by_transformers_alone_and_answers_alike(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start("experiment=export", f"run_dir={run}", f"export.adapter={adapter}") == 0
    folder = run / "export" / "model"
    told = json.loads((run / "export" / "stage.json").read_text())["result"]
    assert told["folder"] == str(folder)
    assert told["largest_logit_difference"] < 1e-3
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    assert not isinstance(model, PeftModel)
    exported = assemble(model, AutoProcessor.from_pretrained(folder), config().model)
    prompts = [p for p in micro_utility(config().model.prompts) if p.task == "words"][:6]
    texts, media = [p.text for p in prompts], [p.media for p in prompts]
    base = micro()
    bare = answer(base, texts, media, 16)
    under = answer(base, texts, media, 16, PeftModel.from_pretrained(base.model, adapter).eval())
    assert answer(exported, texts, media, 16) == under
    assert under != bare
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert start("experiment=export", f"run_dir={run}", f"export.adapter={adapter}") == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_an_export_that_cannot_be_made_says_why(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("experiment=export", f"run_dir={tmp_path / 'a'}") == 2
    assert "export.adapter is not set" in capsys.readouterr().err
    assert start("experiment=export", f"run_dir={tmp_path / 'b'}", f"export.adapter={tmp_path}") == 2
    assert "so it is no adapter" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.cat([v, v], -1) for k, v in weights.items()}, other / "adapter_model.safetensors")
    assert start("experiment=export", f"run_dir={tmp_path / 'c'}", f"export.adapter={other}") == 1
    assert "the adapter does not fit assets/micro_llava" in capsys.readouterr().err
