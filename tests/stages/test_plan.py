"""`plan=true`: expected memory against what torch's allocator gave out, deep models, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import train
from configs.compose import compose
from scripts.measure_memory import compare
from stages import memory_plan
from stages.memory_plan import Place, needs, page
from tests.conftest import ROOT

SMALL = [
    "experiment=sea_image", "synthesis.harmful=8", "synthesis.harmless=8", "synthesis.slots=16",
    "trainer.accelerator=cpu", "stages=[synthesize,align]", "align.variants=[sea_sft,sea_dpo]",
    "variants.sea_sft.batch_size=16", "variants.sea_dpo.batch_size=16", "variants.sea_sft.mixture.replay=0",
    "variants.sea_dpo.mixture.replay=0",
]  # fmt: skip


@pytest.mark.slow
def test_expected_peaks_are_within_a_fifth_of_measured_ones() -> None:
    rows = compare(SMALL, steps=2)
    assert [stage for stage, _, _ in rows] == ["synthesize", "align/sea_sft", "align/sea_dpo"]
    assert all(0.8 < expected / peak < 1.2 for _, expected, peak in rows), rows


def test_what_does_not_fit_is_told_with_the_setting_to_lower() -> None:
    cfg = compose([*SMALL[:5], "stages=[synthesize]"]).config
    (row,) = needs(cfg, Place("cpu", 1, 10**12))
    room = row.need.weights + row.need.kept + row.need.rest // 2 + memory_plan.beside(Place("cpu", 1, 0)) + 10**6
    place = Place("cpu", 1, room)
    lines = page(cfg, place, needs(cfg, place))
    (told,) = [line for line in lines if line.startswith("does not fit: ")]
    assert "lower synthesis.slots=16 to 8 (" in told
    nothing = Place("cpu", 1, 10**6)
    assert any("it does not even with synthesis.slots=1" in line for line in page(cfg, nothing, needs(cfg, nothing)))


def test_a_row_does_not_depend_on_those_before_it() -> None:
    words = [*SMALL[:5], "align.variants=[text_sft]", "variants.text_sft.batch_size=4", "trainer.precision=bf16-true"]
    place = Place("cpu", 1, 10**12)
    alone = needs(compose([*words, "stages=[evaluate]"]).config, place)
    after = needs(compose([*words, "stages=[align,evaluate]"]).config, place)
    assert after[-1] == alone[-1]


def test_plan_reads_no_weights_and_makes_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "micro_llava", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    words = [*SMALL, f"model.path={folder}", f"run_dir={tmp_path / 'run'}", "plan=true"]
    words = [*words[:5], "stages=[synthesize]", *words[-3:]]
    assert train.main(words) == 0
    assert "everything fits" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    (folder / "config.json").unlink()
    assert train.main(words) == 1
    assert "a plan needs config.json and the small files of the processor" in capsys.readouterr().err


def test_a_deep_model_is_expected_to_take_what_all_its_layers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "micro_llava", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 12
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    cfg = compose([*SMALL[:5], "stages=[synthesize]", f"model.path={folder}"]).config
    place = Place("cpu", 1, 10**12)
    (few,) = needs(cfg, place)
    monkeypatch.setattr("stages.memory_steps.FEW", (3, 99))
    (all_of_them,) = needs(cfg, place)
    assert few.need.peak == pytest.approx(all_of_them.need.peak, rel=0.02)
    assert dataclasses.replace(few.need, rest=0) == dataclasses.replace(all_of_them.need, rest=0)
