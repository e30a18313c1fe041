"""Every configuration of configs/model, on the same architecture, small and randomly initialised."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import nn

from configs.schema import Model
from mllm.anchor import Anchor
from tests.mllm.families import BY_NAME, Family

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "model"


def three_deepstack_mergers() -> Any:
    """As in the published checkpoints; a fourth text layer, or the third merger would reach no word."""
    config = BY_NAME["qwen3_vl_image"].build().config
    config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 4, [0, 1, 2]
    config.text_config.num_hidden_layers = 4
    return BY_NAME["qwen3_vl_image"].build().__class__(config)


# The architecture of each configuration's checkpoint; the projector comes from the configuration.
IMAGE_OF_QWEN = BY_NAME["qwen2_vl_image"]
ARCHITECTURE: dict[str, Family] = {
    "smol_llava": BY_NAME["llava"],
    "llava_1_5_7b": BY_NAME["llava"],
    "llava_1_6_mistral_7b": BY_NAME["llava_next"],
    "llava_onevision_7b": BY_NAME["onevision_image"],
    "qwen2_vl_7b": IMAGE_OF_QWEN,
    "qwen2_vl_7b_video": BY_NAME["qwen2_vl_video"],
    "qwen2_5_vl_7b": replace(IMAGE_OF_QWEN, build=BY_NAME["qwen2_5_vl_video"].build),
    "qwen3_vl_8b": replace(BY_NAME["qwen3_vl_image"], build=three_deepstack_mergers),
    "internvl3_8b": BY_NAME["internvl"],
    "gemma3_4b": BY_NAME["gemma3"],
    "smolvlm_256m": BY_NAME["idefics3"],
    "qwen2_audio_7b": BY_NAME["qwen2_audio"],
}


def read(name: str) -> Model:
    """The file over the schema, so that a key that does not exist is an error."""
    merged = OmegaConf.merge(OmegaConf.structured(Model), OmegaConf.load(FOLDER / f"{name}.yaml"))
    spec = OmegaConf.to_object(merged)
    assert isinstance(spec, Model)
    return spec


def test_every_configuration_has_its_architecture_here() -> None:
    # The embedded models' own weights are tested where they are made.
    assert set(ARCHITECTURE) == {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("micro_")}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_file_opens_with_what_it_is_and_the_memory_to_expect(name: str) -> None:
    header = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text())
    assert header
    assert "Memory:" in header[0]
    assert "E:" in header[0]


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_name_path_and_revision(name: str) -> None:
    spec = read(name)
    assert spec.name == name
    if name == "smol_llava":
        assert spec.path == "~/.cache/seawall/smol_llava"
        assert spec.make == "make smol"
    else:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path), "expected a hub id"
        assert spec.revision is None or re.fullmatch(r"[0-9a-f]{40}", spec.revision), "expected a commit hash"
        assert spec.dtype == "bfloat16"
    width, height = spec.blank_size
    assert width == height >= 224


def test_smol_llava_lies_where_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mllm.smol import cache_folder

    assert Path(read("smol_llava").path).expanduser() == cache_folder() / "smol_llava"
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path))
    assert Path(read("smol_llava").path) == cache_folder() / "smol_llava" == tmp_path / "smol_llava"


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_projector_takes_the_whole_of_E(name: str, caplog: pytest.LogCaptureFixture) -> None:
    spec, family = read(name), ARCHITECTURE[name]
    assert spec.modality == family.modality
    model = family.model()
    anchor = Anchor(model, spec.projector)
    with caplog.at_level(logging.WARNING):
        anchor.record(**family.blank())
    assert "round the projector" not in caplog.text, "a projector is missing from the configuration"
    real = family.real()
    with torch.no_grad():
        expected = model(**family.text(family.prefix()[None]), **real).logits
        E = anchor.observe(**family.text(family.prefix()[None]), **real)
        with anchor.inject(E):
            got = model(**family.text(family.prefix()[None]), **anchor.media_inputs(1)).logits
            blank = model(**family.blank()).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.equal(got, blank), "under injection the media inputs must not matter"


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_lora_reaches_every_linear_of_the_language_model_and_nothing_else(name: str) -> None:
    spec, family = read(name), ARCHITECTURE[name]
    model = family.model()
    anchor = Anchor(model, spec.projector)
    anchor.record(**family.blank())
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    not_language = (*anchor.encoder_modules, *anchor.projectors)
    language = {path for path in linears if not path.startswith(not_language)} - {"lm_head"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=spec.lora_targets))
    trained = {
        path.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for path, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == language
    assert len(trained) == 7 * len({path.split(".layers.")[1].split(".")[0] for path in trained})
