"""A tiny text backbone for tests: the embedded model's language model, taken out once for each worker."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from unittest import mock

import torch

from mllm.backbones import load_causal, load_classifier, load_tokenizer, micro_folder
from mllm.detector import Detector, DetectorSpec
from mllm.detoxifier import Detoxifier, DetoxifierSpec

SETTINGS = {"max_length": 64, "max_question": 24}


@functools.lru_cache(maxsize=1)
def backbone() -> Path:
    """The folder; made outside of the user's cache."""
    with mock.patch.dict("os.environ", {"SEAWALL_CACHE": tempfile.mkdtemp(prefix="seawall-test-")}):
        return micro_folder()


def detector(seed: int = 0, **spec: object) -> Detector:
    """With a random head: its scores mean nothing, and differ from text to text."""
    tokenizer = load_tokenizer(str(backbone()))
    torch.manual_seed(seed)
    model = load_classifier(str(backbone()), tokenizer, torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return Detector(model, tokenizer, DetectorSpec(**(SETTINGS | spec)))  # type: ignore[arg-type]


def detoxifier(**spec: object) -> Detoxifier:
    tokenizer = load_tokenizer(str(backbone()))
    return Detoxifier(load_causal(str(backbone()), torch.float32), tokenizer, DetoxifierSpec(**(SETTINGS | spec)))  # type: ignore[arg-type]
