"""Which weights are these? A short hash that changes when a model is trained on, swapped or replaced in its folder."""

from __future__ import annotations

import hashlib

import torch

SAMPLES = 64


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """Of every parameter's name and shape and of some `SAMPLES` values spread evenly over it; 64 hex digits.

    Values are compared in bfloat16, so that one checkpoint has one fingerprint whether it is loaded in float32 or
    bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLES)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
