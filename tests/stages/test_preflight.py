"""What is found wrong before a stage runs: exit code 2, file or key named, no run folder, no model loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from configs.compose import ConfigError, compose, last_wins
from stages.preflight import preflight
from tests.pictures import drawn

ROW = {"question": "How?", "chosen": "No.", "rejected": "So.", "harmful": True}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    run = folder / "run"
    assert train.main(last_wins("experiment=sea_image", f"run_dir={run}", *overrides)) == 2
    assert not run.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("stages", ["synthesize", "align,evaluate"])
def test_wrong_columns(stages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "d.jsonl", {"prompt": "q", "answer": "a"})
    for bad_rows in ("stop", "skip"):
        told = refused(tmp_path, capsys, "data=jsonl", data, f"stages=[{stages}]", f"data.bad_rows={bad_rows}")
        assert "d.jsonl:1: no column 'question', 'chosen'" in told
        assert "data.columns.question=... data.columns.chosen=..." in told


def test_a_detector_that_is_not_there_stops_a_detoxifier_before_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "d.jsonl", {"question": "q", "accepted": "a", "rejected": "b"})
    more = ("experiment=detoxifier", "data=jsonl", data, "backbone=micro")
    told = refused(tmp_path, capsys, *more, f"detoxifier.detector={tmp_path}/none")
    assert f"detoxifier.detector: {tmp_path}/none does not exist" in told
    assert "python train.py experiment=harm_detector run=x" in told
    (tmp_path / "run0" / "train_detector" / "detector").mkdir(parents=True)
    (tmp_path / "run0" / "train_detector" / "detector" / "detector.json").write_text("{}")
    told = refused(tmp_path, capsys, *more, f"detoxifier.detector={tmp_path}/run0")
    assert f"did you mean detoxifier.detector={tmp_path}/run0/train_detector/detector?" in told


def test_a_folder_in_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for stage, more in (("synthesize", ()), ("train_detector", ("backbone=micro",))):
        told = refused(tmp_path, capsys, "data=jsonl", f"data.path={tmp_path}/folder", f"stages=[{stage}]", *more)
        assert "no data in this folder" in told
    assert "expected a .jsonl file" in refused(tmp_path, capsys, f"real.path={tmp_path}/folder", "stages=[encode]")
    told = refused(tmp_path, capsys, "data=jsonl", "data.format=csv", "data.path=no.csv")
    assert "data.path: no.csv does not exist" in told


def test_media_rows_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "x"}\n')
    told = refused(tmp_path, capsys, f"real.path={tmp_path}/bad.jsonl", "stages=[encode]", "real.bad_rows=skip")
    assert "bad.jsonl:1: key 'media', 'question', 'chosen', 'harmful' are missing" in told


def test_dpo_without_a_rejected_answer_names_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROW | {"question": f"How, {i}?"} for i in range(30)]
    del rows[27]["rejected"]
    data = written(tmp_path / "d.jsonl", *rows)
    settings = ("data=jsonl", data, "data.holdout=0", "synthesis.harmful=null")
    told = refused(tmp_path, capsys, *settings)
    assert "d.jsonl:28: no rejected answer, which DPO needs (variants text_dpo, sea_dpo)" in told
    media = drawn(tmp_path, 2)
    values = [json.loads(line) for line in media.read_text().splitlines()]
    values[1].pop("rejected")
    written(media, *values)
    told = refused(tmp_path, capsys, f"real.path={media}", "align.variants=[sea_sft,sea_dpo]")
    assert "rows.jsonl:2: no rejected answer, which DPO needs (variants sea_dpo)" in told


@pytest.mark.parametrize(
    ("words", "group"),
    [
        (("judge=api", "stages=[synthesize,evaluate]"), "judge.api"),
        (("concepts=api",), "concepts.api"),
        (("stages=[generate_pairs]",), "generator.api"),
    ],
)
def test_a_key_that_is_not_in_the_environment(
    words: tuple[str, ...],
    group: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    told = refused(tmp_path, capsys, *words, f"{group}.key_env=NO_KEY")
    assert "environment variable NO_KEY is not set" in told
    assert f"set {group}.key_env to the name of the variable" in told


def test_a_key_is_not_asked_for_where_nothing_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["experiment=sea_image", "concepts=api", "judge=api", f"run_dir={tmp_path}"]
    preflight(compose([*words, "stages=[align]"]).config)
    preflight(compose([*words, "judge.api.key_env=", "concepts.api.key_env="]).config)
    (tmp_path / "synthesize").mkdir()
    done = compose([*words, "stages=[synthesize,align]"]).config
    with pytest.raises(ConfigError, match="concepts=api needs a key"):
        preflight(done)
    (tmp_path / "synthesize" / "stage.json").write_text('{"status": "done"}')
    preflight(done)


def test_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused(tmp_path, capsys, "trainer.accelerator=gpux")
    assert "trainer.accelerator: got 'gpux', expected one of auto, cpu, gpu, " in told
    assert "did you mean gpu?" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "trainer.accelerator=gpu: torch sees no GPU" in refused(tmp_path, capsys, "trainer.accelerator=gpu")


def test_a_plugin_that_cannot_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("import no_such_module_here\n")
    told = refused(tmp_path, capsys, f"model.plugin={tmp_path}/own.py")
    assert f"model.plugin={tmp_path}/own.py: {tmp_path}/own.py:1: ModuleNotFoundError" in told


def test_a_task_that_a_drawn_benchmark_lacks_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=sea_video", f"run_dir={tmp_path / 'run'}"]
    assert train.main([*words, "evaluate.tasks=[typo]"]) == 2
    assert "micro has no task 'typo'" in capsys.readouterr().err
    assert train.main([*words, "evaluate.benchmarks=[micro_tasks]", "evaluate.tasks=[tipo]"]) == 2
    assert "did you mean typo?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
