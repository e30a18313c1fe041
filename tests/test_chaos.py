"""Three kills of real runs at random moments (twenty in `python scripts/chaos.py`): what comes out equals, to the bit,
what an undisturbed run leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.chaos_compare import differences
from scripts.chaos_trials import TRIALS
from tests.conftest import ROOT

EXPERIMENTS = ROOT / "configs" / "experiment"


def test_every_experiment_has_a_trial() -> None:
    assert {trial.experiment for trial in TRIALS.values()} == {path.stem for path in EXPERIMENTS.glob("*.yaml")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are left that three kills each have disturbed."""
    folder = tmp_path_factory.mktemp("chaos") / "runs"
    small = ["synthesis.harmful=3", "synthesis.harmless=3", "evaluate.limit=1"]
    command = [sys.executable, "scripts/chaos.py", "experiment=sea_image,harm_detector_lora"]
    command += ["--kills", "3", "--seed", "7", "--keep", str(folder), "--", "logger.wandb=false"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to the bit") == 2
    return folder


def test_killed_runs_equal_undisturbed_ones_and_a_difference_would_be_told(kept: Path, tmp_path: Path) -> None:
    whole = kept / "sea_image" / "undisturbed"
    other = shutil.copytree(whole, tmp_path / "other")
    assert differences(whole, other) == []
    adapter = other / "align" / "sea_sft" / "adapter" / "adapter_model.safetensors"
    weights = load_file(adapter)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nextafter(weights[name].view(-1)[0], torch.tensor(9.0))  # one bit of one weight
    save_file(weights, adapter, {"format": "pt"})
    metrics = other / "synthesize" / "metrics" / "metrics.csv"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines, lines[-1]]))  # a row twice
    answers = other / "evaluate" / "generations" / "base.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    report = json.loads((other / "report.json").read_text())
    report["results"][0]["n"] += 1
    (other / "report.json").write_text(json.dumps(report))
    (other / "align" / "sea_dpo" / "adapter" / "README.md").unlink()
    told = differences(whole, other)
    for part in ("README.md is in one alone", f"{name} differs by up to", "repeated row", "base.jsonl", "report.json"):
        assert any(part in line for line in told), (part, told)
    assert len(told) == 5  # and nothing else
