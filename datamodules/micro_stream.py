"""What a tower of the micro world is trained on, one batch a step."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Batch = dict[str, Tensor]


class Stream(IterableDataset[Batch], ABC):
    """Batches of the steps from `start` to `total_steps`."""

    def __init__(self, batch_size: int, total_steps: int, seed: int) -> None:
        self.batch_size, self.total_steps, self.seed, self.start = batch_size, total_steps, seed, 0

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.total_steps):
            yield self.batch(step)

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of (seed, step), so a resumed run is shown what it would have been."""


class StreamDataModule(L.LightningDataModule):
    """Hands a stream to Lightning; a resumed fit begins at its checkpoint's step."""

    def __init__(self, stream: Stream, num_workers: int = 1) -> None:
        super().__init__()
        self.stream, self.num_workers = stream, num_workers

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        self.stream.start = self.trainer.global_step
        # A single worker: two would each draw the whole stream.
        workers = min(1, self.num_workers)
        return DataLoader(self.stream, batch_size=None, num_workers=workers, worker_init_fn=leave_signals)


def leave_signals(worker: int) -> None:
    """In a loader's process: a terminal sends Ctrl-C to it too, but this fit ends after the step under way, which may
    wait for a batch. The main process ends its loaders."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
