"""The embedded models as a test fixture's content: loaded once a worker, wrapped afresh for each test."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.schema import Config, Model
from datamodules import micro_world
from datamodules.control_samples import SynthesisJob, synthesis_job
from mllm.loading import MLLM, assemble, load

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def config(experiment: str = "sea_image") -> Config:
    return compose([f"experiment={experiment}"]).config


@functools.cache
def _loaded(experiment: str) -> MLLM:
    return load(config(experiment).model)


def micro(spec: Model | None = None, dtype: torch.dtype = torch.float32, experiment: str = "sea_image") -> MLLM:
    """A copy that a test may train or wrap."""
    folder = config(experiment).model.path
    if not (ROOT / folder / "model.safetensors").exists():
        pytest.fail(f"{folder} is missing: it is part of the repository")
    loaded = _loaded(experiment)
    return assemble(copy.deepcopy(loaded.model).to(dtype), loaded.processor, spec or loaded.spec)


def jobs(mllm: MLLM, n: int) -> list[SynthesisJob]:
    """n jobs of the micro world, harmful and harmless alternating."""
    harmful, harmless = (micro_world.phrases("train", flag) for flag in (True, False))
    chosen = [
        p for pair in zip(harmful[:: len(harmful) // n], harmless[:: len(harmless) // n], strict=False) for p in pair
    ]
    media_ids = sorted(mllm.anchor.media_token_ids)
    return [synthesis_job(micro_world.record(p), mllm.prompts, mllm.spec.prompts, media_ids, 0) for p in chosen[:n]]
