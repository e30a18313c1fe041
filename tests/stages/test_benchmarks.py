"""`experiment=eval_*` through `train.main`: scenario x task, adapters by key, judging over a real server, its cost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import train
from configs.compose import ConfigError, compose, last_wins
from datamodules import micro_world
from datamodules.micro_images import draw
from evaluation.judge_prompts import judge_prompt
from evaluation.rows import GenerationLog
from stages.benchmark_prompts import benchmark_prompts
from tests.loopback import LoopbackServer, Status
from tests.micro import random_adapter
from tests.mm_safetybench import write_images, write_questions

SMALL = [
    "experiment=eval_mm_safetybench", "evaluate.max_new_tokens=6", "evaluate.scenarios=null",
    "logger.tensorboard=false",
]  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_images(write_questions(tmp_path / "bench", 3), 3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter"))


def start(folder: Path, bench: Path, *overrides: str) -> int:
    return train.main(last_wins(*SMALL, f"run_dir={folder}", f"evaluate.mm_safetybench={bench}", *overrides))


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "report.json").read_text())["results"]


def one(folder: Path, **keys: str) -> dict[str, Any]:
    (found,) = [e for e in results(folder) if {"scenario": "all", **keys}.items() <= e.items()]
    return found


def api(server: LoopbackServer, tmp_path: Path) -> list[str]:
    return [
        "judge=api", f"judge.api.base_url={server.base_url}", "judge.api.key_env=", "judge.api.retries=0",
        f"judge.api.cache_dir={tmp_path / 'cache'}", "judge.api.concurrency=1", "judge.api.model=judge",
    ]  # fmt: skip


def test_scenario_by_task_with_pooled_rate_and_unweighted_mean(bench: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "run", bench) == 0
    tasks = {e["task"] for e in results(tmp_path / "run")}
    assert tasks == {"text_only", "sd", "typo", "sd_typo"}
    for task in tasks:
        rates = {e["scenario"]: e for e in results(tmp_path / "run") if (e["task"], e["metric"]) == (task, "asr")}
        assert set(rates) == {"all", "mean", "Illegal_Activitiy", "HateSpeech"}
        own = [rates["Illegal_Activitiy"]["value"], rates["HateSpeech"]["value"]]
        assert rates["mean"]["value"] == pytest.approx(sum(own) / 2)
        assert (rates["all"]["n"], rates["mean"]["n"]) == (6, 6)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "### mm_safetybench: ASR, unweighted mean of the scenarios" in text
    assert "| **mean of the scenarios** |" in text
    rows = (tmp_path / "run" / "evaluate" / "generations" / "base.jsonl").read_text().splitlines()
    assert len(rows) == 24
    assert all(json.loads(row)["asked"].startswith("List steps in detail to") for row in rows)


def test_an_adapter_is_evaluated_beside_the_base_and_counts_by_content(
    bench: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"evaluate.adapters={{sea_dpo: {adapter}}}"
    assert start(tmp_path / "run", bench, given, "evaluate.tasks=[sd]") == 0
    answers = {
        name: [json.loads(line)["answer"] for line in (tmp_path / f"run/evaluate/generations/{name}.jsonl").open()]
        for name in ("base", "sea_dpo")
    }
    assert len(answers["sea_dpo"]) == 6
    assert answers["sea_dpo"] != answers["base"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in adapter.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    files = sorted((tmp_path / "run" / "evaluate" / "generations").glob("*.jsonl"))
    before = [path.stat().st_mtime_ns for path in files]
    assert start(tmp_path / "run", bench, f"evaluate.adapters={{sea_dpo: {moved}}}", "evaluate.tasks=[sd]") == 0
    assert [path.stat().st_mtime_ns for path in files] == before
    data = bytearray((moved / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "adapter_model.safetensors").write_bytes(bytes(data))
    assert start(tmp_path / "run", bench, f"evaluate.adapters={{sea_dpo: {moved}}}", "evaluate.tasks=[sd]") == 1
    assert "evaluate.adapters.sea_dpo (sha256)" in capsys.readouterr().err


def test_adapters_that_cannot_be_used_are_told_before_anything_starts(
    bench: Path, adapter: Path, tmp_path: Path
) -> None:
    def told(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose(last_wins(*SMALL, f"evaluate.mm_safetybench={bench}", *overrides))
        return str(caught.value)

    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_text("")
    assert "holds no adapter_model.safetensors" in told(f"evaluate.adapters={{x: {tmp_path / 'pickled'}}}")
    assert f"did you mean {adapter}?" in told(f"evaluate.adapters={{x: {adapter.parent}}}")
    assert "evaluate.adapters.x: " in told("evaluate.adapters={x: none/there}")
    assert "'base' is taken" in told(f"evaluate.adapters={{base: {adapter}}}")
    assert "'sea_dpo' is taken" in told(f"evaluate.adapters={{sea_dpo: {adapter}}}", "align.variants=[sea_dpo]")
    assert "evaluate.variants: got 'yours'" in told(
        f"evaluate.adapters={{sea_dpo: {adapter}}}", "evaluate.variants=[yours]"
    )


def test_an_adapter_of_another_model_is_refused_by_name(
    bench: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v[..., :-1].contiguous() for k, v in weights.items()}, other / "adapter_model.safetensors")
    assert start(tmp_path / "run", bench, f"evaluate.adapters={{other: {other}}}", "evaluate.limit=1") == 1
    assert "the adapter of other does not fit assets/micro_llava" in capsys.readouterr().err


def by_answer(body: dict[str, Any]) -> str:
    """A judge that goes by the length of what it reads: neither always safe nor always unsafe."""
    return "unsafe" if len(body["messages"][0]["content"]) % 2 else "safe"


def test_a_failed_call_is_asked_again_alone_by_the_same_command(bench: Path, tmp_path: Path) -> None:
    with LoopbackServer(by_answer) as server:
        asked_too = ("evaluate.tasks=[text_only]", "judge.with_question=true")  # else like answers are sent once
        server.script += [Status(500), Status(500)]
        assert start(tmp_path / "run", bench, *api(server, tmp_path), *asked_too) == 0
        rate = one(tmp_path / "run", metric="asr")
        assert (rate["n"], rate["unjudged"], rate["judge"]) == (4, 2, "api:judge:question")
        asked = server.count
        assert asked == 6
        assert start(tmp_path / "run", bench, *api(server, tmp_path), *asked_too) == 0
        assert server.count == asked + 2
        rate = one(tmp_path / "run", metric="asr")
        assert (rate["n"], rate["unjudged"]) == (6, 0)


def test_both_views_of_a_judge_stand_in_one_report(bench: Path, tmp_path: Path) -> None:
    with LoopbackServer(by_answer) as server:
        assert start(tmp_path / "run", bench, *api(server, tmp_path), "evaluate.tasks=[sd]", "judge.both=true") == 0
        sent = [seen.body["messages"][0]["content"] for seen in server.requests]
    shown = [text for text in sent if "Question: " in text]
    answers = [json.loads(line)["answer"] for line in (tmp_path / "run/evaluate/generations/base.jsonl").open()]
    assert len(shown) == 6
    assert len(sent) == 6 + len(set(answers))  # the same answer alone is sent once
    assert all("Question: List steps in detail to fold a paper kite" in text for text in shown)  # not the image's text
    for judge, question in (("api:judge", False), ("api:judge:question", True)):
        rate = one(tmp_path / "run", metric="asr", judge=judge)
        rows = GenerationLog(tmp_path / "run/evaluate/generations/base.jsonl", "base").rows()
        unsafe = sum(len(judge_prompt(row, question)) % 2 for row in rows)
        assert (rate["value"], rate["n"]) == (pytest.approx(unsafe / 6), 6)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| variant | task | `api:judge` | `api:judge:question` |" in text


def test_too_dear_a_judge_is_refused_before_anything_is_generated(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ["judge.price_in=1000", "judge.price_out=1000", "judge.with_question=true"]
    with LoopbackServer(by_answer) as server:
        assert start(tmp_path / "run", bench, *api(server, tmp_path), *prices, "judge.max_cost=0.01") == 1
        told = capsys.readouterr().err
        assert "at most 24 calls" in told
        assert "judge.max_cost is 0.01" in told
        assert not (tmp_path / "run" / "evaluate" / "generations" / "base.jsonl").exists()
        assert start(tmp_path / "run", bench, *api(server, tmp_path), *prices, "judge.max_cost=100") == 0
        asked = server.count
        assert asked >= 6
        # All is judged: nothing is left to pay, so the smallest cap will do.
        assert start(tmp_path / "run", bench, *api(server, tmp_path), *prices, "judge.max_cost=0") == 0
        assert server.count == asked


def test_a_judge_stops_where_the_money_ends_and_goes_on_with_more(bench: Path, tmp_path: Path) -> None:
    """The server bills a thousand times what the estimate expects of a reply."""
    with LoopbackServer(lambda body: "safe " * 8000) as server:
        command = [*api(server, tmp_path), "judge.price_in=0", "judge.price_out=1", "judge.with_question=true"]
        many = write_images(write_questions(tmp_path / "many", 40), 40)
        assert start(tmp_path / "run", many, *command, "judge.max_cost=0.1", "evaluate.tasks=[sd]") == 0
        rate = one(tmp_path / "run", metric="asr")
        assert (rate["n"], rate["unjudged"]) == (64, 16)  # the batch in which it ended was sent
        log = [json.loads(line) for line in (tmp_path / "run/evaluate/judgements.jsonl").open()]
        assert sum(str(j["error"]).startswith("not sent: 0.5") for j in log) == 16
        assert start(tmp_path / "run", many, *command, "judge.max_cost=1", "evaluate.tasks=[sd]") == 0
        assert server.count == 80
        assert one(tmp_path / "run", metric="asr")["n"] == 80


def prompts(*overrides: str) -> list[Any]:
    return benchmark_prompts(compose(last_wins(*SMALL, *overrides)).config)


def test_tasks_scenarios_and_limit_choose_prompts(bench: Path) -> None:
    place = f"evaluate.mm_safetybench={bench}"
    chosen = prompts(place, "evaluate.tasks=[sd,typo]", "evaluate.scenarios=[HateSpeech]", "evaluate.limit=2")
    assert [(p.task, p.scenario, p.id[-1]) for p in chosen] == [
        ("sd", "HateSpeech", "0"), ("sd", "HateSpeech", "1"), ("typo", "HateSpeech", "0"), ("typo", "HateSpeech", "1"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"has no scenario 'Hatespeech'.*did you mean HateSpeech"):
        prompts(place, "evaluate.scenarios=[Hatespeech]")
    with pytest.raises(ValueError, match="MM-SafetyBench has no task 'tipo'"):
        prompts(place, "evaluate.tasks=[tipo]")
    with pytest.raises(ValueError, match=r"evaluate\.tasks: micro has no task 'sd'"):
        prompts(place, "evaluate.benchmarks=[micro]", "evaluate.tasks=[sd]", "evaluate.scenarios=null")


def test_a_model_of_another_modality_is_refused_unless_text_alone_is_asked(bench: Path) -> None:
    place = [f"evaluate.mm_safetybench={bench}", "model.modality=audio"]
    with pytest.raises(ValueError, match=r"mm_safetybench are of modality image, model\.modality is audio"):
        prompts(*place)
    assert len(prompts(*place, "evaluate.tasks=[text_only]")) == 6


def test_a_broken_benchmark_is_told_before_there_is_a_run(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench / "imgs" / "02-HateSpeech" / "SD" / "1.jpg").unlink()
    assert start(tmp_path / "run", bench) == 2
    assert "HateSpeech/SD/1.jpg: no such image" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_ones_own_is_evaluated_with_all_its_requests(tmp_path: Path) -> None:
    lines = ["id,media,text,request,scenario,task,expected"]
    for i, phrase in enumerate(micro_world.phrases("heldout")[:4]):
        draw(phrase.words, "bright", random.Random(i), test=True).save(tmp_path / f"{i}.png")
        lines.append(f"{i},{i}.png,Read the words in the image.,reading,a,words,{' '.join(phrase.words)}")
    (tmp_path / "prompts.csv").write_text("\n".join(lines) + "\n")
    words = ["evaluate.benchmarks=[folder]", f"evaluate.folder={tmp_path}", "evaluate.max_new_tokens=12"]
    assert train.main(last_wins(*SMALL, f"run_dir={tmp_path / 'run'}", *words)) == 0
    rate = one(tmp_path / "run", metric="reading_accuracy")
    assert (rate["benchmark"], rate["task"], rate["value"], rate["n"]) == ("folder", "words", 1.0, 4)
