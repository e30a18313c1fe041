"""Shards of a synthesis: each does its part in one run directory, the last one finishes; as if done at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train
from configs.compose import ConfigError, compose
from configs.schema import Config
from datamodules.embedding_store import EmbeddingStore
from stages.runs import Run
from tests.conftest import ROOT

SMALL = [
    "experiment=sea_image", "stages=[synthesize]", "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.slots=2",
    "logger.tensorboard=false", "trainer.accelerator=cpu",
]  # fmt: skip


def shard(run: Path, i: int, n: int) -> list[str]:
    return [*SMALL, f"run_dir={run}", f"synthesis.shards={n}", f"synthesis.shard={i}"]


def status(run: Path, stage: str = "synthesize") -> str:
    return str(json.loads((run / stage / "stage.json").read_text())["status"])


def stored(run: Path) -> dict[str, list[Any]]:
    """id -> steps, outcome and E of every embedding."""
    with EmbeddingStore.open(run / "synthesize" / "store") as store:
        assert store.verify().duplicates == 0
        found: dict[str, list[Any]] = {}
        for id in store.ids():
            meta = store.meta(id)
            values = [value.tolist() for value in store.batch([id]).values()]
            found[id] = [meta.steps, meta.status, meta.verified, meta.answer, values]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*SMALL, f"run_dir={run}"]) == 0
    return run


@pytest.mark.slow
def test_shards_that_start_at_once_make_what_one_process_makes(whole: Path, tmp_path: Path) -> None:
    commands = [[sys.executable, "train.py", *shard(tmp_path, i, 3)] for i in range(3)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(c, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    found, expected = stored(tmp_path), stored(whole)
    assert found.keys() == expected.keys()
    for id, (*facts, values) in found.items():
        assert facts == expected[id][:-1]
        for mine, theirs in zip(values, expected[id][-1], strict=True):
            assert close(mine, theirs), id
    record, undivided = (json.loads((r / "synthesize" / "stage.json").read_text()) for r in (tmp_path, whole))
    assert record["status"] == "done"
    parts = ("n", "osr", "vsr", "steps_mean")
    assert [record["result"]["summary"][k] for k in parts] == [undivided["result"]["summary"][k] for k in parts]
    assert len(list((tmp_path / "synthesize" / "store").glob("index-*.jsonl"))) == 3
    assert len(json.loads((tmp_path / "manifest.json").read_text())["starts"]) == 3


def close(a: Any, b: Any) -> bool:
    """Nested lists of numbers, equal but for rounding."""
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    return abs(a - b) <= 1e-4


@pytest.mark.slow
def test_a_whole_run_completes_what_shards_have_left(whole: Path, tmp_path: Path) -> None:
    assert train.main(shard(tmp_path, 1, 2)) == 0
    assert status(tmp_path, "synthesize/shard-1-of-2") == "done"
    assert status(tmp_path) == "running"
    assert len(stored(tmp_path)) == 3
    began = time.monotonic()
    assert train.main(shard(tmp_path, 1, 2)) == 0  # done already
    again = time.monotonic() - began
    assert train.main([*SMALL, f"run_dir={tmp_path}"]) == 0
    assert status(tmp_path) == "done"
    assert stored(tmp_path).keys() == stored(whole).keys()
    assert not list((tmp_path / "synthesize").rglob("slots*"))
    launches = json.loads((tmp_path / "synthesize" / "stage.json").read_text())["result"]
    assert launches["summary"]["n"] == 6
    assert train.main(shard(tmp_path, 0, 2)) == 0  # another division, or the same, after the end: nothing to do
    assert again < 60


def test_what_cannot_be_a_shard_is_told_at_once(tmp_path: Path) -> None:
    for words, told in {
        ("synthesis.shards=4",): "synthesis.shard=0 to 3",
        ("synthesis.shards=4", "synthesis.shard=4"): "less than synthesis.shards, which is 4",
        ("synthesis.shard=0", "stages=[synthesize,align]"): "stages=\\[synthesize\\] alone",
    }.items():
        others = [w for w in SMALL if not (w.startswith("stages=") and any(x.startswith("stages=") for x in words))]
        with pytest.raises(ConfigError, match=told):
            compose([*others, f"run_dir={tmp_path}", *words])


def config(place: Path, shard: int | None, shards: int = 1) -> Config:
    cfg = Config(experiment="test", run_dir=str(place))
    cfg.synthesis.shard, cfg.synthesis.shards = shard, shards
    return cfg


def held(place: Path, shard: int, shards: int) -> subprocess.Popen[str]:
    """A process that has a shard open until its input ends."""
    program = (
        "import sys\nfrom configs.schema import Config\nfrom stages.runs import Run\n"
        f"cfg = Config(experiment='test', run_dir={str(place)!r})\n"
        f"cfg.synthesis.shard, cfg.synthesis.shards = {shard}, {shards}\n"
        "with Run(cfg):\n    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_shards_keep_others_out_and_let_each_other_in(tmp_path: Path) -> None:
    first = held(tmp_path, 0, 2)
    try:
        with pytest.raises(ValueError, match=rf"in use by shard-0-of-2, process {first.pid} on .*run=NAME"):
            Run(config(tmp_path, None))
        with Run(config(tmp_path, 1, 2)) as run, run.turn():
            pass
        with (
            Run(config(tmp_path, 1, 3)) as run,
            pytest.raises(ValueError, match="shard-0-of-2 is at work here, and this is shard-1-of-3"),
            run.turn(),
        ):
            pass
        with pytest.raises(ValueError, match=f"in use by shard-0-of-2, process {first.pid}"):
            Run(config(tmp_path, 0, 2))
    finally:
        first.communicate("")
    with Run(config(tmp_path, None)):
        pass


def test_what_is_made_anew_is_not_pulled_from_under_another_shard(tmp_path: Path) -> None:
    with Run(config(tmp_path, 0, 2)) as run, run.turn():
        (run.stage("synthesize", {"lr": 1}).folder / "concepts.jsonl").touch()
    first = held(tmp_path, 0, 2)
    try:
        changed = config(tmp_path, 1, 2)
        changed.overwrite = True
        with Run(changed) as run, run.turn(), pytest.raises(ValueError, match="shard-0-of-2 at work there"):
            run.stage("synthesize", {"lr": 2})
    finally:
        first.communicate("")
    assert (tmp_path / "synthesize" / "concepts.jsonl").exists()
