"""How the processes of one run work together in a fit; docs/decisions/0007 says why neither wraps a module in DDP.

    SeparateRanks   synthesis: each rank has concepts, slots and an optimiser of its own; nothing is sent, nobody waits
                    answers: each rank has a share of the prompts
    SharedStep      alignment: each rank has a share of every batch; lightning_modules/aligner.py averages the gradients
    ShardedStep     the same, and each rank keeps a share of the weights too (mllm/sharding.py)

Both start their processes as Lightning's DDP does: by running the same command again, or under SLURM and torchrun by
taking their place among those that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import init_device_mesh

from mllm.sharding import gathered, is_sharded, like


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
            if parameter.requires_grad and not is_sharded(parameter):
                torch.distributed.broadcast(parameter.data, 0)


class ShardedStep(SharedStep):
    """FSDP2. Checkpoints hold whole tensors, so a run can go on with another number of devices, or without shards."""

    def model_to_device(self) -> None:
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.module.shard(mesh)
        super().model_to_device()

    def teardown(self) -> None:
        """Lightning's moves the module to the CPU, which weights that were being fetched when an error came do not
        survive: it would hide that error."""
        self.accelerator.teardown()  # type: ignore[union-attr]

    @property
    def module(self) -> Any:
        """The Lightning module, which knows how it is cut: `shard(mesh)`."""
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of the trained weights alone: whole copies of the frozen ones would be made for nothing."""
        return gathered({k: p for k, p in self.module.named_parameters() if p.requires_grad})

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors."""
        return gathered(optimizer.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cuts them again."""
        with torch.no_grad():
            there = dict(self.module.named_parameters())
            for name, value in checkpoint["state_dict"].items():
                there[name].copy_(like(value, there[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            cut = {i: {k: _cut(v, parameters[i]) for k, v in each.items()} for i, each in state["state"].items()}
            optimizer.load_state_dict({**state, "state": cut})
            _optimizer_to_device(optimizer, self.root_device)


def _cut(value: Any, parameter: torch.Tensor) -> Any:
    return like(value, parameter) if torch.is_tensor(value) else value
