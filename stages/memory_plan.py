"""`plan=true`: what every stage of the run will take on every device, before anything is loaded (docs/memory.md).

    python train.py experiment=sea_image model=NAME data=saferlhf data.path=... trainer=ddp plan=true

Each stage's largest step runs on a model without weights (stages/memory_steps.py). What does not fit is tried again
with the setting that decides halved, until it fits or cannot be halved any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from configs.schema import Config
from mllm.outline import Outline, outline
from stages.memory_steps import Need, alignment, evaluation, sharded, synthesis
from stages.plan_batches import align_step, prompt_length, records_of, slots
from stages.plan_text_models import text_model_needs
from stages.trainers import device_of, precision_of, quieten

BESIDE = {"cpu": 0.7e9, "cuda": 0.6e9}
"""Bytes of one process beside its tensors: Python with its libraries; on a GPU the CUDA context and its workspaces."""


@dataclass(frozen=True)
class Place:
    """Where the run will be. there: free bytes for one process."""

    device: str
    world: int
    there: int


@dataclass(frozen=True)
class Row:
    """One stage. fits: the largest setting that does, where the present one does not; None: none does."""

    need: Need
    fits: tuple[int, Need] | None


def show(cfg: Config) -> None:
    """Prints the plan.

    Raises:
        ValueError: the model's configuration, the processor or the data are not at hand; says how to give them.
    """
    quieten()
    place = place_of(cfg)
    print("\n".join(page(cfg, place, needs(cfg, place))))


def place_of(cfg: Config) -> Place:
    """Devices of this machine; `trainer.num_nodes` others are taken to be like it."""
    t, device = cfg.trainer, device_of(cfg).type
    local = torch.cuda.device_count() if device == "cuda" else 1
    if t.devices not in ("auto", -1, "-1"):
        local = len(str(t.devices).split(",")) if "," in str(t.devices) else int(t.devices)
    world = max(1, local) * t.num_nodes
    if device == "cuda":
        return Place(device, world, min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))
    return Place(device, world, psutil.virtual_memory().available // max(1, local))


def needs(cfg: Config, place: Place) -> list[Row]:
    """One row for each stage, and for each variant of alignment."""
    cfg = replace(cfg, trainer=replace(cfg.trainer, precision=precision_of(cfg)))
    rows: list[Row] = []
    if {"synthesize", "align", "evaluate"} & set(cfg.stages):
        _tell(f"model {cfg.model.name}")
        model = outline(cfg.model)
        records = records_of(cfg) if {"synthesize", "align"} & set(cfg.stages) else []
        if "synthesize" in cfg.stages:
            n = min(cfg.synthesis.slots, -(-len(records) // place.world))
            _tell("synthesize")
            rows.append(_fitted(place, n, lambda n: synthesis(model, cfg, slots(model, cfg, records, n))))
        for name in cfg.align.variants if "align" in cfg.stages else ():
            size = cfg.variants[name].micro_batch_size
            _tell(f"align/{name}")
            rows.append(_fitted(place, size, lambda n, name=name: _align(model, cfg, place, name, records, n)))  # type: ignore[misc]
        if "evaluate" in cfg.stages:
            _tell("evaluate")
            length, prompts = prompt_length(model, cfg)
            n = min(cfg.evaluate.batch_size, prompts)
            rows.append(_fitted(place, n, lambda n: evaluation(model, cfg, length, n)))
    for size, least, need in text_model_needs(cfg, place.world):
        _tell("the text model")
        rows.append(_fitted(place, size, need, least))
    return rows


def _tell(what: str) -> None:
    """A step of a large batch takes its time, also without weights."""
    print(f"plan: {what} ...", file=sys.stderr, flush=True)


def page(cfg: Config, place: Place, rows: Sequence[Row]) -> list[str]:
    """The plan in words."""
    m, t = cfg.model, cfg.trainer
    several = f"{place.world} ranks ({t.strategy})" if place.world > 1 else "1 rank"
    lines = [f"memory of experiment={cfg.experiment}: model {m.name} in {m.dtype}, {several} on {place.device}, "]
    lines[0] += f"precision {precision_of(cfg)}"
    head = ["stage", "parameters", "trained", "weights", "optimiser", "batch", "peak", "there is", "largest step"]
    table = [head]
    for row in rows:
        n = row.need
        numbers = [_count(n.parameters), _count(n.trained), *(size(b) for b in (n.weights, n.kept, n.rest))]
        table.append([n.stage, *numbers, size(n.peak + beside(place)), size(place.there), n.batch])
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
    if place.world > 1:
        lines.append(f"Each of the {place.world} ranks takes as much.")
    lines.append(
        f"peak: weights + optimiser + batch of one rank, and {size(beside(place))} for the process itself. Not "
        "counted: loading (a copy of the weights), real media in the encoder, judges, the guard."
    )
    bad = [row for row in rows if row.need.peak + beside(place) > place.there]
    if not bad:
        lines.append("everything fits")
    for row in bad:
        may_help = bool(row.need.trained) and row.need.stage != "synthesize" and not t.activation_checkpointing
        lines.append(f"does not fit: {row.need.stage} needs {size(row.need.peak + beside(place))}, there are ")
        lines[-1] += f"{size(place.there)}; {_mended(row, place, may_help)}"
    skipped = [s for s in cfg.stages if s not in PLANNED]
    if skipped:
        lines.append(f"no plan for the stages {', '.join(skipped)}")
    return lines


PLANNED = ("synthesize", "align", "evaluate", "train_detector", "train_detoxifier")


def beside(place: Place) -> int:
    return int(BESIDE.get(place.device, 0.7e9))


def size(n: float) -> str:
    """Bytes for people."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _align(model: Outline, cfg: Config, place: Place, name: str, records: Sequence[Any], micro: int) -> Need:
    variant = replace(cfg.variants[name], micro_batch_size=micro)
    changed = replace(cfg, variants={**cfg.variants, name: variant})
    need = alignment(model, changed, name, align_step(model, changed, name, records, place.world))
    if cfg.trainer.strategy == "fsdp2":
        need = sharded(need, model, place.world, variant.full_finetune)
    return need


def _fitted(place: Place, n: int, need_of: Callable[[int], Need], least: int = 1) -> Row:
    """Of what does not fit, the largest of n/2, n/4, ... (`least` or more) that does. What is beside the weights grows
    in proportion at most, so the search begins where that would fit."""
    need, room = need_of(n), place.there - beside(place)
    if need.peak <= room:
        return Row(need, None)
    smaller = n // 2
    while smaller > least and need.weights + (need.peak - need.weights) * smaller / n > room:
        smaller //= 2
    while smaller >= least:
        if (less := need_of(smaller)).peak <= room:
            return Row(need, (smaller, less))
        smaller //= 2
    return Row(need, None)


def _mended(row: Row, place: Place, recomputing_may_help: bool) -> str:
    if row.fits is not None and row.need.lower is not None:
        n, smaller = row.fits
        key, value = row.need.lower
        words = f"lower {key}={value} to {n} ({size(smaller.peak + beside(place))})"
        return words + (", or try trainer.activation_checkpointing=true" if recomputing_may_help else "")
    at = f" even with {row.need.lower[0]}=1" if row.need.lower is not None else ""
    return f"it does not{at}: take model.dtype=bfloat16, trainer=fsdp2 on more devices (align), or a larger device"
