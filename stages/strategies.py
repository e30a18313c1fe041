"""How the processes of one run work together in a fit; docs/decisions/0007 says why neither wraps a module in DDP.

    SeparateRanks   synthesis: each rank has concepts, slots and an optimiser of its own; nothing is sent, nobody waits
                    answers: each rank has a share of the prompts
    SharedStep      alignment: each rank has a share of every batch; lightning_modules/aligner.py averages the gradients

Both start their processes as Lightning's DDP does: by running the same command again, or under SLURM and torchrun by
taking their place among those that are there.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn


class SeparateRanks(DDPStrategy):
    """Processes without a process group: ranks and devices as in DDP, and no communication whatever."""

    def setup_distributed(self) -> None:
        """Ranks only; also where an earlier fit of this process has left a process group behind."""
        self.set_world_ranks()

    def setup(self, trainer: L.Trainer) -> None:
        """As Lightning's, but where nothing is trained it would send the weights from rank to rank."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """The module stays as it is: its parameters are this rank's own, their shapes may differ from rank to rank."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Nobody waits."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Each rank keeps what it has."""
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Each rank's values are its own."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Each rank decides for itself."""
        return decision

    def all_gather(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Each rank's values are its own."""
        return tensor


class SharedStep(DDPStrategy):
    """A process group, and trainable weights that start equal; the module itself averages its gradients once a step."""

    def configure_ddp(self) -> None:
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.data, 0)
