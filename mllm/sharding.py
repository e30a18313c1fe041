"""A model in shards: each rank keeps 1/n of the frozen weights and fetches a layer when it is needed (FSDP2).

Units are the decoder's layers, and all the rest together. LoRA's weights stay whole on every rank: they are a hundredth
of the model, have another dtype than the frozen ones, and their gradients are averaged once a step, where sharded ones
would be after every backward pass. Fully fine-tuned weights are sharded with their gradients and the optimiser's
moments. The encoder stays whole too: it does not run, and being called in its place would fetch it in batches with
media alone.

Fetching is a collective: every rank must run the same number of forward and backward passes.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mllm.anchor import base_model


def shard(model: nn.Module, mesh: DeviceMesh, encoder: Iterable[nn.Module] = ()) -> None:
    """Replaces the model's weights by their shards, in place.

    Args:
        model: what is called: a transformers model, or a PEFT model of one.
        encoder: modules that do not run in training.
    """
    whole = {p for module in encoder for p in module.parameters()}
    if isinstance(model, PeftModel):
        whole |= {p for p in model.parameters() if p.requires_grad}
    base: Any = base_model(model)
    for layer in getattr(base.get_decoder(), "layers", ()):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def shared_weights(model: nn.Module) -> torch.Tensor:
    """0, with a gradient of zero for every trained weight outside the decoder's layers; add it to a loss after the
    forward. A text has no gradient for the projector, a medium has one: what is sent after a backward pass would differ
    from rank to rank."""
    base: Any = base_model(model)
    inside = {id(p) for layer in getattr(base.get_decoder(), "layers", ()) for p in layer.parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return torch.stack([(p * 0).sum() for p in outside]).sum() if outside else torch.zeros(())


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor)


def gathered(value: Any) -> Any:
    """The value with every sharded tensor in it whole, on the CPU. A collective."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    return [gathered(v) for v in value] if isinstance(value, list) else value


def like(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut into shards as `reference` is; as it is where that is whole, or of another shape (a step
    count)."""
    if not isinstance(reference, DTensor) or isinstance(value, DTensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
