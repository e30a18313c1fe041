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


def shard(root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Replaces the weights of `root` by their shards, in place.

    Args:
        root: what is called; it fetches what lies outside of the layers.
        layers: of the decoder (or encoder), each a unit.
        whole: weights that stay whole on every rank.
    """
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(root, mesh=mesh, ignored_params=whole)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Of an MLLM, perhaps under an adapter."""
    base: Any = base_model(model)
    return list(getattr(base.get_decoder(), "layers", ()))


def shared_weights(model: nn.Module) -> torch.Tensor:
    """0, with a gradient of zero for every trained weight outside the decoder's layers; add it to a loss after the
    forward. A text has no gradient for the projector, a medium has one: what is sent after a backward pass would differ
    from rank to rank."""
    inside = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return torch.stack([(p * 0).sum() for p in outside]).sum() if outside else torch.zeros(())


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """All weights of a sharded, fully fine-tuned model, whole and on the CPU, tied ones once; None for others. A
    collective."""
    if isinstance(model, PeftModel) or not any(map(is_sharded, model.parameters())):
        return None
    once = {id(p): name for name, p in reversed(model.state_dict(keep_vars=True).items())}
    weights: dict[str, Any] = gathered({n: p for n, p in model.state_dict().items() if n in once.values()})
    return weights


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
