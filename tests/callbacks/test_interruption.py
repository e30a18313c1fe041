"""A fit that is told to stop: saves after a whole batch, leaves with the signal's code, and goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from callbacks.interruption import checkpoints, last_checkpoint
from stages.outcome import exit_code_of

STEPS = 6


class Net(L.LightningModule):
    """Sends itself a signal in the middle of a step."""

    def __init__(self, sent: signal.Signals | None = None, at: int = 2) -> None:
        super().__init__()
        self.layer, self.sent, self.at = torch.nn.Linear(3, 1), sent, at
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.sent and self.global_step == self.at:
            os.kill(os.getpid(), self.sent)
        self.seen.append(self.global_step)
        return self.layer(batch).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(net: Net, folder: Path) -> int:
    """The exit code of a program that does nothing else."""
    # Every batch the same: this loader does not know at which step it is, unlike those of the project.
    data = torch.utils.data.DataLoader(torch.ones(STEPS, 3))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, callbacks=checkpoints(folder, 1000), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return exit_code_of(lambda: trainer.fit(net, data, ckpt_path=last_checkpoint(folder), weights_only=True))


@pytest.fixture
def undisturbed(tmp_path: Path) -> Net:
    L.seed_everything(0, verbose=False)
    net = Net()
    assert fit(net, tmp_path / "undisturbed") == 0
    return net


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [0, 2, STEPS - 1])
def test_it_saves_and_leaves_and_goes_on(
    sent: signal.Signals, code: int, at: int, undisturbed: Net, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)]
    folder = tmp_path / "disturbed"
    L.seed_everything(0, verbose=False)
    first = Net(sent, at)
    assert fit(first, folder) == code
    assert first.seen == list(range(at + 1)), "it stops after the batch in which it was told"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    second = Net()
    assert fit(second, folder) == 0
    assert second.seen == list(range(at + 1, STEPS))
    for mine, theirs in zip(second.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
