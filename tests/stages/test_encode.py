"""Real media in the store: mixed with synthetic embeddings, resumed after kill -9; bad rows, shapes that do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from configs.compose import last_wins
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import read_records
from mllm.encode import MediaEncoder
from tests.conftest import ROOT
from tests.micro import micro
from tests.pictures import drawn, write_rows
from tests.tiled import tiled

SMALL = [
    "experiment=sea_image", "synthesis.harmful=2", "synthesis.harmless=2", "synthesis.slots=4",
    "synthesis.max_steps=3", "synthesis.retries=0", "synthesis.include_failed=true", "synthesis.verify=false",
    "align.variants=[sea_sft]", "variants.sea_sft.steps=3", "variants.sea_sft.batch_size=8",
    "logger.tensorboard=false", "logger.csv=false",
]  # fmt: skip


def start(run: Path, rows: Path, stages: str, *overrides: str) -> int:
    return train.main(last_wins(*SMALL, f"run_dir={run}", f"real.path={rows}", f"stages=[{stages}]", *overrides))


def result(run: Path, stage: str) -> dict[str, Any]:
    record = json.loads((run / stage / "stage.json").read_text())
    assert record["status"] == "done"
    return record["result"]


def store_of(run: Path) -> EmbeddingStore:
    return EmbeddingStore.open(run / "synthesize" / "store")


def changed(rows: Path, *changes: tuple[int, dict[str, Any]]) -> Path:
    """The file with keys of some rows replaced."""
    values = [json.loads(line) for line in rows.read_text().splitlines()]
    for i, change in changes:
        values[i] |= change
    return write_rows(rows.parent, values)


def test_alignment_trains_on_synthetic_and_real_embeddings_together(tmp_path: Path) -> None:
    rows, run = drawn(tmp_path, 4), tmp_path / "run"
    assert start(run, rows, "synthesize,encode,align") == 0
    counts = {"encoded": 4, "new": 4, "skipped": 0, "store": {"synthetic": 4, "real": 4}}
    assert result(run, "encode") == counts
    aligned = result(run, "align/sea_sft")
    assert (aligned["embeddings"], aligned["real_embeddings"]) == (8, 4)
    with store_of(run) as store:
        assert (store.verify().real, store.meta(store.ids(source="real")[0]).media[:9]) == (4, "pictures/")
        assert store.ids(source="real", harmful=True) == [i for i in store.ids(source="real") if store.meta(i).harmful]
        assert len(store.ids(source="real", harmful=True)) == 2


def test_the_store_holds_what_the_encoder_makes_of_the_picture(tmp_path: Path) -> None:
    rows, run = drawn(tmp_path, 3), tmp_path / "run"
    assert start(run, rows, "encode", "real.batch_size=2") == 0
    encoder = MediaEncoder(micro())
    with store_of(run) as store:
        for i, line in enumerate(rows.read_text().splitlines()):
            image = Image.open(tmp_path / "pictures" / f"{i}.png").convert("RGB")
            for path, e in encoder.encode([encoder.prepare(image)]).items():
                (id,) = [i for i in store.ids() if i.startswith(json.loads(line)["id"] + "@")]
                stored = store.batch([id])[path]
                assert (stored - e).abs().max() < 1e-4 < e.std()


def test_a_run_may_begin_with_real_media_and_encodes_nothing_twice(tmp_path: Path) -> None:
    rows, run = drawn(tmp_path, 3), tmp_path / "run"
    assert start(run, rows, "encode") == 0
    assert result(run, "encode")["store"] == {"synthetic": 0, "real": 3}
    assert start(run, rows, "synthesize,encode") == 0
    assert result(run, "encode") == {"encoded": 3, "new": 0, "skipped": 0, "store": {"synthetic": 4, "real": 3}}


def test_more_rows_are_a_changed_configuration_and_only_they_are_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = drawn(tmp_path, 2), tmp_path / "run"
    assert start(run, rows, "encode") == 0
    drawn(tmp_path, 4)
    assert start(run, rows, "encode") == 1
    assert "real.path's content" in capsys.readouterr().err
    assert start(run, rows, "encode", "overwrite=true") == 0
    assert (result(run, "encode")["encoded"], result(run, "encode")["new"]) == (4, 2)


def test_a_changed_picture_is_encoded_anew_and_the_old_one_is_not_used(tmp_path: Path) -> None:
    rows, run = drawn(tmp_path, 2), tmp_path / "run"
    assert start(run, rows, "encode") == 0
    before = {r.id for r in read_records(run / "encode" / "records.jsonl")}
    (tmp_path / "pictures" / "0.png").write_bytes((tmp_path / "pictures" / "1.png").read_bytes())
    changed(rows, (0, {"scenario": "other"}))
    assert start(run, rows, "encode", "overwrite=true") == 0
    assert result(run, "encode") == {"encoded": 2, "new": 1, "skipped": 0, "store": {"synthetic": 0, "real": 3}}
    after = {r.id for r in read_records(run / "encode" / "records.jsonl")}
    assert len(before & after) == 1
    assert len(after) == 2
    with store_of(run) as store:
        (first, second) = (store.batch([id]) for id in sorted(after))
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_a_row_may_have_the_id_of_a_text_record(tmp_path: Path) -> None:
    rows, run = drawn(tmp_path, 2), tmp_path / "run"
    assert start(run, rows, "synthesize") == 0
    with store_of(run) as store:
        changed(rows, (1, {"id": store.ids()[0]}))
    assert start(run, rows, "encode,align") == 0
    aligned = result(run, "align/sea_sft")
    assert (aligned["embeddings"], aligned["real_embeddings"]) == (6, 2)


def damaged(folder: Path) -> Path:
    """Four rows: sound, a truncated picture, a missing one, one outside."""
    rows = drawn(folder, 4)
    picture = folder / "pictures" / "1.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    (folder / "pictures" / "2.png").unlink()
    return changed(rows, (3, {"media": "../outside.png"}))


@pytest.mark.parametrize(
    ("line", "reason"), [(2, "pictures/1.png: cannot be read as an image"), (3, "2.png: no such file"), (4, "outside")]
)
def test_a_bad_row_stops_the_stage_and_is_named(
    tmp_path: Path, line: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = damaged(tmp_path)
    kept = rows.read_text().splitlines()
    rows.write_text("\n".join(text if n in (1, line) else "" for n, text in enumerate(kept, 1)))
    assert start(tmp_path / "run", rows, "encode") == 1
    told = capsys.readouterr().err
    assert f"rows.jsonl:{line}: " in told
    assert reason in told
    assert "real.bad_rows=skip" in told


def test_bad_rows_are_skipped_and_counted_by_setting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, damaged(tmp_path), "encode", "real.bad_rows=skip") == 0
    assert result(run, "encode") == {"encoded": 1, "new": 1, "skipped": 3, "store": {"synthetic": 0, "real": 1}}
    skipped = json.loads((run / "encode" / "skipped.json").read_text())
    assert sorted(row["where"].rpartition(":")[2] for row in skipped) == ["2", "3", "4"]
    assert "skipped: " in (run / "run.log").read_text()


def test_a_picture_of_another_size_than_the_stores_says_how_to_mend_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, model = drawn(tmp_path, 2), tmp_path / "model"
    mllm = tiled()
    mllm.model.save_pretrained(model)
    mllm.processor.save_pretrained(model)
    Image.new("RGB", (128, 64), (90, 9, 9)).save(tmp_path / "pictures" / "1.png")
    ours = f"model.path={model}"
    assert start(tmp_path / "run", rows, "encode", ours) == 1
    told = capsys.readouterr().err
    assert "rows.jsonl:2: " in told
    assert "1.png (128 x 64 px): the processor makes pixel_values of shape (1, 3, 3, 64, 64)" in told
    assert "expected (1, 2, 3, 64, 64)" in told
    assert "real.resize=true" in told
    assert start(tmp_path / "run", rows, "encode", ours, "real.resize=true", "overwrite=true") == 0
    assert result(tmp_path / "run", "encode")["encoded"] == 2


def test_a_stage_without_a_file_is_a_mistaken_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, f"run_dir={tmp_path}", "stages=[encode]"]) == 2
    assert "real.path is not set" in capsys.readouterr().err
    assert start(tmp_path / "run", tmp_path / "none.jsonl", "align") == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err


def test_alignment_with_real_media_wants_them_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, run = drawn(tmp_path, 2), tmp_path / "run"
    assert start(run, rows, "synthesize,align") == 1
    assert "encode is not done in this run; add encode to stages" in capsys.readouterr().err


@pytest.mark.slow
def test_after_kill_9_the_rest_is_encoded_and_nothing_twice(tmp_path: Path) -> None:
    n = 400
    rows, run = drawn(tmp_path, 1), tmp_path / "run"
    first = json.loads(rows.read_text())
    write_rows(tmp_path, [first | {"id": f"real-{i}"} for i in range(n)])
    command = [*SMALL, f"run_dir={run}", f"real.path={rows}", "stages=[encode]", "real.batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = run / "synthesize" / "store" / "index-0.jsonl"
    end = time.monotonic() + 600
    while not (journal.exists() and journal.stat().st_size > 3000):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with store_of(run) as store:
        done = len(store)
    assert 0 < done < n
    assert start(run, rows, "encode", "real.batch_size=50") == 0
    assert result(run, "encode")["new"] == n - done
    added = [e["id"] for e in map(json.loads, journal.read_text().splitlines()) if e["op"] == "add"]
    assert len(added) == len(set(added)) == n
