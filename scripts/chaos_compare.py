"""Whether two run directories hold the same: of one run that was killed and of one that was not.

Equal to the bit: tensors of every safetensors file, embeddings of every store, loss curves (metrics.csv, TensorBoard;
each logged step once), answers, judgements, the report, all other files. Left out: what measures time and memory, names
(of attempts, of the run directory), logs, and checkpoints, which only interrupted runs are resumed from.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from datamodules.embedding_store import EmbeddingStore

OF_TIME = ("seconds", "started", "finished", "time", "steps_per_second", "peak_memory_mb", "launches")
OF_ATTEMPTS = ("id_of_attempt", "session", "attempts", "opened_as", "after", "made_from", "run_dir", "versions")
SKIPPED_FILES = {
    "run.log", "manifest.json", "config.yaml", "speed.json", "plan.json", "todo.json", "costs.json", "hparams.yaml",
    "report.md",  # of report.json, with times
}  # fmt: skip
SKIPPED_FOLDERS = {"checkpoints", "tensorboard", "store", "cache"}


def differences(one: Path, other: Path) -> list[str]:
    """What differs, in words; [] if the runs hold the same."""
    found = []
    files, others = (dict(compared(folder)) for folder in (one, other))
    found += [f"{name} is in one alone" for name in sorted(files.keys() ^ others.keys())]
    for name in sorted(files.keys() & others.keys()):
        found += [f"{name}: {what}" for what in differing(files[name], others[name], one, other)]
    for store in sorted(path.parent.relative_to(one) for path in one.rglob("store.json")):
        found += [f"{store}: {what}" for what in stores(one / store, other / store)]
    for events in sorted(path.relative_to(one) for path in one.rglob("tensorboard")):
        found += [f"{events}: {what}" for what in dicts(scalars(one / events), scalars(other / events))]
    return found


def compared(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of the files that count."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_file() or SKIPPED_FOLDERS & set(name.parts) or path.name in SKIPPED_FILES:
            continue
        if not path.name.startswith("."):  # locks, and what a kill left of a file that was not finished
            yield str(name), path


def differing(one: Path, other: Path, run: Path, other_run: Path) -> Iterator[str]:
    """What differs in a file that both have."""
    if one.suffix == ".safetensors":
        yield from tensors(load_file(one), load_file(other))
    elif one.name == "metrics.csv":
        yield from dicts(curve(one), curve(other))
    elif one.suffix in (".json", ".jsonl"):
        mine, theirs = values(one, run), values(other, other_run)
        if mine != theirs:
            yield f"{first_difference(mine, theirs)}"
    elif one.read_bytes().replace(str(run).encode(), b"") != other.read_bytes().replace(str(other_run).encode(), b""):
        yield "other bytes"


def tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(one.keys() ^ other.keys()):
        yield f"{name} is in one alone"
    for name in sorted(one.keys() & other.keys()):
        if not torch.equal(one[name], other[name]):
            apart = (one[name].double() - other[name].double()).abs().max() if one[name].numel() else 0
            yield f"{name} differs by up to {apart:.3g}"


def stores(one: Path, other: Path) -> Iterator[str]:
    """Embeddings and what is known about them; each was stored once."""
    with EmbeddingStore.open(one) as mine, EmbeddingStore.open(other) as theirs:
        if theirs.verify().duplicates:
            yield f"{theirs.verify().duplicates} embeddings were stored twice"
        if mine.ids() != theirs.ids():
            yield f"{len(set(mine.ids()) ^ set(theirs.ids()))} embeddings are in one alone"
            return
        for id in mine.ids():
            a, b = mine.get(id), theirs.get(id)
            yield from (f"{id}: {what}" for what in tensors(a.E or {}, b.E or {}))
            if timeless(asdict(a.meta)) != timeless(asdict(b.meta)):
                yield f"{id}: {first_difference(timeless(asdict(a.meta)), timeless(asdict(b.meta)))}"


def curve(path: Path) -> dict[str, Any]:
    """Step -> what was logged. A step that was logged twice is told as one that never can be equal."""
    rows: dict[str, Any] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None in row or None in row.values() or row["step"] in rows:
                rows[f"a torn or repeated row of step {row['step']}"] = object()
            rows[row["step"]] = {k: v for k, v in row.items() if not k.startswith("perf/")}
    return rows


def scalars(folder: Path) -> dict[str, Any]:
    """Tag and step -> value; TensorBoard shows a step that was logged twice once, if both times were equal."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.startswith("perf/") and not is_volatile(value.tag) and value.tensor.float_val:
                    equal = ("nan" if v != v else v for v in value.tensor.float_val)  # NaN is not equal to itself
                    found.setdefault(f"{value.tag} at {event.step}", set()).update(equal)
    return found


def dicts(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    if lacking := sorted(one.keys() ^ other.keys()):
        yield f"{len(lacking)} rows are in one alone, as {lacking[0]}"
    for key in one:
        if key in other and one[key] != other[key]:
            yield f"{key}: {one[key]} and {other[key]}"


def values(path: Path, run: Path) -> Any:
    """What a JSON file holds, without times and names; lines in alphabetical order."""
    text = path.read_text(encoding="utf-8").replace(str(run), "RUN")
    if path.suffix == ".json":
        return timeless(json.loads(text))
    return sorted(json.dumps(timeless(json.loads(line)), sort_keys=True) for line in text.splitlines())


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not is_volatile(k)}
        if {"status", "result"} <= value.keys():  # a stage's record: its id names one attempt
            kept.pop("id", None)
        return {k: timeless(v) for k, v in kept.items()}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def is_volatile(key: str) -> bool:
    return key in OF_TIME or key in OF_ATTEMPTS or "seconds" in key


def first_difference(one: Any, other: Any, where: str = "") -> str:
    """Place and values of the first difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            if one.get(key) != other.get(key):
                return first_difference(one.get(key), other.get(key), f"{where}/{key}")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return first_difference(a, b, f"{where}/{i}")
    return f"{where}: {str(one)[:200]} and {str(other)[:200]}"
