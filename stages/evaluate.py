"""Stage `evaluate`: every variant answers every benchmark prompt, the judge judges, the report is written.

All ranks answer, the leader judges and reports. With `protector.enabled` the same answers go through the guard too, and
what it shows is judged beside them.
Answers and judgements are JSONL rows on disk: an interrupted evaluation goes on with the missing ones, and another
judge (`judge=local stages=[evaluate]`) re-judges the same answers without generating again. What a paid judge will cost
is told, and compared with `judge.max_cost`, before anything is generated.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.report_logger import log_report
from callbacks.wandb_artifacts import use_artifact
from configs.schema import Config
from datamodules.benchmark_prompts import BenchmarkPrompt
from evaluation.judges import JudgementLog
from evaluation.plots import Chart, Curve, Panel, read_curves
from evaluation.report import build_report, write_report
from evaluation.report_text import print_report
from evaluation.rows import GenerationLog
from stages import source_run
from stages.align import adapter_path
from stages.answering import answer_all
from stages.benchmark_prompts import benchmark_prompts
from stages.guarding import guard_answers, guard_facts
from stages.judging import check_cost, judge_all, judges_needed, make_judges
from stages.media import media_keys
from stages.runs import Run
from stages.synthesize import loss_curve

log = logging.getLogger(__name__)


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for a benchmark that is missing or broken (names the file)."""
    adapters = cfg.evaluate.adapters
    variants = cfg.evaluate.variants or ["base", *cfg.align.variants, *adapters]
    trained = [v for v in variants if v != "base" and v not in adapters]
    made_from, after = run.settings("seed", "model", "evaluate", *media_keys(cfg)), [f"align/{v}" for v in trained]
    made_from |= {f"evaluate.adapters.{v} (sha256)": weights_of(adapters[v]) for v in variants if v in adapters}
    source = None if cfg.protector.source is None else Path(cfg.protector.source)
    if source is not None:  # the adapters of another run
        made_from, after = made_from | source_run.adapters(run, source, trained), []
    # A variant that is trained again loses its own answers, not those of the others.
    stage = run.stage("evaluate/generations", made_from, after, {f"align/{v}": f"{v}.jsonl" for v in trained})
    prompts = benchmark_prompts(cfg)
    logs = {v: GenerationLog(stage.folder / f"{v}.jsonl", v) for v in variants}
    judging = run.path / "evaluate" / "judgements.jsonl"
    taken: dict[str, int] = {}
    if run.leader:
        check_cost(cfg, prompts, logs, JudgementLog(judging))
    if not stage.done:
        if run.leader and source is not None:
            taken = {v: take(run, source, v, prompts, logs[v]) for v in variants}
        answer_all(cfg, run, stage, source or run.path, prompts, logs)
        stage.finish({"variants": variants, "prompts": len(prompts), "taken": taken})
    if not run.leader:  # one process judges and reports
        return
    generated = {variant: generation.rows() for variant, generation in logs.items()}
    rows = [row for answers in generated.values() for row in answers]
    if cfg.protector.enabled:
        rows += guard_answers(cfg, run, generated)
    judges = make_judges(cfg)
    with JudgementLog(judging) as judgements:
        for each in judges_needed(judges):
            judge_all(rows, each, judgements)
        report = build_report(
            rows,
            judgements,
            experiment=cfg.experiment,
            run_dir=run.path,
            model=model_facts(cfg),
            seed=cfg.seed,
            settings=settings(cfg),
            synthesis=synthesis_block(run),
            guard=guard_facts(cfg) if cfg.protector.enabled else None,
            asr_judges=[judge.name for judge in judges],
        )
    files = write_report(report, run.path, panels(cfg, run, variants))
    for kind, folder in read_folders(cfg, source or run.path, variants):
        use_artifact(cfg, run.path, kind, folder)
    log_report(cfg, run.path, report, files, rows)
    print_report(report)
    log.info("report: %s", files.markdown)


def read_folders(cfg: Config, trained: Path, variants: Sequence[str]) -> list[tuple[str, Path]]:
    """(kind, folder) of every adapter that has answered and of the guard's models. Published weights have no folder."""
    given = cfg.evaluate.adapters
    adapters = [Path(given[v]) if v in given else adapter_path(trained, v) for v in variants if v != "base"]
    p = cfg.protector
    guard = [("detector", p.detector), ("detoxifier", p.detoxifier)] if p.enabled else []
    found = [("adapter", folder) for folder in adapters] + [(kind, Path(path)) for kind, path in guard if path]
    return [(kind, folder) for kind, folder in found if folder.is_dir()]


def take(run: Run, source: Path, variant: str, prompts: Sequence[BenchmarkPrompt], generations: GenerationLog) -> int:
    """Copies the answers that another run has on disk and this one lacks. Returns how many."""
    found = {row.id: row for row in source_run.answers(run, source, variant, prompts)}
    known = [p for p in generations.todo(prompts) if p.id in found]
    generations.append(known, [found[p.id].answer for p in known])
    generations.close()
    if known:
        log.info("%s: %d answers taken from %s", variant, len(known), source)
    return len(known)


def synthesis_block(run: Run) -> dict[str, Any] | None:
    """The report's block on the embeddings, if this run made them."""
    try:
        return dict(run.result("synthesize")["summary"])
    except ValueError:
        return None


def panels(cfg: Config, run: Run, variants: Sequence[str]) -> list[Panel]:
    """Loss curves of synthesis and of every aligned variant that was trained here."""
    out: list[Panel] = []
    if curve := loss_curve(run.path):
        steps, values, counts = curve
        share = Curve("still running: the mean is of them alone", steps, [n / max(counts) for n in counts])
        charts = [Chart([Curve("E", steps, values)], xlabel="steps an embedding has had", log_scale=True, share=share)]
        out.append(Panel("synthesis_loss", "Synthesis: mean loss of the embeddings still running, by age", charts))
    files = {v: sorted((run.path / "align" / v).glob("metrics*/metrics.csv")) for v in variants if v != "base"}
    for method in ("sft", "dpo"):
        chosen = {v: paths for v, paths in files.items() if paths and cfg.variants[v].method == method}
        if not chosen:
            continue
        # An extra term makes a loss another quantity: who compares two curves must see it.
        extra = {v: cfg.variants[v].sft_weight if method == "dpo" else 0.0 for v in chosen}
        labelled = {f"{v} (+ {w:g} x SFT loss)" if (w := extra[v]) else v: paths for v, paths in chosen.items()}
        charts = [Chart(read_curves(labelled, "align/loss"), log_scale=True)]
        if method == "dpo":
            charts.append(Chart(read_curves(chosen, "align/reward_accuracy"), "pairs with chosen above rejected"))
            charts.append(Chart(read_curves(chosen, "align/reward_margin"), "reward margin, chosen - rejected"))
        title = f"Alignment: {method.upper()} loss" + " and rewards" * (method == "dpo")
        out.append(Panel(f"align_{method}_loss", title, charts))
    return out


def weights_of(adapter: str) -> str:
    """An adapter counts by content, not by place: a folder may move, or be trained anew."""
    return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()


def model_facts(cfg: Config) -> dict[str, Any]:
    m = cfg.model
    return {"name": m.name, "path": m.path, "revision": m.revision, "modality": m.modality, "dtype": m.dtype}


def settings(cfg: Config) -> dict[str, Any]:
    return {
        "data": cfg.data.name,
        "benchmarks": ", ".join(cfg.evaluate.benchmarks),
        "judge": cfg.judge.kind,
        **({"adapters": dict(cfg.evaluate.adapters)} if cfg.evaluate.adapters else {}),
        "max_new_tokens": cfg.evaluate.max_new_tokens,
        "synthesis": f"slots {cfg.synthesis.slots}, lr {cfg.synthesis.lr}, at most {cfg.synthesis.max_steps} steps",
    }
