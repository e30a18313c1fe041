"""Helpers of the SLURM tests: runs submitted by scripts/slurm/submit.py, disturbed with SLURM's own commands.

Nothing is imitated: sbatch, squeue, scancel and scontrol are the programs, and the jobs are train.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
from safetensors.torch import load_file

from configs.compose import last_wins
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import read_records
from stages.ranks import wait_for
from tests.conftest import ROOT

SMALL = [
    "experiment=sea_image", "synthesis.harmful=6", "synthesis.harmless=6", "synthesis.slots=3",
    # Only a signal makes a checkpoint: what goes on in the middle was saved by it.
    "synthesis.checkpoint_every_steps=100000", "variants.sea_sft.checkpoint_every_steps=100000",
    "align.variants=[sea_sft]", "variants.sea_sft.steps=24", "variants.sea_sft.batch_size=16",
    "variants.sea_sft.lr=5e-4", "evaluate.limit=2", "evaluate.max_new_tokens=8", "evaluate.variants=[sea_sft]",
    "trainer.accelerator=cpu", "logger.tensorboard=false", "slurm.all.mem=1G",
]  # fmt: skip
N = 12
SOON = 900.0
"""How long (s) something may take that takes seconds on a quiet machine."""


def slurm(*words: str) -> str:
    """Output of one of SLURM's commands."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


class Chain:
    """The jobs of one call of submit.py.

    Attributes:
        ids: stage -> job id, in order.
    """

    def __init__(self, run: Path, *overrides: str) -> None:
        self.run = run
        self.words = last_wins(*SMALL, f"run_dir={run}", *overrides)
        command = [sys.executable, "scripts/slurm/submit.py", *self.words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SOON)
        assert done.returncode == 0, done.stdout + done.stderr
        self.ids = dict(re.findall(r"^(\w+): job (\d+),", done.stdout, re.MULTILINE))
        assert f"scancel {' '.join(self.ids.values())}" in done.stdout

    def field(self, job: str, name: str) -> str:
        """`JobState`, `Restarts`, ... of a stage's job, or of a task `synthesize_2` of its array."""
        stage, _, task = job.partition("_")
        shown = slurm("scontrol", "show", "job", self.ids[stage] + ("_" + task if task else ""), "--oneliner")
        return dict(word.partition("=")[::2] for word in shown.split("\n")[0].split())[name]

    def log(self, stage: str) -> str:
        """What all starts of the stage's job (of all tasks) have said."""
        return "".join(path.read_text() for path in sorted((self.run / "slurm").glob(f"{stage}-*.out")))

    def until_stored(self, n: int) -> None:
        """Until so many embeddings are in the store: the work is in full swing."""
        self.wait(lambda: len(added(self.run)) >= n, f"{n} embeddings", "synthesize")

    def until_said(self, stage: str, text: str) -> None:
        self.wait(lambda: re.search(text, self.log(stage)), f"{text!r} in the log", stage)

    def until_state(self, job: str, *states: str) -> None:
        self.wait(lambda: self.field(job, "JobState") in states, f"{job} to be {' or '.join(states)}", job)

    def completes(self, *stages: str) -> None:
        """Waits for the end of these stages' jobs (default: all) and fails with the log of one that fails."""
        for stage in stages or self.ids:
            self.wait(lambda stage=stage: self.over(stage), f"the end of {stage}", stage)  # type: ignore[misc]
            assert set(self.states(stage)) == {"COMPLETED"}, (self.states(stage), self.log(stage))

    def over(self, stage: str) -> bool:
        return not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"} & set(self.states(stage))

    def states(self, stage: str) -> list[str]:
        """Of the job, or of every task of the array."""
        return re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", self.ids[stage], "--oneliner"))

    def wait(self, look: object, what: str, job: str) -> None:
        stage = job.partition("_")[0]
        try:
            wait_for(lambda: look() or None, what, SOON)  # type: ignore[operator]
        except TimeoutError:
            raise AssertionError(f"no {what} within {SOON:.0f} s: {self.states(stage)}\n{self.log(stage)}") from None

    def processes(self, stage: str) -> list[psutil.Process]:
        """The Python processes of the stage that run now."""
        wanted = {f"run_dir={self.run}", f"stages=[{stage}]"}
        running = psutil.process_iter(["cmdline"])
        return [p for p in running if wanted <= set(words := p.info["cmdline"] or []) and "train.py" in words[1]]


def added(run: Path) -> list[str]:
    """Ids in the order in which each journal of the store has them."""
    paths = sorted((run / "synthesize" / "store").glob("index-*.jsonl"))
    events = [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]
    return [event["id"] for event in events if event["op"] == "add"]


def same_store(run: Path, undisturbed: Path) -> None:
    """Every embedding stored once, complete, verified, and equal to the one of the undisturbed run.

    Slots do not see each other, so the only difference may be rounding: kernels may sum in another order when other
    slots stand beside one. 1e-5 of E's root mean square is far below what decides about a step (the margin).
    """
    assert json.loads((run / "synthesize" / "stage.json").read_text())["status"] == "done"
    wanted = {r.id for r in read_records(run / "synthesize" / "concepts.jsonl")}
    counts = Counter(added(run))
    assert set(counts) == wanted
    assert set(counts.values()) == {1}, "computed twice"
    assert len(counts) == N
    with (
        EmbeddingStore.open(run / "synthesize" / "store") as found,
        EmbeddingStore.open(undisturbed / "synthesize" / "store") as expected,
    ):
        summary = found.verify()
        assert (summary.embeddings, summary.duplicates, summary.unused_rows) == (N, 0, 0)
        ids = expected.ids()
        assert found.ids() == ids
        for id in ids:
            a, b = found.meta(id), expected.meta(id)
            assert (a.steps, a.status, a.verified, a.answer) == (b.steps, b.status, b.verified, b.answer), id
        for path, values in expected.batch(ids).items():
            apart = (found.batch(ids)[path] - values).abs().max() / values.square().mean().sqrt()
            assert apart < 1e-5, f"{path}: {apart} apart"


def same_adapter(run: Path, undisturbed: Path, within: float = 1e-6) -> None:
    """Weights within `within` of those of the undisturbed run, which have moved a hundred times as far."""
    file = Path("align") / "sea_sft" / "adapter" / "adapter_model.safetensors"
    found, expected = load_file(run / file), load_file(undisturbed / file)
    assert found.keys() == expected.keys()
    apart = max((found[name] - value).abs().max().item() for name, value in expected.items())
    moved = max(value.abs().max().item() for name, value in expected.items() if "lora_B" in name)
    assert apart <= within < 100 * within < moved, (apart, moved)


def signal_waits(process: psutil.Process, signum: int) -> bool:
    """Whether this signal was sent to a stopped process and waits for it to go on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)


def environment(conf: str) -> None:
    """From now on SLURM's commands speak to this cluster."""
    os.environ["SLURM_CONF"] = conf
