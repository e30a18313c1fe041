"""Saves the slots under way now and then, so that an interrupted synthesis goes on inside its unfinished embeddings.

Finished embeddings are in the store already; this concerns only the at most S of each rank that are not.

    slots-<rank>.safetensors   what each rank of this attempt has under way, replaced every few steps
    slots.safetensors          what all ranks of earlier attempts had under way (`gather_slots`), read by every rank

A shard (stages/synthesis_shard.py) has such files in a folder of its own; a whole attempt gathers those as well.

So the slots are taken up whatever the number of ranks, each by the rank that has its concept in its queue.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from datamodules.durable import write_durably
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from lightning_modules.slots import SlotAdam

GATHERED = "slots.safetensors"

Slots = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
"""Name -> values [n, ...], and for each of the n slots its embedding's id, age and attempt."""


class SlotCheckpoint(L.Callback):
    """One safetensors file for each rank in `folder`, replaced atomically every `every` steps."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EmbeddingOptimizer)
        if (self.folder / GATHERED).exists():
            pl_module.restore_slots(_adam(trainer), *_read(self.folder / GATHERED))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What this rank has under way, now."""
        assert isinstance(pl_module, EmbeddingOptimizer)
        _write(self.folder / f"slots-{trainer.global_rank}.safetensors", pl_module.slot_state(_adam(trainer)))


def gather_slots(folder: Path, wanted: Collection[str]) -> None:
    """Before an attempt, in one process: makes one file of those that all ranks of the attempts before have left.

    Args:
        wanted: ids of the embeddings that are missing; the others' slots are dropped.
    """
    others = [*sorted(folder.glob("slots-*.safetensors")), *sorted(folder.glob("shard-*/slots*.safetensors"))]
    files = [folder / GATHERED, *others]
    rows: dict[str, tuple[int, dict[str, torch.Tensor], dict[str, Any]]] = {}
    for path in files:
        tensors, table = _read(path) if path.exists() else ({}, [])
        for row, saved in enumerate(table):
            steps = saved["steps_before"] + saved["age"]
            if saved["id"] in wanted and (saved["id"] not in rows or steps > rows[saved["id"]][0]):
                rows[saved["id"]] = (steps, {name: values[row] for name, values in tensors.items()}, saved)
    if rows:
        parts = [values for _, values, _ in rows.values()]
        stacked = {name: torch.stack([values[name] for values in parts]) for name in parts[0]}
        _write(files[0], (stacked, [saved for _, _, saved in rows.values()]))
    for path in files if not rows else files[1:]:  # only now: a kill in between must not cost them
        path.unlink(missing_ok=True)


def forget_slots(folder: Path) -> None:
    """At the end of the stage: nothing is under way."""
    for pattern in ("slots*.safetensors", "shard-*/slots*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Slots:
    try:
        with safe_open(path, "pt") as file:
            table = json.loads((file.metadata() or {})["table"])
            return {key: file.get_tensor(key) for key in file.keys()}, table  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to start its unfinished embeddings anew") from error


def _write(path: Path, slots: Slots) -> None:
    tensors, table = slots
    write_durably(path, save({k: v.cpu() for k, v in tensors.items()}, {"table": json.dumps(table)}))


def _adam(trainer: L.Trainer) -> SlotAdam:
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, SlotAdam)
    return optimizer
