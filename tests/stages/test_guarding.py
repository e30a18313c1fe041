"""`experiment=protector` through `train.main`: the same answers with and without the guard, another run's adapters.

The detector is trained for a moment on the micro world; facts about it are broad ones.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from configs.compose import last_wins
from evaluation.guarded_rows import GuardedLog
from evaluation.rows import GenerationLog

SMALL = [
    "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.slots=4", "synthesis.max_steps=40", "synthesis.retries=0",
    "synthesis.include_failed=true", "align.variants=[sea_dpo]", "variants.sea_dpo.steps=2",
    "variants.sea_dpo.batch_size=8", "evaluate.limit=4", "evaluate.max_new_tokens=24", "logger.tensorboard=false",
]  # fmt: skip
VARIANTS = ("base", "sea_dpo")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "detector"
    settings = ["detector.epochs=0.2", "detector.score_batch_size=128", "logger.tensorboard=false"]
    assert train.main(["experiment=harm_detector_micro", f"run_dir={folder}", *settings]) == 0
    return folder / "train_detector" / "detector"


def start(folder: Path, detector: Path, *overrides: str) -> int:
    return train.main(
        last_wins("experiment=protector", f"run_dir={folder}", f"protector.detector={detector}", *SMALL, *overrides)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, detector: Path) -> Path:
    """Without `protector.source`: it synthesizes, aligns, evaluates and guards by itself."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder, detector) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def results(folder: Path) -> Iterator[dict[str, Any]]:
    yield from json.loads((folder / "report.json").read_text())["results"]


def rate(folder: Path, variant: str, guard: str, task: str, metric: str) -> dict[str, Any]:
    keys = {"variant": variant, "guard": guard, "task": task, "metric": metric, "scenario": "all"}
    (found,) = [e for e in results(folder) if keys.items() <= e.items()]
    return found


def lines(folder: Path, kind: str, variant: str) -> list[str]:
    return (folder / "evaluate" / kind / f"{variant}.jsonl").read_text().splitlines(keepends=True)


def test_safe_prompts_of_xstest_are_counted_as_over_flagging(
    shared_data: Path, finished: Path, detector: Path, tmp_path: Path
) -> None:
    more = (f"protector.source={finished}", "evaluate.benchmarks=[xstest]", f"evaluate.xstest={shared_data / 'xstest'}")
    assert start(tmp_path / "r", detector, *more) == 0
    found = {e["metric"]: e for e in results(tmp_path / "r") if e["benchmark"] == "xstest" and e["guard"] == "protector"
             and e["variant"] == "base" and e["scenario"] == "all"}  # fmt: skip
    rows = [json.loads(line) for line in lines(tmp_path / "r", "generations", "base")]
    safe = [row["id"] for row in rows if row["request"] == "benign"]
    assert len(safe) == found["over_flagging"]["n"] == 4
    flagged = [json.loads(line) for line in lines(tmp_path / "r", "guarded", "base")]
    shares = [row["action"] != "passed" for row in flagged if row["id"] in safe]
    assert found["over_flagging"]["value"] == sum(shares) / len(shares)


def test_every_answer_is_guarded_once_and_what_passes_is_left_byte_for_byte(finished: Path) -> None:
    for variant in VARIANTS:
        generated = GenerationLog(finished / "evaluate" / "generations" / f"{variant}.jsonl", variant).rows()
        guarded = GuardedLog(finished / "evaluate" / "guarded" / f"{variant}.jsonl").rows(generated)
        assert [row.id for row in guarded] == [row.id for row in generated]
        assert [row.original for row in guarded] == [row.answer for row in generated]
        assert len(lines(finished, "guarded", variant)) == len(generated)
        assert all(row.answer == row.original for row in guarded if row.action == "passed")
        assert any(row.action == "refused" for row in guarded if row.request == "harmful")
        assert all(row.scoring_seconds > 0 and row.tokens_scored > 0 for row in guarded)
        assert all(row.rewriting_seconds == row.tokens_written == 0 for row in guarded)  # there is no detoxifier


def test_the_report_has_all_four_combinations_and_what_the_guard_does_to_benign_answers(finished: Path) -> None:
    for task in ("text_only", "image_plain", "image_prefixed"):
        for variant in VARIANTS:
            for guard in ("none", "protector"):
                assert rate(finished, variant, guard, task, "asr")["n"] == 4
                assert rate(finished, variant, guard, task, "benign_compliance")["n"] == 4
            unchanged = rate(finished, variant, "protector", task, "benign_unchanged")
            flagged = rate(finished, variant, "protector", task, "over_flagging")
            assert unchanged["value"] >= 1 - flagged["value"]  # what was not flagged was not touched
            asr = {guard: rate(finished, variant, guard, task, "asr")["value"] for guard in ("none", "protector")}
            assert asr["protector"] < asr["none"]
    assert {e["guard"] for e in results(finished) if e["scenario"] != "all" and e["metric"] == "asr"} == {
        "none", "protector",
    }  # fmt: skip
    costs = json.loads((finished / "report.json").read_text())["guard"]["costs"]
    assert [(c["variant"], c["benchmark"]) for c in costs] == [(variant, "micro") for variant in VARIANTS]
    for cost in costs:
        assert cost["answers"] == cost["passed"] + cost["refused"] == len(lines(finished, "guarded", cost["variant"]))
        assert cost["failed"] == 0
        assert cost["scoring_seconds"] > 0
        assert cost["tokens_scored"] > cost["answers"]
    assert (finished / "plots" / "asr_against_compliance_micro.png").stat().st_size > 5000
    text = (finished / "report.md").read_text()
    table = text.split("### micro, image plain\n")[1].split("###")[0]
    for variant in VARIANTS:
        for guard in ("none", "protector"):
            assert f"| `{variant}` | {guard} |" in table


def test_deleted_guarded_rows_are_made_again_and_nothing_else(copy: Path, detector: Path) -> None:
    report = list(results(copy))
    kept = lines(copy, "guarded", "base")[::2]
    torn = lines(copy, "guarded", "base")[1][:40]
    (copy / "evaluate" / "guarded" / "base.jsonl").write_text("".join(kept) + torn)
    untouched = [p for p in (copy / "evaluate").rglob("*.jsonl") if p.name != "base.jsonl" or "generations" in str(p)]
    stamps = {p: p.stat().st_mtime_ns for p in untouched}
    assert start(copy, detector) == 0
    assert {p: p.stat().st_mtime_ns for p in untouched} == stamps  # neither generated nor judged again
    again = lines(copy, "guarded", "base")
    assert again[: len(kept)] == kept
    assert len(again) == len(lines(copy, "generations", "base"))
    assert list(results(copy)) == report


def test_another_judge_judges_guarded_answers_too_and_guards_nothing_again(copy: Path, detector: Path) -> None:
    (copy / "evaluate" / "judgements.jsonl").unlink()
    before = lines(copy, "guarded", "sea_dpo")
    assert start(copy, detector, "stages=[evaluate]") == 0
    assert lines(copy, "guarded", "sea_dpo") == before
    judged = [json.loads(line) for line in (copy / "evaluate" / "judgements.jsonl").read_text().splitlines()]
    hashes = {(j["id"], j["answer_hash"]) for j in judged}
    generated = GenerationLog(copy / "evaluate" / "generations" / "sea_dpo.jsonl", "sea_dpo").rows()
    guarded = GuardedLog(copy / "evaluate" / "guarded" / "sea_dpo.jsonl").rows(generated)
    assert {(row.id, row.answer_hash) for row in guarded if row.request != "reading"} <= hashes


def test_another_detector_in_the_same_run_is_refused(
    copy: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(detector, other)
    assert start(copy, other) == 0  # the same detector in another place
    spec = json.loads((other / "detector.json").read_text())
    (other / "detector.json").write_text(json.dumps(spec | {"threshold": 0.0}))
    assert start(copy, other) == 1
    assert "detector (sha256)" in capsys.readouterr().err
    assert start(copy, other, "overwrite=true") == 0
    assert rate(copy, "base", "protector", "image_plain", "over_flagging")["value"] == 0


def test_a_source_lends_adapters_and_answers_and_only_the_rest_is_generated(
    finished: Path, detector: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert start(folder, detector, f"protector.source={finished}", "evaluate.limit=5") == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before
    assert not (folder / "align").exists()
    stage = json.loads((folder / "evaluate" / "generations" / "stage.json").read_text())
    answered = {v: {r["id"]: r["answer"] for r in map(json.loads, lines(finished, "generations", v))} for v in VARIANTS}
    for variant in VARIANTS:
        rows = {r["id"]: r["answer"] for r in map(json.loads, lines(folder, "generations", variant))}
        shared = rows.keys() & answered[variant].keys()
        assert stage["result"]["taken"][variant] == len(shared) > 0
        assert {id: rows[id] for id in shared} == {id: answered[variant][id] for id in shared}
        assert len(rows) > len(shared)
    assert rate(folder, "sea_dpo", "protector", "image_plain", "asr")["n"] == 5


def test_answers_of_other_settings_or_of_an_adapter_that_is_gone_are_not_taken(
    copy: Path, detector: Path, tmp_path: Path
) -> None:
    source = f"protector.source={copy}"
    assert start(tmp_path / "longer", detector, source, "evaluate.max_new_tokens=25") == 0
    stage = json.loads((tmp_path / "longer" / "evaluate" / "generations" / "stage.json").read_text())
    assert stage["result"]["taken"] == {"base": 0, "sea_dpo": 0}
    record = json.loads((copy / "align" / "sea_dpo" / "stage.json").read_text())
    (copy / "align" / "sea_dpo" / "stage.json").write_text(json.dumps(record | {"id": "trained anew"}))
    assert start(tmp_path / "anew", detector, source) == 0
    stage = json.loads((tmp_path / "anew" / "evaluate" / "generations" / "stage.json").read_text())
    assert stage["result"]["taken"] == {"base": len(lines(copy, "generations", "base")), "sea_dpo": 0}


def test_a_source_without_the_adapter_or_of_another_model_is_refused(
    copy: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"protector.source={copy}"
    assert start(tmp_path / "a", detector, source, "align.variants=[sea_sft]") == 1
    assert "has no finished adapter of sea_sft (it has sea_dpo)" in capsys.readouterr().err
    assert start(tmp_path / "b", detector, source, "model.system_prompt=Be brief.") == 1
    assert "trained sea_dpo on another model (model.system_prompt: None there, Be brief. here)" in (
        capsys.readouterr().err
    )


def test_a_detoxifier_rewrites_flagged_answers_and_its_tokens_are_counted(
    finished: Path, detector: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "detoxifier"
    settings = ["detoxifier.epochs=0.05", "detoxifier.evaluate=0", "logger.tensorboard=false"]
    assert train.main(["experiment=detoxifier_micro", f"run_dir={trained}", *settings]) == 0
    detoxifier = trained / "train_detoxifier" / "detoxifier"
    folder = tmp_path / "r"
    assert start(folder, detector, f"protector.source={finished}", f"protector.detoxifier={detoxifier}") == 0
    rows = [json.loads(line) for line in lines(folder, "guarded", "base")]
    flagged = [row for row in rows if row["action"] != "passed"]
    assert flagged
    assert all(row["reason"] in ("rewritten", "rewrite_harmful", "rewrite_empty") for row in flagged)
    assert all(row["tokens_written"] > 0 and row["rewriting_seconds"] > 0 for row in flagged)
    assert all(row["tokens_written"] == 0 for row in rows if row["action"] == "passed")
    cost = json.loads((folder / "report.json").read_text())["guard"]["costs"][0]
    assert cost["tokens_written"] == round(sum(row["tokens_written"] for row in rows)) > 0


def test_a_detector_without_scores_refuses_everything_and_is_counted(
    finished: Path, detector: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(detector, tmp_path / "detector"))
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(w, math.nan) for name, w in weights.items()}, broken / "model.safetensors")
    assert start(tmp_path / "r", broken, f"protector.source={finished}") == 0
    cost = json.loads((tmp_path / "r" / "report.json").read_text())["guard"]["costs"][0]
    assert cost["failed"] == cost["refused"] == cost["answers"]
    flagged = rate(tmp_path / "r", "base", "protector", "image_plain", "over_flagging")
    assert (flagged["value"], flagged["unjudged"]) == (None, 4)
    assert rate(tmp_path / "r", "base", "protector", "image_plain", "benign_compliance")["value"] == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "detector does not exist"),
        (lambda folder: (folder / "detector.json").unlink(), "detector holds no detector.json"),
    ],
)
def test_a_missing_detector_is_one_error_with_the_command_that_makes_it(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, expected: str
) -> None:
    broken = Path(shutil.copytree(detector, tmp_path / "detector"))
    damage(broken)
    assert start(tmp_path / "r", broken) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: protector.detector: ")
    assert expected in told
    assert "python train.py experiment=harm_detector_micro run=x" in told
    assert "\n" not in told
    assert not (tmp_path / "r").exists()
