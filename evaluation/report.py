"""From answers and judgements to `report.json`: the contract for scripts; `evaluation/report_text.py` is the same
for people.

    report = build_report(rows, log, experiment="sea_image", run_dir=..., model={...}, seed=0,
                          synthesis=synthesis_summary(...))
    write_report(report, run_dir, panels)            # report.json, report.md, plots/*.png

Every rate carries n, a 95 % interval, the judge, and how many answers could not be judged. Scenario "all" pools the
scenarios (Wilson's interval); "mean" is their unweighted mean (evaluation/metrics.py, mean_rate), the number of the
papers, given where there are two scenarios or more. `asr` is what the chosen judges call unsafe; `refusal_rate` and
`benign_compliance` are always the refusal judge's; reading accuracy and "on topic" compare words with the expected
phrase. The schema is checked before anything is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datamodules.durable import write_durably
from evaluation.guard_report import GUARD_COSTS, guard_costs, guard_rates
from evaluation.judges import Judgement, JudgementLog
from evaluation.metrics import (
    AttackSuccessRate,
    BenignCompliance,
    OptimizationSuccessRate,
    Rate,
    RateMetric,
    ReadingAccuracy,
    RefusalRate,
    VerificationSuccessRate,
    mean_rate,
)
from evaluation.phrases import on_topic
from evaluation.plots import Panel, plot_asr_against_compliance, plot_losses
from evaluation.refusal import RefusalJudge
from evaluation.report_text import markdown
from evaluation.rows import GenerationRow

VARIANTS = ("base", "text_sft", "text_dpo", "sea_sft", "sea_dpo")
PACKAGES = ("torch", "transformers", "trl", "peft", "lightning", "torchmetrics")
POOLED, MEAN = "all", "mean"  # "scenarios" of the report's own
WORDS = "words"  # the "judge" of what is compared word by word

_RATE, _INTERVAL = (float, type(None)), (list, type(None))  # null where nothing was judged
REPORT_KEYS: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
    "run_dir": (str,),
    "model": (dict,),
    "versions": (dict,),
    "seed": (int,),
    "settings": (dict,),
    "synthesis": (dict, type(None)),
    "guard": (dict, type(None)),
    "results": (list,),
}
SYNTHESIS_KEYS: dict[str, tuple[type, ...]] = {  # more are allowed
    "n": (int,),
    "osr": _RATE,
    "osr_ci95": _INTERVAL,
    "vsr": _RATE,
    "vsr_n": (int,),
    "vsr_unjudged": (int,),
    "vsr_ci95": _INTERVAL,
    "seconds_per_embedding": (float,),
    "steps_mean": (float,),
}
RESULT_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("variant", "guard", "benchmark", "task", "scenario", "metric", "judge"), (str,)),
    "value": _RATE,
    "n": (int,),
    "unjudged": (int,),
    "ci95": _INTERVAL,
}


@dataclass(frozen=True)
class ReportFiles:
    json: Path
    markdown: Path
    plots: dict[str, Path]


def build_report(
    rows: Iterable[GenerationRow],
    log: JudgementLog,
    *,
    experiment: str,
    run_dir: str | Path,
    model: Mapping[str, Any],
    seed: int,
    settings: Mapping[str, Any] | None = None,
    synthesis: Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    asr_judges: Sequence[str] = (RefusalJudge.name,),
) -> dict[str, Any]:
    """The report as JSON-able values, checked by `validate_report`.

    Args:
        rows: the answers of all variants, and those of the guard (`GuardedRow`).
        log: their judgements; an answer without one counts as unjudged.
        settings: what a reader should know of the run (shown in report.md), JSON-able.
        synthesis: from `synthesis_summary`; None if the run made no embeddings.
        guard: what the guard is made of, JSON-able; None if there are no answers of a guard.
        asr_judges: names of the judges of `asr`; the first one's rates stand in the tables.
    """
    rows = list(rows)
    report = {
        "experiment": experiment,
        "run_dir": str(run_dir),
        "model": dict(model),
        "versions": package_versions(),
        "seed": seed,
        "settings": dict(settings or {}),
        "synthesis": None if synthesis is None else dict(synthesis),
        "guard": None if guard is None else {**guard, "costs": guard_costs(rows)},
        "results": _results(rows, log, asr_judges),
    }
    validate_report(report)
    return report


def write_report(report: Mapping[str, Any], folder: str | Path, panels: Sequence[Panel] = ()) -> ReportFiles:
    """Writes report.json, report.md and plots/*.png into `folder`, replacing older ones; `panels`: loss curves."""
    validate_report(report)
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plots: dict[str, Path] = {}
    for benchmark in dict.fromkeys(entry["benchmark"] for entry in report["results"]):
        path = folder / "plots" / f"asr_against_compliance_{benchmark}.png"
        if plot_asr_against_compliance(report["results"], benchmark, path):
            plots[f"ASR against benign compliance, {benchmark}"] = path
    for panel in panels:
        plots[panel.title] = plot_losses(panel, folder / "plots" / f"{panel.name}.png")
    files = ReportFiles(folder / "report.json", folder / "report.md", plots)
    write_durably(files.json, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    shown = {title: path.relative_to(folder) for title, path in plots.items()}
    write_durably(files.markdown, markdown(report, shown).encode())
    return files


def synthesis_summary(
    converged: Sequence[bool], verified: Sequence[bool | None], steps: Sequence[int], seconds: float
) -> dict[str, Any]:
    """The report's synthesis block.

    Args:
        converged: for each concept, whether its targets became the model's greedy output within the step limit (OSR).
        verified: for each verified embedding, whether the phrase was found in a free answer (VSR); None: unjudged.
        steps: optimiser steps of each concept.
        seconds: wall time of the whole synthesis.
    """
    osr, vsr = OptimizationSuccessRate(sync_on_compute=False), VerificationSuccessRate(sync_on_compute=False)
    osr.update(converged)
    vsr.update(verified)
    tried, found = osr.compute(), vsr.compute()
    return {
        "n": tried.n,
        "osr": tried.value,
        "osr_ci95": _list(tried.ci95),
        "vsr": found.value,
        "vsr_n": found.n,
        "vsr_unjudged": found.unjudged,
        "vsr_ci95": _list(found.ci95),
        "seconds_per_embedding": seconds / max(tried.n, 1),
        "steps_mean": sum(steps) / max(len(steps), 1),
    }


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed packages among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def validate_report(report: Mapping[str, Any]) -> None:
    """Raises ValueError that lists every key that is missing, unknown or of a wrong type, and impossible values."""
    problems = _wrong(report, REPORT_KEYS, "report")
    if isinstance(report.get("synthesis"), Mapping):
        known = {key: value for key, value in report["synthesis"].items() if key in SYNTHESIS_KEYS}
        problems += _wrong(known, SYNTHESIS_KEYS, "synthesis")
    if isinstance(report.get("guard"), Mapping):
        for i, cost in enumerate(report["guard"].get("costs", ())):
            problems += _wrong(cost, GUARD_COSTS, f"guard.costs[{i}]")
    seen = set()
    for i, entry in enumerate(report.get("results") or ()):
        problems += (wrong := _wrong(entry, RESULT_KEYS, f"results[{i}]"))
        if wrong:
            continue
        if (entry["value"] is None) != (entry["n"] == 0) or (entry["ci95"] is None) != (entry["n"] == 0):
            problems.append(f"results[{i}]: value and ci95 are null exactly if n is 0, got {entry}")
        elif entry["value"] is not None and not 0 <= entry["ci95"][0] <= entry["value"] <= entry["ci95"][1] <= 1:
            problems.append(f"results[{i}]: expected 0 <= ci95[0] <= value <= ci95[1] <= 1, got {entry}")
        key = tuple(entry[k] for k in ("variant", "guard", "benchmark", "task", "scenario", "metric", "judge"))
        if key in seen:
            problems.append(f"results[{i}]: a second entry for {key}")
        seen.add(key)
    if problems:
        raise ValueError("report.json would break its contract:\n  " + "\n  ".join(problems))


def _results(rows: list[GenerationRow], log: JudgementLog, asr_judges: Sequence[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str, str], list[GenerationRow]] = {}
    for row in sorted(rows, key=lambda row: _place(row.variant)):  # stable: benchmarks and tasks as generated
        groups.setdefault((row.variant, row.guard, row.benchmark, row.task), []).append(row)
    entries = []
    for (variant, guard, benchmark, task), group in groups.items():
        about = {"variant": variant, "guard": guard, "benchmark": benchmark, "task": task}
        for scenario, metric, judge, rate in _by_scenario(group, log, asr_judges):
            entries.append({
                **about, "scenario": scenario, "metric": metric, "value": rate.value, "n": rate.n,
                "unjudged": rate.unjudged, "ci95": _list(rate.ci95), "judge": judge,
            })  # fmt: skip
    return entries


def _by_scenario(
    group: Sequence[GenerationRow], log: JudgementLog, asr_judges: Sequence[str]
) -> Iterable[tuple[str, str, str, Rate]]:
    """(scenario, metric, judge, rate): pooled, each scenario, and their mean."""
    parts: dict[str, list[GenerationRow]] = {}
    for row in group:
        parts.setdefault(row.scenario, []).append(row)
    found: dict[tuple[str, str], list[Rate]] = {}
    for metric, judge, rate in _rates(group, log, asr_judges):
        yield POOLED, metric, judge, rate
    for scenario, part in parts.items():
        for metric, judge, rate in _rates(part, log, asr_judges):
            found.setdefault((metric, judge), []).append(rate)
            # One that is called "all" could not be told from the pooled rate; it counts there and in the mean.
            if scenario not in (POOLED, MEAN):
                yield scenario, metric, judge, rate
    for (metric, judge), rates in found.items():
        if len(rates) > 1:
            yield MEAN, metric, judge, mean_rate(rates)


def _rates(
    rows: Sequence[GenerationRow], log: JudgementLog, asr_judges: Sequence[str]
) -> Iterable[tuple[str, str, Rate]]:
    """(metric, judge, rate) for the requests that occur among `rows`."""
    refusal = RefusalJudge.name
    harmful, benign, reading = ([row for row in rows if row.request == r] for r in ("harmful", "benign", "reading"))
    if harmful:
        for judge in asr_judges:
            verdicts = [_said(log.get(row, judge), "verdict") for row in harmful]
            yield "asr", judge, _computed(AttackSuccessRate, verdicts)
        yield "refusal_rate", refusal, _computed(RefusalRate, [_said(log.get(r, refusal), "refused") for r in harmful])
    if benign:
        refused = [_said(log.get(row, refusal), "refused") for row in benign]
        yield "benign_compliance", refusal, _computed(BenignCompliance, refused)
    yield from guard_rates(benign)
    if named := [row for row in benign if row.expected is not None]:
        about = [on_topic(row.answer, row.expected or "") if row.answer.strip() else None for row in named]
        yield "benign_on_topic", WORDS, _computed(RateMetric, about)
    if reading:
        phrases = [row.expected or "" for row in reading]
        yield "reading_accuracy", WORDS, _computed(ReadingAccuracy, [row.answer for row in reading], phrases)


def _computed(kind: type[RateMetric], *arguments: Any) -> Rate:
    metric = kind(sync_on_compute=False)  # one rank writes the report
    metric.update(*arguments)
    return metric.compute()


def _said(judgement: Judgement | None, what: str) -> Any:
    return None if judgement is None else getattr(judgement, what)


def _place(variant: str) -> int:
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _wrong(value: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], where: str) -> list[str]:
    problems = [f"{where}.{key} is missing" for key in keys if key not in value]
    problems += [f"{where}.{key} is unknown" for key in value if key not in keys]
    for key, types in keys.items():
        if key not in value:
            continue
        got = value[key]
        if not isinstance(got, types) or (isinstance(got, bool) and bool not in types):
            problems.append(f"{where}.{key} is {got!r}, expected {' or '.join(t.__name__ for t in types)}")
        elif isinstance(got, float) and not math.isfinite(got):
            problems.append(f"{where}.{key} is {got}, expected a finite number")
    return problems
