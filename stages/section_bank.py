"""Section means (mllm/sections.py) of every text of a data set, read once and kept for all later trainings.

Reading is nearly all of the work, and depends on nothing that a training changes: not on its seed, split, loss or
head. A file in the cache holds the means of one data set under one backbone; its name is a hash of all that decides
them. It holds no text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.progress import Progress
from mllm.fingerprint import fingerprint
from mllm.qa_text import QAIds
from mllm.sections import SectionClassifier
from mllm.smol import cache_folder


def section_means(model: SectionClassifier, texts: Sequence[QAIds], pad_id: int, batch_size: int) -> Tensor:
    """Means of each text, float32 [texts, width] on the CPU."""
    digests = [hashlib.sha256(f"{text.answer} {list(text)}".encode()).hexdigest() for text in texts]
    order = sorted(set(digests))  # not in the order of a seed's split
    settings = {k: str(v) for k, v in model.config.to_dict().items() if not k.startswith("_")}
    how = [fingerprint(model.backbone), settings, str(next(model.backbone.parameters()).dtype), model.layers, order]
    file = cache_folder() / "sections" / f"{hashlib.sha256(json.dumps(how).encode()).hexdigest()[:24]}.safetensors"
    try:
        means = load_file(file)["means"]
    except (OSError, SafetensorError, KeyError):
        by_digest = dict(zip(digests, texts, strict=True))
        means = read(model, [by_digest[digest] for digest in order], pad_id, batch_size)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        save_file({"means": means}, part)
        part.replace(file)
    row = {digest: i for i, digest in enumerate(order)}
    return means[[row[digest] for digest in digests]]


def read(model: SectionClassifier, texts: Sequence[QAIds], pad_id: int, batch_size: int) -> Tensor:
    """The backbone over all texts, like lengths together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    means: list[Tensor] = [torch.empty(0)] * len(texts)
    with Progress("read", len(texts), "texts") as progress:
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            for i, row in zip(part, model.pooled_texts([texts[i] for i in part], pad_id).cpu(), strict=True):
                means[i] = row
            progress.advance(len(part))
    return torch.stack(means)
