"""Saves the slots under way now and then, so that an interrupted synthesis goes on inside its unfinished embeddings.

Finished embeddings are in the store already; this concerns only the at most S of each rank that are not.

    slots-<rank>.safetensors   what each rank of this attempt has under way, replaced every few steps
    slots.safetensors          what all ranks of earlier attempts had under way (`gather_slots`), read by every rank

A shard (stages/synthesis_shard.py) has such files in a folder of its own; a whole attempt gathers those as well.

One process that goes on where one process stopped does so to the bit: the file also holds which embeddings wait, which
slot each has, and the counters. The steps since then are made again with all slots as they were, also those whose
embedding is in the store by now: rounding depends a little on what stands beside an embedding. What is stored stays.
Otherwise (several ranks, another number of slots) the slots are taken up by the rank that has their concept in its
queue, beside other neighbours than before.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from callbacks.metrics_file import cut, flush
from datamodules.durable import write_durably
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from lightning_modules.slots import SlotAdam

GATHERED, OF_RANK_0 = "slots.safetensors", "slots-0.safetensors"


class Slots(NamedTuple):
    """tensors: name -> values [n, ...]. table: of each of the n busy slots its embedding's id, age and attempt. launch:
    what the whole module did (`EmbeddingOptimizer.launch_state`) at `step`; None where several processes did."""

    tensors: dict[str, torch.Tensor]
    table: list[dict[str, Any]]
    launch: dict[str, Any] | None

    @property
    def ids(self) -> list[str]:
        """Of the embeddings under way and of those that wait."""
        assert self.launch is not None
        return [row["id"] for row in self.table] + self.launch["queue"]

    @property
    def finished(self) -> int:
        """Embeddings that had left their slots."""
        assert self.launch is not None
        return int(self.launch["finished"])

    @property
    def width(self) -> int:
        """Slots, busy or free."""
        assert self.launch is not None
        return int(self.launch["slots"])


class SlotCheckpoint(L.Callback):
    """One safetensors file for each rank in `folder`, replaced atomically every `every` steps.

    `exact`: what is gone on with, of one process by one process (`exact_slots`); None: `slots.safetensors`, if it is
    there.
    """

    def __init__(self, folder: Path, every: int, exact: Slots | None = None) -> None:
        self.folder, self.every, self.exact = folder, every, exact
        self.first = self.step = 0  # of the first batch, and how many are done
        self.due = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EmbeddingOptimizer)
        if self.exact is not None and self.exact.launch is not None:
            tensors, table, launch = self.exact.tensors, self.exact.table, self.exact.launch
            pl_module.restore_launch(_adam(trainer), tensors, table, launch)
            self.first = self.step = launch["step"]
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.first  # what loggers take for the step
        elif (self.folder / GATHERED).exists():
            tensors, table, _ = _read(self.folder / GATHERED)
            pl_module.restore_slots(_adam(trainer), tensors, table)
        cut(trainer, self.first)
        self.save(trainer, pl_module)  # or the first steps could not be made again with the same neighbours

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.step = self.first + batch_idx + 1
        self.due = self.due or (batch_idx + 1) % self.every == 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Only here what finished in the step before is in the store, and its metrics are logged."""
        self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_due(trainer, pl_module)

    def ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """To save before the next step."""
        self.due = True

    def _save_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.due:
            flush(trainer)
            self.save(trainer, pl_module)
            self.due = False

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What this rank has under way, between two steps."""
        assert isinstance(pl_module, EmbeddingOptimizer)
        launch = {**pl_module.launch_state(), "step": self.step} if trainer.world_size == 1 else None
        slots = Slots(*pl_module.slot_state(_adam(trainer)), launch)
        _write(self.folder / f"slots-{trainer.global_rank}.safetensors", slots)


def gather_slots(folder: Path, wanted: Collection[str]) -> None:
    """Before an attempt, in one process: makes one file of those that all ranks of the attempts before have left.

    Args:
        wanted: ids of the embeddings that are missing; the others' slots are dropped, unless one process left them.
    """
    others = [*sorted(folder.glob("slots-*.safetensors")), *sorted(folder.glob("shard-*/slots*.safetensors"))]
    if not others:
        return
    if others == [folder / OF_RANK_0]:
        left = _read(others[0])
        if left.launch is not None and set(wanted) <= set(left.ids):
            others[0].replace(folder / GATHERED)
            return
    files = [folder / GATHERED, *others]
    rows: dict[str, tuple[int, dict[str, torch.Tensor], dict[str, Any]]] = {}
    for path in files:
        tensors, table, _ = _read(path) if path.exists() else Slots({}, [], None)
        for row, saved in enumerate(table):
            steps = saved["steps_before"] + saved["age"]
            if saved["id"] in wanted and (saved["id"] not in rows or steps > rows[saved["id"]][0]):
                rows[saved["id"]] = (steps, {name: values[row] for name, values in tensors.items()}, saved)
    if rows:
        parts = [values for _, values, _ in rows.values()]
        stacked = {name: torch.stack([values[name] for values in parts]) for name in parts[0]}
        _write(files[0], Slots(stacked, [saved for _, _, saved in rows.values()], None))
    for path in files if not rows else files[1:]:  # only now: a kill in between must not cost them
        path.unlink(missing_ok=True)


def exact_slots(folder: Path, wanted: Collection[str], known: Collection[str]) -> Slots | None:
    """What one process goes on with to the bit: the gathered slots, if one process left them, and hold all that is
    `wanted` (ids of missing embeddings) and nothing but what is `known` (ids of all)."""
    path = folder / GATHERED
    if not path.exists():
        return None
    slots = _read(path)
    if slots.launch is None or not set(wanted) <= set(slots.ids) <= set(known):
        return None
    return slots


def forget_slots(folder: Path) -> None:
    """At the end of the stage: nothing is under way."""
    for pattern in ("slots*.safetensors", "shard-*/slots*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Slots:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            launch = json.loads(facts.get("launch", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return Slots(tensors, json.loads(facts["table"]), launch)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to start its unfinished embeddings anew") from error


def _write(path: Path, slots: Slots) -> None:
    facts = {"table": json.dumps(slots.table), "launch": json.dumps(slots.launch)}
    write_durably(path, save({k: v.cpu() for k, v in slots.tensors.items()}, facts))


def _adam(trainer: L.Trainer) -> SlotAdam:
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, SlotAdam)
    return optimizer
