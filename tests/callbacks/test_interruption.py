"""A fit that is told to stop: saves after a whole batch, leaves with the signal's code, and goes on to the bit."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from callbacks.interruption import checkpoints, last_checkpoint, random_state, set_random_state
from callbacks.metrics_file import MetricsFile
from datamodules.qa_batches import StepDataModule
from stages.outcome import exit_code_of
from tests.conftest import ROOT

STEPS = 6
SIGNALS = [(signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130)]


class Net(L.LightningModule):
    """With dropout, and noise of Python's and numpy's generators; sends itself a signal in the middle of a step."""

    def __init__(self, sent: signal.Signals | None = None, at: int = 2, raises: bool = False) -> None:
        super().__init__()
        self.layer, self.sent, self.at, self.raises = torch.nn.Linear(3, 1), sent, at, raises
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.at and self.sent:
            os.kill(os.getpid(), self.sent)
        if self.global_step == self.at and self.raises:
            raise OSError("the machine is gone")
        self.seen.append(self.global_step)
        noise = random.random() + float(np.random.rand())
        loss = self.layer(torch.nn.functional.dropout(batch, 0.5)).square().sum() + noise * self.layer.bias.sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Batches(IterableDataset[torch.Tensor]):
    """They follow from the step, as all of the project do."""

    start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.ones(3) * step for step in range(self.start, STEPS)])


def fit(net: Net, folder: Path, every: int = 1000) -> int:
    """The exit code of a program that does nothing else."""
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, callbacks=checkpoints(folder, every),
        logger=MetricsFile(folder), log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return exit_code_of(
        lambda: trainer.fit(net, StepDataModule(Batches()), ckpt_path=last_checkpoint(folder), weights_only=True)
    )


def curve(folder: Path) -> list[tuple[str, str]]:
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def same(mine: Net, theirs: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.fixture
def undisturbed(tmp_path: Path) -> Net:
    L.seed_everything(0, verbose=False)
    net = Net()
    assert fit(net, tmp_path / "undisturbed") == 0
    return net


@pytest.mark.parametrize(("sent", "code"), SIGNALS)
@pytest.mark.parametrize("at", [0, 2, STEPS - 1])
def test_it_saves_and_leaves_and_goes_on_to_the_bit(
    sent: signal.Signals, code: int, at: int, undisturbed: Net, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(s) for s, _ in SIGNALS]
    folder = tmp_path / "disturbed"
    L.seed_everything(0, verbose=False)
    first = Net(sent, at)
    assert fit(first, folder) == code
    assert first.seen == list(range(at + 1)), "it stops after the batch in which it was told"
    assert [signal.getsignal(s) for s, _ in SIGNALS] == handlers
    L.seed_everything(1, verbose=False)  # another process, which has drawn other numbers
    second = Net()
    assert fit(second, folder) == 0
    assert second.seen == list(range(at + 1, STEPS))
    assert same(second, undisturbed)
    assert curve(folder) == curve(tmp_path / "undisturbed")


def test_after_a_crash_the_steps_since_the_last_checkpoint_are_made_again(undisturbed: Net, tmp_path: Path) -> None:
    folder = tmp_path / "disturbed"
    L.seed_everything(0, verbose=False)
    assert fit(Net(at=3, raises=True), folder, every=2) == 1
    L.seed_everything(1, verbose=False)
    second = Net(at=5, raises=True)
    assert fit(second, folder, every=2) == 1
    third = Net()
    assert fit(third, folder, every=2) == 0
    assert (second.seen, third.seen) == ([2, 3, 4], [4, 5])
    assert same(third, undisturbed)
    assert curve(folder) == curve(tmp_path / "undisturbed")


def test_a_checkpoint_counts_only_when_the_row_of_its_step_is_in_the_file(tmp_path: Path) -> None:
    class Watching(Net):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            path = last_checkpoint(tmp_path)
            steps = torch.load(path, weights_only=True)["global_step"] if path else 0
            assert not steps or int(curve(tmp_path)[-1][0]) >= steps - 1
            seen.append(steps)
            return super().training_step(batch, batch_idx)

    seen: list[int] = []
    assert fit(Watching(), tmp_path, every=1) == 0
    assert seen == list(range(STEPS))


def test_the_state_of_the_generators_comes_back_through_a_checkpoint(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand()), float(np.random.randn())]

    drawn()
    torch.save(random_state(), tmp_path / "state")
    once = drawn()
    drawn()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert drawn() == once


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import tests.callbacks.test_interruption as t

class Slow(t.Net):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        if {twice}:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)

sys.exit(t.fit(Slow(), Path({folder!r})))
"""


@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_saves_and_twice_ends_at_once(twice: bool, tmp_path: Path) -> None:
    program = PROGRAM.format(twice=twice, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGINT if twice else 130), done.stderr
    assert "Ctrl-C again ends at once" in done.stderr
    assert (last_checkpoint(tmp_path) is not None) is not twice
