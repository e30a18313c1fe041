"""Another run's adapters, and those of its answers that this run would generate again.

`experiment=protector protector.source=RUN_DIR` evaluates what that run trained. The other run is only read. Its answers
are taken if they came from the same model, seed and generation settings, and from the adapters that lie there now;
whatever else the benchmarks ask is generated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.schema import BENCHMARKS
from datamodules.benchmarks import BenchmarkPrompt
from evaluation.rows import GenerationLog, GenerationRow
from stages.runs import Run, difference, read_record

PLACES = {name: f"evaluate.{key}" for name, key in BENCHMARKS.items() if key is not None}
"""Benchmark -> the setting that says where it lies."""
WHICH = (
    "evaluate.benchmarks",
    "evaluate.variants",
    "evaluate.limit",
    "evaluate.tasks",
    "evaluate.scenarios",
    *PLACES.values(),
)
"""Settings that say which prompts are asked, not what is answered to each of them."""


def adapters(run: Run, source: Path, variants: Sequence[str]) -> dict[str, str]:
    """What this run's generations are made from beside its own settings: the identity of each variant's training.

    Raises:
        ValueError: a variant was not trained there, or on another model; names the keys that differ.
    """
    found: dict[str, str] = {}
    for variant in variants:
        if variant == "base":
            continue
        record = read_record(source, f"align/{variant}")
        if record is None or record["status"] != "done":
            there = ", ".join(sorted(path.parent.name for path in source.glob("align/*/adapter"))) or "none"
            raise ValueError(
                f"protector.source: {source} has no finished adapter of {variant} (it has {there}); "
                "finish that run, or choose with evaluate.variants=[base,...]"
            )
        now = run.settings("model")
        before = {key: value for key, value in record["made_from"].items() if key in now}
        if changed := difference(before, {key: now[key] for key in before}):
            told = "; ".join(f"{key}: {old} there, {new} here" for key, (old, new) in changed.items())
            raise ValueError(f"protector.source: {source} trained {variant} on another model ({told}); set it alike")
        found[f"protector.source align/{variant}"] = record["id"]
    return found


def answers(run: Run, source: Path, variant: str, prompts: Sequence[BenchmarkPrompt]) -> list[GenerationRow]:
    """The other run's answers to these prompts, where they hold for this run; [] if its settings differ."""
    record = read_record(source, "evaluate/generations")
    if record is None or not _holds(run, source, variant, record):
        return []
    asked = {p.id: p for p in prompts if _same_files(run, record["made_from"], p.benchmark)}
    rows = GenerationLog(source / "evaluate" / "generations" / f"{variant}.jsonl", variant).rows()
    return [row for row in rows if row.id in asked and row.prompt == asked[row.id].text]


def _holds(run: Run, source: Path, variant: str, record: dict[str, Any]) -> bool:
    """Made with the same settings, and (but for the base) from the adapter that lies there now."""
    decisive, theirs = (
        {key: value for key, value in settings.items() if key not in WHICH}
        for settings in (run.settings("seed", "model", "evaluate"), record["made_from"])
    )
    trained = read_record(source, f"align/{variant}") or {}
    same_adapter = variant == "base" or record["after"].get(f"align/{variant}") == trained.get("id")
    return not difference(theirs, decisive) and same_adapter


def _same_files(run: Run, made_from: dict[str, Any], benchmark: str) -> bool:
    """Whether a benchmark was read from the same place; the embedded one is drawn by the seed."""
    key = PLACES.get(benchmark)
    return key is None or made_from.get(key) == run.settings("evaluate")[key]
