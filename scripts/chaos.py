"""Kills a run with SIGKILL at random moments, starts the same command again, and checks that nothing was lost.

    python scripts/chaos.py --kills 10                 # the embedded model: synthesize, encode and align
    python scripts/chaos.py --kills 3 --seed 1 -- synthesis.harmful=8 synthesis.harmless=8

Checked whenever a run is complete: every concept and every picture is in the store once and was stored once (journals);
the store verifies; the adapter loads. If that comes before the last kill, another run begins. Attempts are forked from
a process that has imported everything, so that the kills fall into the work and not into the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must not inherit running threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from peft import PeftConfig

import stages.align
import stages.encode
import stages.synthesize
import train
from configs.compose import last_wins
from datamodules import micro_world
from datamodules.embedding_store import EmbeddingStore
from datamodules.micro_images import draw
from datamodules.records import read_records

assert stages.align
assert stages.encode
assert stages.synthesize

SMALL = [
    "synthesis.harmful=12", "synthesis.harmless=12", "synthesis.slots=8", "synthesis.checkpoint_every_steps=5",
    "align.variants=[sea_sft]", "variants.sea_sft.steps=30", "variants.sea_sft.checkpoint_every_steps=3",
    "logger.tensorboard=false", "real.batch_size=2",
]  # fmt: skip


def pictures(folder: Path, n: int = 24) -> Path:
    """A JSONL file and `n` pictures beside it."""
    folder.mkdir()
    rows = []
    for i, phrase in enumerate(micro_world.phrases("train")[:n]):
        draw(phrase.words, "bright", random.Random(i), test=False).save(folder / f"{i}.png")
        values = micro_world.record(phrase).to_json() | {"id": f"picture-{i}", "media": f"{i}.png"}
        rows.append(json.dumps({key: value for key, value in values.items() if key != "source"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    return folder / "rows.jsonl"


def start(argv: list[str], log: Path) -> int:
    """Forks an attempt; its output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = train.main(argv)
    os._exit(code)


def wait(pid: int, seconds: float | None) -> int | None:
    """Exit status, or None if it still runs after `seconds` of its own CPU time (a busy machine changes nothing)."""
    process = psutil.Process(pid)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        times = process.cpu_times()
        if seconds is not None and times.user + times.system > seconds:
            return None
        time.sleep(0.02)


def check(run: Path) -> str:
    """Raises AssertionError with what was lost; returns a summary."""
    folder = run / "synthesize" / "store"
    with EmbeddingStore.open(folder) as store:
        summary = store.verify()
        made = [run / "synthesize" / "concepts.jsonl", run / "encode" / "records.jsonl"]
        wanted = {r.id for path in made for r in read_records(path)}
        assert set(store.ids()) == wanted, f"{len(wanted ^ set(store.ids()))} embeddings are missing or too many"
    events = [json.loads(line) for path in folder.glob("index-*.jsonl") for line in path.read_text().splitlines()]
    added = Counter(e["id"] for e in events if e.get("op") == "add")
    twice = [i for i, n in added.items() if n > 1]
    assert not twice, f"computed twice: {twice}"
    PeftConfig.from_pretrained(run / "align" / "sea_sft" / "adapter")
    kinds = f"{summary.embeddings - summary.real} synthetic and {summary.real} real embeddings"
    counts = f"{kinds}, {summary.ok} ok, each stored once; {summary.shards} shards verify"
    return f"{counts}; the adapter loads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=8.0, help="longest life of an attempt (CPU-seconds)")
    parser.add_argument("overrides", nargs="*", help="further keys of train.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seawall-chaos-") as scratch:
        return torment(args.kills, random.Random(args.seed), args.longest, args.overrides, Path(scratch))


def torment(wanted: int, rng: random.Random, longest: float, overrides: list[str], scratch: Path) -> int:
    """Runs, each killed until it is complete, until `wanted` kills have fallen; returns the exit code."""
    rows, log = pictures(scratch / "pictures"), scratch / "log"
    kills, attempts, runs = 0, 0, 0
    while runs == 0 or kills < wanted:
        run = scratch / f"run-{runs}"
        argv = ["experiment=sea_image", "stages=[synthesize,encode,align]", f"run_dir={run}", f"real.path={rows}"]
        while True:
            attempts += 1
            pid = start(last_wins(*argv, *SMALL, *overrides), log)
            status = wait(pid, rng.uniform(0.3, longest) if kills < wanted else None)
            if status is not None:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            begun = [name for name in ("synthesize", "encode", "align") if (run / name / "stage.json").exists()]
            begun += ["align"] if (run / "align").exists() else []
            print(f"kill {kills}: in {begun[-1] if begun else 'the start'}", flush=True)
        if os.waitstatus_to_exitcode(status) != 0:
            print(log.read_text()[-3000:])
            print(f"attempt {attempts} failed with {os.waitstatus_to_exitcode(status)}")
            return 1
        try:
            print(f"run {runs + 1} is complete: {check(run)}", flush=True)
        except AssertionError as error:
            print(f"LOST: {error}")
            return 1
        runs += 1
    print(f"complete after {kills} kills: {runs} runs, nothing lost, nothing computed twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
