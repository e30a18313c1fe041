"""Several devices, as real processes on CPUs: synthesis divides its concepts, alignment equals one device's."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import train
from configs.compose import last_wins
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import read_records
from evaluation.rows import GenerationLog
from stages.ranks import wait_for
from tests.conftest import ROOT
from tests.micro import micro

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=sea_image", "synthesis.harmful=4", "synthesis.harmless=4", "synthesis.slots=2",
    "synthesis.max_steps=12", "synthesis.margin=0", "synthesis.retries=0", "synthesis.include_failed=true",
    "synthesis.checkpoint_every_steps=1", "logger.tensorboard=false", "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
VARIANTS = ("text_sft", "sea_sft", "sea_dpo")
TWO = ["trainer=ddp", "trainer.devices=2"]


def start(run: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", *last_wins(*SMALL, f"run_dir={run}", *overrides)]
    environment = {**os.environ, **env}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: subprocess.Popen[str], seconds: float = 600) -> str:
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


def added(run: Path) -> dict[str, list[str]]:
    """Writer's journal -> the ids that it stored, in order."""
    return {
        path.stem: [e["id"] for e in map(json.loads, path.read_text().splitlines()) if e["op"] == "add"]
        for path in sorted((run / "synthesize" / "store").glob("index-*.jsonl"))
    }


def complete(run: Path) -> dict[str, Any]:
    """The stage's result, after checking that every concept was stored once and every good one was marked once."""
    record = json.loads((run / "synthesize" / "stage.json").read_text())
    assert record["status"] == "done"
    wanted = {r.id for r in read_records(run / "synthesize" / "concepts.jsonl")}
    counts = Counter(id for ids in added(run).values() for id in ids)
    assert set(counts) == wanted
    assert set(counts.values()) == {1}
    events = [
        json.loads(line)
        for path in (run / "synthesize" / "store").glob("index-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    with EmbeddingStore.open(run / "synthesize" / "store") as store:
        summary = store.verify()
        assert (summary.embeddings, summary.duplicates) == (8, 0)
        assert sorted(e["id"] for e in events if e["op"] == "mark") == store.ids(status="ok")
    assert record["result"]["summary"]["n"] == 8
    left = {p.name for p in (run / "synthesize").iterdir()}
    assert not {name for name in left if name.startswith(("slots", "part"))}
    return record["result"]


def test_a_rank_ends_its_share_before_the_other_has_begun(tmp_path: Path) -> None:
    """Started by hand as torchrun would: with a process group the first would wait for the second at once."""
    run = tmp_path / "run"
    launcher = {"TORCHELASTIC_RUN_ID": "by-hand", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    first = start(run, *TWO, "stages=[synthesize]", RANK="0", LOCAL_RANK="0", **launcher)
    part = run / "synthesize" / "part-0.json"
    wait_for(lambda: part.exists() or first.poll() is not None or None, "the first rank's share", 600)
    assert first.poll() is None, first.communicate()[0]
    (alone,) = added(run).values()
    assert len(alone) == 4
    second = start(run, *TWO, "stages=[synthesize]", RANK="1", LOCAL_RANK="1", **launcher)
    end(first)
    end(second)
    result = complete(run)
    assert result["ranks"] == 2
    records = [r.id for r in read_records(run / "synthesize" / "concepts.jsonl")]
    assert {name: sorted(ids) for name, ids in added(run).items()} == {
        "index-0": sorted(records[0::2]),
        "index-1": sorted(records[1::2]),
    }


@pytest.mark.parametrize("victim", ["leader", "other"])
def test_after_kill_9_of_one_process_the_other_ends_and_a_single_one_completes_the_work(
    tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    leader = start(run, *TWO, "stages=[synthesize]")
    busy = lambda: (sum(map(bool, added(run).values())) == 2 or leader.poll() is not None) or None  # noqa: E731
    wait_for(busy, "an embedding by each", 600)
    assert leader.poll() is None, leader.communicate()[0]
    (other,) = psutil.Process(leader.pid).children()
    os.kill(leader.pid if victim == "leader" else other.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([other], timeout=30)
    assert not alive, "it outlived its leader"
    assert leader.wait(timeout=60) == -signal.SIGKILL  # Lightning watches the processes that it started
    before = Counter(id for ids in added(run).values() for id in ids)
    assert 0 < len(before) < 8
    assert train.main([*SMALL, f"run_dir={run}", "stages=[synthesize]"]) == 0
    assert complete(run)["ranks"] == 1


SETTINGS = [
    f"align.variants=[{','.join(VARIANTS)}]",
    # Adam moves a weight by the learning rate however small its gradient, and so makes rounding large: a low one.
    *(f"variants.{v}.{k}" for v in VARIANTS for k in ("steps=4", "batch_size=6", "lr=5e-4")),
    "variants.sea_sft.micro_batch_size=2",  # another number of backward passes on each rank
    "variants.sea_sft.embedding_noise=0.1",
    "evaluate.limit=2", "evaluate.max_new_tokens=8", "evaluate.variants=[base,sea_sft]",
]  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages by one process."""
    run = tmp_path_factory.mktemp("devices") / "one"
    assert train.main([*SMALL, f"run_dir={run}", *SETTINGS]) == 0
    return run


def copied(one: Path, run: Path) -> Path:
    """A run that has the embeddings of `one` and nothing else yet."""
    shutil.copytree(one, run, ignore=lambda folder, names: {"align", "evaluate", "report.json"} & set(names))
    return run


def equal_adapters(one: Path, two: Path, variants: Sequence[str]) -> None:
    for variant in variants:
        a, b = (load_file(r / "align" / variant / "adapter" / "adapter_model.safetensors") for r in (one, two))
        assert a.keys() == b.keys()
        moved = max(v.abs().max().item() for k, v in a.items() if "lora_B" in k)
        apart = max((a[k] - b[k]).abs().max().item() for k in a)
        assert apart < 1e-6 < 1e-4 < moved, (variant, apart, moved)
        losses = [read_losses(r / "align" / variant) for r in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_adapters_of_two_devices_equal_those_of_one_and_each_prompt_is_answered_once(one: Path, tmp_path: Path) -> None:
    two = copied(one, tmp_path / "two")
    end(start(two, *TWO, "stages=[align,evaluate]", *SETTINGS))
    equal_adapters(one, two, VARIANTS)
    for variant in ("base", "sea_sft"):
        answers = []
        for run in (one, two):
            path = run / "evaluate" / "generations" / f"{variant}.jsonl"
            assert len(path.read_text().splitlines()) == 14
            answers.append({row.id: row.answer for row in GenerationLog(path, variant).rows()})
        assert answers[0] == answers[1]
    assert reports(one) == reports(two)
    assert not list((two / "evaluate" / "generations").glob("rank-*"))


def test_adapters_of_two_devices_with_sharded_weights_equal_those_of_one(one: Path, tmp_path: Path) -> None:
    two = copied(one, tmp_path / "two")
    shards = ["trainer=fsdp2", "trainer.devices=2", "trainer.activation_checkpointing=true"]  # which changes nothing
    end(start(two, *shards, "stages=[align]", *SETTINGS))
    equal_adapters(one, two, VARIANTS)


FULL = [
    "align.variants=[sea_sft]", "variants.sea_sft.full_finetune=true", "variants.sea_sft.steps=4",
    "variants.sea_sft.lr=1e-4", "variants.sea_sft.batch_size=6", "variants.sea_sft.micro_batch_size=2",
    "variants.sea_sft.checkpoint_every_steps=2", "stages=[align]",
]  # fmt: skip


def test_sharded_full_fine_tuning_equals_that_of_one_device_and_one_goes_on_where_two_stopped(
    one: Path, tmp_path: Path
) -> None:
    alone, two = copied(one, tmp_path / "alone"), copied(one, tmp_path / "two")
    assert train.main([*SMALL, f"run_dir={alone}", *FULL]) == 0
    end(start(two, "trainer=fsdp2", "trainer.devices=2", *FULL))
    weights = [load_file(r / "align" / "sea_sft" / "adapter" / "model.safetensors") for r in (alone, two)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]) < 2e-6
    record = two / "align" / "sea_sft" / "stage.json"
    state = json.loads(record.read_text())
    record.write_text(json.dumps(state | {"status": "running"}))  # as if it had died after its last checkpoint
    shutil.rmtree(two / "align" / "sea_sft" / "adapter")
    assert train.main([*SMALL, f"run_dir={two}", *FULL]) == 0
    again = load_file(two / "align" / "sea_sft" / "adapter" / "model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in weights[1].items())


def test_what_is_not_trained_in_shards_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=pretrain_micro", f"run_dir={tmp_path / 'run'}", "trainer=fsdp2", "trainer.devices=1"]
    assert train.main([*words, "logger.tensorboard=false", "trainer.accelerator=cpu"]) == 1
    assert "is not trained in shards; take trainer=ddp" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_gpu_in_shards_and_bfloat16_learns_what_a_cpu_does(one: Path, tmp_path: Path) -> None:
    run = copied(one, tmp_path / "run")
    gpu = ["trainer=fsdp2", "trainer.devices=1", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
    end(start(run, *gpu, "stages=[align]", *SETTINGS))
    for variant in VARIANTS:
        losses = [read_losses(r / "align" / variant) for r in (one, run)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_merged_checkpoint_answers_as_model_and_adapter_do(one: Path, tmp_path: Path) -> None:
    run = copied(one, tmp_path / "run")
    few = ["align.variants=[text_sft]", "variants.text_sft.steps=3", "variants.text_sft.merge=true"]
    assert train.main([*SMALL, f"run_dir={run}", "stages=[align]", *few]) == 0
    folder = run / "align" / "text_sft"
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged").eval()
    mllm = micro()
    apart = PeftModel.from_pretrained(mllm.model, folder / "adapter").eval()
    inputs = mllm.prompts.blank_inputs("What is shown?")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, apart(**inputs).logits, rtol=1e-4, atol=1e-4)


def reports(run: Path) -> list[Any]:
    return json.loads((run / "report.json").read_text())["results"]


def read_losses(folder: Path) -> list[float]:
    """`align/loss` of every logged step."""
    (path,) = folder.glob("metrics*/metrics.csv")
    with path.open(newline="") as file:
        return [float(row["align/loss"]) for row in csv.DictReader(file) if row["align/loss"]]
