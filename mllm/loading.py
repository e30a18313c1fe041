"""Loads a multimodal LLM from its configuration: model, processor, anchor and prompt encoder in one bundle.

A family is described by `configs/model/*.yaml` alone: path, projector, modality, prompts, LoRA targets. Only
safetensors are read and remote code is never run; classes that transformers lacks come from `model.plugin`, a file of
the user's own (mllm/plugins.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.logging import disable_progress_bar

from configs.schema import Model
from mllm.anchor import Anchor
from mllm.fingerprint import fingerprint
from mllm.media import blank_medium, media_arguments
from mllm.plugins import load_plugin
from mllm.prompts import PromptEncoder
from mllm.video_processing import register

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class MLLM:
    """A frozen model with its encoder/projector boundary recorded on a blank."""

    model: PreTrainedModel
    processor: ProcessorMixin
    anchor: Anchor
    prompts: PromptEncoder
    spec: Model
    weights: str  # mllm/fingerprint.py, before any adapter

    @property
    def key(self) -> str:
        """Identifies the weights that an embedding belongs to; other weights under the same path have another key."""
        return f"{self.spec.path}@{self.spec.revision or 'local'}/{self.weights[:16]}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one embedding: projector path -> shape of M's output for one item."""
        return {path: tuple(e.shape) for path, e in self.anchor.E0_by_path.items()}


def checkpoint(path: str) -> str:
    """A folder (absolute, or relative to here or to the project), else a hub id.

    Raises:
        ValueError: the path looks like a folder but none is there.
    """
    expanded = Path(path).expanduser()
    for candidate in (expanded, ROOT / expanded):
        if candidate.is_dir():
            return str(candidate)
    if expanded.is_absolute() or path.startswith((".", "~", "assets/", "runs/")) or path.count("/") != 1:
        raise ValueError(f"model.path={path}: no such folder, and not a hub id (owner/name); see configs/model/")
    return path


def load(spec: Model, device: torch.device | str = "cpu") -> MLLM:
    """The model in evaluation mode, every weight frozen, its anchor recorded.

    Raises:
        ValueError: the checkpoint is missing, has no safetensors, or the projector path is wrong; the plugin is
            missing or fails.
    """
    if spec.plugin:
        load_plugin(spec.plugin)
    source = checkpoint(spec.path)
    register()
    disable_progress_bar()  # a bar for every load, in the middle of our own
    try:
        processor = AutoProcessor.from_pretrained(
            source, revision=spec.revision, trust_remote_code=False, **spec.processor
        )
        model = AutoModelForMultimodalLM.from_pretrained(
            source,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:  # transformers raises either, with the cause in the first line
        hint = f"; make it first: {spec.make}" if spec.make else ""
        raise ValueError(f"model.path={spec.path} cannot be loaded{hint}: {str(error).splitlines()[0]}") from error
    return assemble(model.to(device), processor, spec)


def assemble(model: PreTrainedModel, processor: ProcessorMixin, spec: Model) -> MLLM:
    """The bundle around a model that is already in memory."""
    model.eval().requires_grad_(False)
    blank = media_arguments(spec, processor, [blank_medium(spec, processor)])
    prompts = PromptEncoder(processor, spec.modality, blank, end_ids(model, processor), spec.system_prompt)
    anchor = Anchor(model, spec.projector, spec.modality)
    question = spec.prompts.style.format(modality=spec.modality)
    anchor.record(**to_device(prompts.blank_inputs(question), model.device))
    return MLLM(model, processor, anchor, prompts, spec, fingerprint(model))


def end_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Ids that end an answer."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = processor.tokenizer.eos_token_id if ids is None else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
