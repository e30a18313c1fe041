"""Activation checkpointing: a layer keeps its input alone and runs again in the backward pass (arXiv 1604.06174).

transformers recomputes layers that are in training mode; a frozen model stays in evaluation mode here, so that its
dropout is off. Only the layers themselves are put into training mode, not what is in them: the attention inside, which
has the dropout, stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.replay import base_model


def recompute_activations(model: nn.Module) -> None:
    """From now on, for the decoder (and the encoder, should it run) of a transformers model or a PEFT model of one.

    Raises:
        ValueError: the family cannot.
    """
    base: Any = base_model(model)
    try:
        base.activation_checkpointing_enable()
    except ValueError as error:
        raise ValueError(f"trainer.activation_checkpointing: {error}; set it to false") from error
    layers = checkpointing_layers(base)
    if not layers:
        raise ValueError(
            f"trainer.activation_checkpointing: {type(base).__name__} has no layers that can; set it to false"
        )
    for layer in layers:
        layer.training = True


def checkpointing_layers(base: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can run again."""
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def recomputes(layers: list[GradientCheckpointingLayer]) -> bool:
    """Whether any of them would run again now."""
    return any(layer.training and layer.gradient_checkpointing for layer in layers)
