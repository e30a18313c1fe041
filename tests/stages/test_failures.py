"""One of two real processes fails: both end, the message that is seen is that of the one that failed, and memory that
does not suffice is told with stage, batch and what to lower."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lightning_modules.at_work import AtWork, OutOfMemory, explained, is_out_of_memory
from stages.failures import Failures, is_consequence
from stages.telling import RankFailed
from tests.conftest import ROOT

# A plugin of the run under test: `mllm.plugins` loads it in every process; in one of them it makes a function fail.
FAILING = """
import os
from stages import ranks

def fails(*args, **kwargs):
    raise ValueError("clip.wav: 44100 Hz, expected 16000")

if ranks.global_rank() in ({rank!r}, "0." + {rank!r}):
    import {module} as place
    place.{name} = fails
"""
PLACES = {
    "synthesize": ("lightning_modules.embedding_optimizer", "slot_losses"),
    "align": ("lightning_modules.sft_aligner", "sft_loss"),
    "evaluate": ("lightning_modules.answerer", "answer"),
}
SMALL = [
    "experiment=sea_image", "synthesis.harmful=4", "synthesis.harmless=4", "synthesis.slots=2",
    "synthesis.max_steps=4", "synthesis.margin=0", "synthesis.retries=0", "synthesis.include_failed=true",
    "logger.tensorboard=false", "trainer.accelerator=cpu", "align.variants=[text_sft]", "variants.text_sft.steps=60",
    "evaluate.limit=2", "evaluate.max_new_tokens=8", "evaluate.variants=[base]", "synthesis.verify=false",
]  # fmt: skip


def command(tmp_path: Path, stage: str, rank: str, *more: str) -> list[str]:
    module, name = PLACES[stage]
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING.format(rank=rank, module=module, name=name))
    words = [*SMALL, f"stages=[{stage}]", f"run_dir={tmp_path / 'run'}", f"model.plugin={plugin}", "trainer.devices=2"]
    return [str(ROOT / "train.py"), *words, *more]


def failed(processes: list[subprocess.Popen[str]]) -> tuple[list[str], float]:
    """What each wrote to stderr, and how many seconds after the first failure the last one ended."""
    told: float | None = None
    until = time.monotonic() + 240
    while any(p.poll() is None for p in processes):
        assert time.monotonic() < until, "it runs on"
        if told is None and any(p.poll() is not None for p in processes):
            told = time.monotonic()
        time.sleep(0.1)
    took = time.monotonic() - (told or time.monotonic())
    return [p.communicate()[1] for p in processes], took


def first_error(text: str) -> str:
    return next(line for line in text.splitlines() if "error" in line.lower())


def launched(words: list[str], **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "trainer", "rank"),
    # The two ways in which ranks work: each for itself (so are answers made), and together (so does ddp align).
    [("synthesize", "ddp", "1"), ("align", "fsdp2", "0")],
)
def test_a_rank_that_fails_is_heard_first_and_all_end(tmp_path: Path, stage: str, trainer: str, rank: str) -> None:
    process = launched(command(tmp_path, stage, rank, f"trainer={trainer}"))
    began = time.monotonic()
    _, err = process.communicate(timeout=240)
    assert first_error(err).endswith(f"error: rank {rank}: clip.wav: 44100 Hz, expected 16000"), err
    assert process.returncode == 1, err
    written = [json.loads(p.read_text()) for p in (tmp_path / "run" / ".failures").iterdir()]
    assert time.time() - min(w["at"] for w in written) < 30, time.monotonic() - began
    log = (tmp_path / "run" / "run.log").read_text()
    assert "clip.wav: 44100 Hz, expected 16000" in log[: log.index("Traceback")] or rank == "0"
    assert "gloo" not in err


@pytest.mark.slow
def test_torchrun_shows_the_message_and_ends_with_an_error(tmp_path: Path) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = launched([*run, *command(tmp_path, "align", "1", "trainer=ddp")])
    _, err = process.communicate(timeout=240)
    assert first_error(err).endswith("error: rank 1: clip.wav: 44100 Hz, expected 16000"), err
    assert process.returncode == 1
    assert "Root Cause" in err
    assert err.split("Root Cause")[1].count("clip.wav: 44100 Hz, expected 16000") == 1


@pytest.mark.slow
def test_tasks_of_slurm_end_without_srun_ending_them(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    env |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1"}
    words = command(tmp_path, "align", "1", "trainer=ddp")
    tasks = [launched(words, **env, SLURM_PROCID=r, SLURM_LOCALID=r) for r in "01"]
    (leader, other), took = failed(tasks)
    assert first_error(other) == "error: rank 1: clip.wav: 44100 Hz, expected 16000"
    assert first_error(leader) == "error: rank 1 failed: clip.wav: 44100 Hz, expected 16000"
    assert [task.returncode for task in tasks] == [1, 1]
    assert took < 30


def test_only_a_broken_connection_waits_for_another_rank() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    assert is_consequence(gloo)
    assert is_consequence(RankFailed())
    wrapped = ValueError("the fit failed")
    wrapped.__cause__ = gloo
    assert is_consequence(wrapped)
    assert not is_consequence(ValueError("clip.wav: 44100 Hz"))
    assert not is_consequence(KeyError("NCCL"))


def test_ranks_hear_each_other_and_earlier_launches_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    one, before = Failures(tmp_path, "now"), Failures(tmp_path, "yesterday")
    one.watch()
    before.watch()
    before.tell(ValueError("old"))
    one.tell(ValueError("mine"))
    one.tell(ValueError("a later one"))
    monkeypatch.setenv("RANK", "0")
    leader = Failures(tmp_path, "now")
    assert leader.cause(RuntimeError("Connection reset by peer")) is None  # it has started nobody yet
    leader.end(failed=True)  # the watcher must not break off this test
    leader.watch()
    cause = leader.cause(RuntimeError("Connection reset by peer"))
    assert str(cause) == "rank 1 failed: mine"
    assert leader.cause(ValueError("my own")) is None
    leader.tell(ValueError("mine"))  # the same on every rank: said once
    assert capsys.readouterr().err.splitlines() == ["error: rank 1: old", "error: rank 1: mine"]
    leader.forget()
    assert sorted(f.message for f in one.others()) == ["mine"]
    for each in (one, before, leader):
        each.end(failed=False)


def test_what_is_worked_on_is_in_the_message() -> None:
    work = AtWork("align/sea_sft", {"variants.sea_sft.micro_batch_size": 32})
    work.on(12, lambda: (32, "examples", 341))
    with pytest.raises(OutOfMemory) as caught, work.told():
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 7 bytes. Error code 12 (Cannot allocate memory)"
        )
    first, second = str(caught.value).splitlines()
    assert first == (
        "out of memory in stage align/sea_sft at step 12, 32 examples, the longest of 341 tokens (DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 7 bytes. Error code 12 (Cannot allocate memory))"
    )
    assert second.startswith("lower variants.sea_sft.micro_batch_size=32 to 16 and start the same command again")
    assert "cannot be lowered any more" in str(explained(MemoryError(), "evaluate", {"evaluate.batch_size": 1}))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), work.told():
        raise RuntimeError("shapes do not match")


LIMITED = """
import resource, sys
import lightning as L
import train

whole = L.Trainer.fit

def fit(self, *args, **kwargs):  # what is loaded by now is there; what a step takes is not
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {more}, resource.RLIM_INFINITY))
    try:
        return whole(self, *args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

L.Trainer.fit = fit
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_step_that_gets_no_memory_says_what_to_lower_and_goes_on_with_less(tmp_path: Path) -> None:
    program = textwrap.dedent(LIMITED).format(more=60_000_000)
    words = [*SMALL, "stages=[align]", f"run_dir={tmp_path / 'run'}", "data=micro", "variants.text_sft.steps=2"]
    words = [w for w in words if not w.startswith(("variants.text_sft.steps=60", "synthesis.harm"))]
    words += ["variants.text_sft.batch_size=256", "variants.text_sft.micro_batch_size=256"]
    process = launched(["-c", program, *words])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    told = next(line for line in err.splitlines() if line.startswith("error: "))
    assert told.startswith("error: out of memory in stage align/text_sft at step 0, 256 examples, the longest of "), err
    assert "lower variants.text_sft.micro_batch_size=256 to 128 and start the same command again" in err
    again = launched([str(ROOT / "train.py"), *words[:-1], "variants.text_sft.micro_batch_size=32"])
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "align/text_sft is resumed" in err


def test_a_process_that_is_killed_has_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("stages.failures.PATIENCE", 0.3)
    alone = Failures(tmp_path, "now")
    alone.watch()
    began = time.monotonic()
    assert alone.cause(ConnectionResetError()) is None
    assert 0.2 < time.monotonic() - began < 3
    alone.end(failed=False)
