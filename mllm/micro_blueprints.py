"""The embedded models' blueprints, chosen by modality: the architecture, its processor, and where its tower is.

A blueprint is a module `mllm/micro_<family>.py` with the four functions of `Blueprint`. The stages `pretrain_tower` and
`pretrain_language` (experiment=pretrain_micro*) know nothing else of a family. To add one: write the module, add its
name below, and give `datamodules/micro_media.py` the medium that it reads. Of a modality that is not built in, the
user's plugin (mllm/plugins.py) is the blueprint.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from mllm.plugins import has_parts, load_plugin

_MODULES = {"image": "mllm.micro_llava", "video": "mllm.micro_qwen2_vl", "audio": "mllm.micro_qwen2_audio"}


class Blueprint(Protocol):
    """What a family's module has."""

    def build_processor(self, vocabulary: Iterable[str]) -> ProcessorMixin:
        """The family's own processor, small, for a word-level vocabulary (mllm/micro_tokenizer.py)."""

    def build_model(self, processor: Any) -> PreTrainedModel:
        """The family's own architecture, random weights; seed torch before."""

    def tower(self, model: Any) -> nn.Module:
        """The encoder M inside the model; its `state_dict` is what the stage `pretrain_tower` saves."""

    def states(self, tower: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(local, whole), each [B, positions, d]: the state before M's last layer, where words have their places, and
        M's output (the projector's input). `inputs` come from the medium's `tower_inputs` or its training batches."""


def blueprint(modality: str, plugin: str | None = None) -> Blueprint:
    """Raises ValueError for a modality without an embedded model, or a plugin that is none."""
    if modality in _MODULES:
        return cast(Blueprint, importlib.import_module(_MODULES[modality]))
    if plugin is None:
        raise ValueError(f"model.modality={modality}: no embedded model, expected one of {', '.join(_MODULES)}")
    module = load_plugin(plugin)
    has_parts(module, plugin, ("build_processor", "build_model", "tower", "states"), "pretraining")
    return cast(Blueprint, module)
