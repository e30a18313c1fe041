"""What the batch scripts say, by stage and setting. That SLURM does what they ask for is tested in tests/slurm."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import compose
from stages.slurm_jobs import Job, plan, seconds_of
from tests.conftest import ROOT


def jobs(run: Path, *overrides: str) -> dict[str, Job]:
    words = ["experiment=sea_image", *overrides]
    return {job.stage: job for job in plan(compose(words).config, words, run)}


def options(job: Job) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --(.*)$", job.script, re.MULTILINE)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def command(job: Job) -> list[str]:
    """The words that srun runs."""
    (line,) = re.findall(r"^srun .*\\\n  (.*) &$", job.script, re.MULTILINE)
    return shlex.split(line)


def test_each_stage_asks_for_its_own(tmp_path: Path) -> None:
    found = jobs(
        tmp_path, "slurm.all.partition=gpu", "slurm.all.gpus=1", "slurm.all.time=4:00:00", "slurm.align.gpus=4",
        "slurm.align.nodes=2", "slurm.evaluate.time=30", "slurm.synthesize.array=8", "slurm.evaluate.partition=short",
    )  # fmt: skip
    assert list(found) == ["synthesize", "align", "evaluate"]
    asked = {stage: options(job) for stage, job in found.items()}
    assert [asked[s]["partition"] for s in asked] == ["gpu", "gpu", "short"]
    assert [asked[s]["time"] for s in asked] == ["4:00:00", "4:00:00", "30"]
    assert [asked[s]["gpus-per-node"] for s in asked] == ["1", "4", "1"]
    assert [asked[s]["ntasks-per-node"] for s in asked] == ["1", "4", "1"]
    assert asked["synthesize"]["array"] == "0-7"
    assert "array" not in asked["align"]
    for values in asked.values():
        assert "requeue" in values
        assert values["kill-on-invalid-dep"] == "yes"
        assert values["signal"] == "B:USR1@120"
        assert values["open-mode"] == "append"
        assert "ntasks" not in values


def test_each_job_runs_its_stage_with_the_words_that_were_given(tmp_path: Path) -> None:
    found = jobs(tmp_path, "seed=3", "run=mine", "stages=[synthesize,align]", "trainer.devices=7",
                 "slurm.synthesize.array=2", "slurm.align.tasks=2", "evaluate.system_prompt='a b $HOME'")  # fmt: skip
    assert list(found) == ["synthesize", "align"]
    words = command(found["align"])
    assert words[:2] == [sys.executable, str(ROOT / "train.py")]
    assert {"seed=3", f"run_dir={tmp_path}", "stages=[align]", "trainer.devices=2", "trainer.strategy=ddp"} <= set(
        words
    )
    assert "evaluate.system_prompt='a b $HOME'" in words
    assert not {"run=mine", "trainer.devices=7", "stages=[synthesize,align]"} & set(words)
    words = command(found["synthesize"])
    assert words[-2:] == ["synthesis.shards=2", "synthesis.shard=$SLURM_ARRAY_TASK_ID"]
    assert "trainer.strategy=ddp" not in words
    for job in found.values():
        own = [word for word in command(job)[2:] if not word.startswith("synthesis.shard")]
        assert compose(own).config.stages == [job.stage]


@pytest.mark.parametrize("place", ["plain", "with a blank", "it's 100%"])
def test_script_is_sound_shell_whatever_the_folder_is_called(place: str, tmp_path: Path) -> None:
    run = tmp_path / place
    (job, *_) = jobs(run, "slurm.all.setup=['export A=1','source x']").values()
    done = subprocess.run(["bash", "-n"], input=job.script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nexport A=1\nsource x\n" in job.script
    words = command(job)
    assert compose([word for word in words[2:] if "=" in word]).config.run_dir == str(run)
    assert not re.findall(r"@[A-Z_]+@", job.script)


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_container(runtime: str, tmp_path: Path) -> None:
    (job, *_) = jobs(tmp_path, "slurm.all.container=image.sif", f"slurm.all.runtime={runtime}", "slurm.all.gpus=1",
                     "slurm.all.mounts=[/data]").values()  # fmt: skip
    words = command(job)
    (srun,) = re.findall(r"^srun (.*)\\$", job.script, re.MULTILINE)
    if runtime == "apptainer":
        assert words[:3] == ["apptainer", "exec", "--nv"]
        assert f"{ROOT}," in words[words.index("--bind") + 1]
        assert words[words.index("--bind") + 1].endswith(",/data")
        assert words[words.index("image.sif") + 1] == "python"
    else:
        assert words[0] == "python"
        assert "--container-image=image.sif" in srun
        assert f"{tmp_path}:{tmp_path},/data:/data" in srun


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("slurm.align.array=2", r"slurm.align.array: got 2; only synthesize can be divided"),
        ("slurm.all.runtime=docker", r"slurm.synthesize.runtime: got 'docker', expected pyxis or apptainer"),
        ("slurm.evaluate.time=tomorrow", r"slurm.evaluate.time: got 'tomorrow', expected minutes"),
        ("slurm.align.time=2", r"slurm.align.time: 2 is 120 s, expected at least slurm.align.warn \(120 s\) and a min"),
        ("slurm.all.extra=[constraint]", r"slurm.synthesize.extra: got 'constraint', expected an option of sbatch"),
    ],
)
def test_resources_that_do_not_fit_are_told_by_their_key(word: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        jobs(tmp_path, word)


def test_time_is_read_as_sbatch_reads_it() -> None:
    expected = {"30": 1800, "30:15": 1815, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200,
                "UNLIMITED": float("inf"), "soon": None, "1:2:3:4": None}  # fmt: skip
    assert {text: seconds_of(text) for text in expected} == expected


def test_submitting_tells_mistakes_as_train_does_and_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "slurm" / "submit.py"), "experiment=sea_image"]
    wrong = subprocess.run([*command, "slurm.synthesise.array=2"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "unknown key slurm.synthesise" in wrong.stderr
    assert "slurm.synthesize" in wrong.stderr
    dry = subprocess.run([*command, "run=x", "--dry-run"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert dry.returncode == 0, dry.stderr
    assert f"run directory: {tmp_path}/runs/sea_image/x\n" in dry.stdout
    assert "--dependency=afterok:<synthesize>" in dry.stdout
    assert dry.stdout.count("#!/bin/bash") == 3
    assert not list(tmp_path.iterdir())
