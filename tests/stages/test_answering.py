"""The rank files of an evaluation: taken in once, never from another variant, gone with the variant they are of."""

from __future__ import annotations

from pathlib import Path

from configs.compose import compose
from datamodules.benchmark_prompts import BenchmarkPrompt
from evaluation.rows import GenerationLog
from stages.answering import take_in
from stages.runs import Run, with_defaults


def prompts(n: int) -> list[BenchmarkPrompt]:
    return [BenchmarkPrompt(f"p{i}", "micro", "text_only", "all", "harmful", f"question {i}", None) for i in range(n)]


def written(path: Path, variant: str, chosen: list[BenchmarkPrompt], answer: str) -> None:
    with GenerationLog(path, variant) as log:
        log.append(chosen, [answer] * len(chosen))


def test_answers_of_other_ranks_are_taken_in_once_and_only_what_is_missing(tmp_path: Path) -> None:
    asked = prompts(4)
    log = GenerationLog(tmp_path / "sea_sft.jsonl", "sea_sft")
    written(log.path, "sea_sft", asked[:2], "own")
    written(tmp_path / "rank-1" / "sea_sft.jsonl", "sea_sft", asked[1:3], "other")
    written(tmp_path / "rank-1" / "sea_sft.rank-8.jsonl", "sea_sft.rank-8", asked, "another variant")
    take_in(log, asked)
    assert {row.id: row.answer for row in log.rows()} == {"p0": "own", "p1": "own", "p2": "other"}
    assert [p.id for p in log.todo(asked)] == ["p3"]
    take_in(log, asked)
    assert len(log.path.read_text().splitlines()) == 3
    assert (tmp_path / "rank-1" / "sea_sft.rank-8.jsonl").exists()


def test_a_variant_that_was_trained_again_loses_the_answers_of_all_ranks(tmp_path: Path) -> None:
    place = f"run_dir={tmp_path / 'run'}"
    with Run(compose(["experiment=sea_image", place]).config) as run:
        run.stage("align/a", {"x": 1}).finish()
        run.stage("align/b", {"x": 1}).finish()
        parts = {"align/a": "a.jsonl", "align/b": "b.jsonl"}
        stage = run.stage("evaluate/generations", {"y": 1}, list(parts), parts)
        for name in ("a", "b"):
            written(stage.folder / f"{name}.jsonl", name, prompts(1), "old")
            written(stage.folder / "rank-1" / f"{name}.jsonl", name, prompts(2)[1:], "old")
    with Run(compose(["experiment=sea_image", place, "overwrite=true"]).config) as run:
        run.stage("align/a", {"x": 2}).finish()
        stage = run.stage("evaluate/generations", {"y": 1}, list(parts), parts)
        assert sorted(str(p.relative_to(stage.folder)) for p in stage.folder.rglob("*.jsonl")) == [
            "b.jsonl", "rank-1/b.jsonl",
        ]  # fmt: skip


def test_a_key_that_is_younger_than_a_run_counts_as_its_default() -> None:
    now = {"synthesis.common": 0.0, "synthesis.lr": 0.1, "variants.sea_dpo.mixture.alone": 0.0, "model.x": 3}
    assert with_defaults({"synthesis.lr": 0.2}, now) == {
        "synthesis.common": 0.0, "synthesis.lr": 0.2, "variants.sea_dpo.mixture.alone": 0.0,
    }  # fmt: skip
