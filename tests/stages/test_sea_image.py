"""The whole experiment, small, through `train.main`: stages, resumption, report, faults."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import train
from configs.compose import last_wins
from configs.keys import leaves
from datamodules.embedding_store import EmbeddingStore
from evaluation.objective import report_objectives
from scripts import show_sample
from stages.replays import FILE, read_replays
from tests.micro import config, micro
from tests.wandb_server import inspected

SMALL = [
    "experiment=sea_image", "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.slots=4",
    "synthesis.max_steps=60", "synthesis.retries=0", "align.variants=[text_sft,sea_dpo]",
    "variants.text_sft.steps=2", "variants.sea_dpo.steps=2",
    "variants.sea_dpo.batch_size=8", "variants.sea_dpo.mixture.replay=1",
    "trainer.log_every_n_steps=1", "evaluate.limit=2", "evaluate.max_new_tokens=12",
    "synthesis.include_failed=true",
]  # fmt: skip


def start(folder: Path, *overrides: str) -> int:
    return train.main(last_wins(*SMALL, f"run_dir={folder}", *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder, "logger.wandb=true") == 0
    return folder


def test_report_has_every_variant_task_and_metric(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    rows = {(r["variant"], r["task"], r["metric"]) for r in report["results"] if r["scenario"] == "all"}
    for variant in ("base", "text_sft", "sea_dpo"):
        for task in ("text_only", "image_plain", "image_prefixed"):
            assert {(variant, task, "asr"), (variant, task, "benign_compliance")} <= rows
        assert (variant, "image_plain", "reading_accuracy") in rows
    assert report["synthesis"]["n"] == 6
    markdown = (finished / "report.md").read_text()
    for name in ("asr_against_compliance_micro", "synthesis_loss", "align_sft_loss"):
        assert f"plots/{name}.png" in markdown
        assert (finished / "plots" / f"{name}.png").stat().st_size > 5000


def test_every_generation_is_a_row_that_can_be_judged_again(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "evaluate/generations/base.jsonl").read_text().splitlines()]
    assert len(rows) == 14  # 2 of each (task, request), 3 tasks x 2 requests + reading
    assert {"id", "task", "scenario", "request", "prompt", "answer", "variant"} <= set(rows[0])
    (finished / "evaluate" / "judgements.jsonl").unlink()
    assert start(finished, "stages=[evaluate]") == 0
    assert (finished / "evaluate" / "judgements.jsonl").stat().st_size > 0


def test_figstep_and_xstest_are_evaluated_like_the_embedded_benchmark(shared_data: Path, tmp_path: Path) -> None:
    only = ("stages=[evaluate]", "evaluate.variants=[base]", "evaluate.benchmarks=[figstep,xstest]")
    folders = (f"evaluate.figstep={shared_data / 'figstep'}", f"evaluate.xstest={shared_data / 'xstest'}")
    assert start(tmp_path / "r", *only, *folders) == 0
    results = json.loads((tmp_path / "r" / "report.json").read_text())["results"]
    counts = {(r["benchmark"], r["task"], r["metric"]): r["n"] for r in results if r["scenario"] == "all"}
    for cell in (
        ("figstep", "image_typo", "asr"),
        ("figstep", "text_only", "refusal_rate"),
        ("xstest", "text_only", "refusal_rate"),
        ("xstest", "text_only", "benign_compliance"),
    ):
        assert counts[cell] == 2


def test_the_same_command_again_computes_nothing(finished: Path) -> None:
    shards = {p: p.stat().st_mtime_ns for p in (finished / "synthesize" / "store").glob("*.safetensors")}
    adapter = finished / "align" / "sea_dpo" / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert start(finished) == 0
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
    assert adapter.stat().st_mtime_ns == before


def test_a_variant_trained_anew_costs_the_others_no_answer(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    files = {v: run / "evaluate" / "generations" / f"{v}.jsonl" for v in ("base", "text_sft", "sea_dpo")}
    before = {v: path.stat().st_mtime_ns for v, path in files.items()}
    judged = (run / "evaluate" / "judgements.jsonl").read_text()
    assert start(run, "stages=[align,evaluate]", "variants.text_sft.lr=0.01", "overwrite=true") == 0
    assert {v for v, path in files.items() if path.stat().st_mtime_ns != before[v]} == {"text_sft"}
    assert (run / "evaluate" / "judgements.jsonl").read_text().startswith(judged)


@pytest.mark.parametrize("change", ["synthesis.lr=0.123", "trainer.precision=bf16-mixed", "align.refusal=No."])
def test_a_changed_setting_in_the_same_run_is_refused_by_name(
    finished: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(finished, change) == 1
    assert change.partition("=")[0] in capsys.readouterr().err


def test_every_setting_that_may_not_change_is_recorded_by_a_stage(finished: Path) -> None:
    recorded = {key for path in finished.rglob("stage.json") for key in json.loads(path.read_text())["made_from"]}
    not_free = {leaf.key for leaf in leaves(config()) if not leaf.field.metadata.get("free")}
    names = {"experiment", "run", "run_dir", "stages", "align.variants"}  # they say what is done, not how
    # Judging is outside of all stages (evaluation/judges.py), the others' stages are not in this experiment.
    elsewhere = ("judge", "real", "variants", "backbone", "pairs", "detector", "detoxifier", "generator", "protector")
    elsewhere += ("pretrain", "media", "build", "export")  # media decides nothing about pictures (stages/media.py)
    # Keys of modalities that are not built in are recorded where they apply (stages/runs.py).
    names |= {"model.plugin", "model.blank_shape", "model.blank_level"}
    assert not {key for key in not_free - recorded - names if key.split(".")[0] not in elsewhere}


def test_replayed_answers_are_written_once_and_read_by_a_resumed_run(finished: Path, tmp_path: Path) -> None:
    known = read_replays(finished / "align" / "sea_dpo" / FILE)
    assert known
    assert all(answer for pairs in known.values() for _, answer in pairs)
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    folder = run / "align" / "sea_dpo"
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(stage | {"status": "running"}))
    lines = (folder / FILE).read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | {"answer": "line\u2028separator"}, ensure_ascii=False)
    (folder / FILE).write_text("\n".join([changed, *lines[1:]]) + "\n")
    assert start(run, "stages=[align]") == 0
    assert json.loads((folder / FILE).read_bytes().split(b"\n")[0])["answer"] == "line\u2028separator"


def test_show_sample_follows_a_record_and_names_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["show_sample.py", *args])
        show_sample.main()
        return capsys.readouterr().out

    out = shown(str(finished), "--variant", "sea_dpo")
    for part in ("control sample, style", "embedding store", "example, replay", "same scenario, base", "verdict"):
        assert part in out
    assert len(shown(str(finished), "--answers").splitlines()) == 12
    for args in ([str(tmp_path)], [str(finished), "--id", "nobody"], [str(finished), "--variant", "sea_ppo"]):
        with pytest.raises(SystemExit, match="error: "):
            shown(*args)


def test_adapter_is_safetensors_and_loads_in_plain_peft(finished: Path) -> None:
    folder = finished / "align" / "sea_dpo" / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
    model = PeftModel.from_pretrained(micro().model, folder)
    assert any("lora" in n for n, _ in model.named_parameters())


def test_the_adapters_card_tells_what_it_is_and_its_code_loads_it(finished: Path) -> None:
    folder = finished / "align" / "sea_dpo" / "adapter"
    card = (folder / "README.md").read_text()
    assert "More Information Needed" not in card
    result = json.loads((folder.parent / "stage.json").read_text())["result"]
    for part in ("research artefact", "`assets/micro_llava`", "`sea_dpo`", "- sft_weight: `12.0`", "torch 2"):
        assert part in card
    assert f"{result['examples']} examples, {result['embeddings']} embeddings" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(folder))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert isinstance(scope["model"], PeftModel)


def test_no_pickle_is_left_in_a_run_but_lightning_checkpoints(finished: Path) -> None:
    suffixes = {p.suffix for p in finished.rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl"}
    for path in finished.rglob("*.ckpt"):
        torch.load(path, weights_only=True)


def test_wandb_ran_offline_in_one_run_for_all_stages(finished: Path) -> None:
    (file,) = finished.rglob("offline-run-*/*.wandb")
    records = inspected(file.parent)
    assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [0]
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    logged = {name for row in history for name in row}
    assert {"synthesize/synthesis/loss", "text_sft/align/loss", "sea_dpo/align/loss"} <= logged
    report = json.loads((finished / "report.json").read_text())
    found = report_objectives(report["results"])
    assert set(found) == {"base", "text_sft", "sea_dpo"}
    assert {name: history[-1][f"objective/{name}"] for name in found} == found
    assert all(history[-1][f"eval/{r['variant']}/{r['benchmark']}/{r['task']}/{r['metric']}"] == r["value"]
               for r in report["results"] if r["scenario"] == "all")  # fmt: skip
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact"]
    store, adapters = "embedding-store", ["adapter", "adapter"]
    assert sorted(a["type"] for a in artifacts if a.get("use_after_commit")) == [*adapters, store]
    assert sorted(a["type"] for a in artifacts if not a.get("use_after_commit")) == [*adapters, store, "run_table"]
    media = file.parent / "files" / "media"
    (table,) = media.rglob("samples*.table.json")
    rows = json.loads(table.read_text())
    assert {"prompt", "answer", "variant"} <= set(rows["columns"])
    assert rows["data"]
    for plot in (finished / "plots").glob("*.png"):
        assert list((media / "images" / "plots").glob(f"{plot.stem}*.png"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def poison(path: Path) -> None:
    tensors = load_file(path)
    save_file({k: torch.full_like(v, float("nan")) for k, v in tensors.items()}, path)


@pytest.mark.parametrize("damage", [truncate, poison])
def test_a_damaged_shard_stops_align_and_is_named(
    finished: Path, damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("wandb"))  # it holds dangling links
    shutil.rmtree(copy / "align")
    (shard, *_) = (copy / "synthesize" / "store").glob("*.safetensors")
    damage(shard)
    assert start(copy, "align.variants=[sea_dpo]", "stages=[align]") == 1
    assert shard.name in capsys.readouterr().err


def test_align_before_synthesize_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path / "r", "stages=[align]", "align.variants=[sea_dpo]") == 1
    assert "synthesize is not done" in capsys.readouterr().err


def test_an_empty_data_set_is_an_error_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert start(tmp_path / "r", "data=jsonl", f"data.path={path}") == 2
    assert not (tmp_path / "r").exists()
    assert "empty.jsonl" in capsys.readouterr().err


def test_a_phrase_without_words_is_unverified_and_does_not_stop_synthesis(tmp_path: Path) -> None:
    concept = {"kind": "product", "sentence": "x", "instruction": "Where is this product?"}
    rows = [
        {"id": f"r{i}", "question": f"Where is it, {i}?", "chosen": "Here.", "rejected": "No.", "harmful": False}
        | {"concept": {"phrase": phrase, **concept}}
        for i, phrase in enumerate(["\U0001f511", "the lock"])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.path={path}", "data.holdout=0", "data.limit=null"]
    assert start(tmp_path / "r", *data, "synthesis.max_steps=200", "synthesis.retries=1", "stages=[synthesize]") == 0
    with EmbeddingStore.open(tmp_path / "r" / "synthesize" / "store") as store:
        assert store.meta("r0").status == "ok"
        assert (store.meta("r0").verified, store.meta("r0").judge) == (None, "phrase")
        assert store.meta("r1").verified is not None


def test_an_embedding_store_of_another_model_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = finished / "synthesize" / "store"
    header = json.loads((store / "store.json").read_text())
    other = tmp_path / "store"
    shutil.copytree(store, other)
    (other / "store.json").write_text(json.dumps(header | {"model_key": "someone/else@abc"}))
    assert start(tmp_path / "r", "stages=[align]", "align.variants=[sea_dpo]", f"store.path={other}") == 1
    assert "someone/else" in capsys.readouterr().err


def test_an_external_store_of_other_settings_or_weights_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(finished / "synthesize" / "store", tmp_path / "store")
    again = ("stages=[synthesize]", f"store.path={store}")
    assert start(tmp_path / "same", *again) == 0
    assert start(tmp_path / "other", *again, "synthesis.margin=5") == 1
    assert "6 of 6 embeddings were made with other settings or concepts" in capsys.readouterr().err
    model = shutil.copytree("assets/micro_llava", tmp_path / "model")
    header = json.loads((store / "store.json").read_text())
    moved = header["model_key"].replace("assets/micro_llava@", f"{model}@")
    (store / "store.json").write_text(json.dumps(header | {"model_key": moved}))
    align = ("stages=[align]", "align.variants=[sea_dpo]", f"store.path={store}", f"model.path={model}")
    assert start(tmp_path / "moved", *align) == 0
    weights = load_file(model / "model.safetensors")
    save_file({k: v * 1.05 for k, v in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    assert start(tmp_path / "swapped", *align) == 1
    assert "model_key is" in capsys.readouterr().err


def test_an_external_store_serves_another_run(finished: Path, tmp_path: Path) -> None:
    store = finished / "synthesize" / "store"
    folder = tmp_path / "r"
    assert start(folder, "stages=[align]", "align.variants=[sea_dpo]", f"store.path={store}") == 0
    with EmbeddingStore.open(store) as opened:
        assert json.loads((folder / "align/sea_dpo/stage.json").read_text())["result"]["embeddings"] == len(
            opened.ids()
        )
