"""Stage `evaluate`: every variant answers every benchmark prompt, the judge judges, the report is written.

With `protector.enabled` the same answers go through the guard too, and what it shows is judged beside them.
Answers and judgements are JSONL rows on disk: an interrupted evaluation goes on with the missing ones, and another
judge (`judge=local stages=[evaluate]`) re-judges the same answers without generating again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from callbacks.progress import Progress
from callbacks.report_logger import log_report
from configs.schema import Config
from datamodules.benchmarks import BenchmarkPrompt, open_media, read_figstep, read_xstest
from datamodules.micro_benchmark import micro_benchmark
from evaluation.judges import Judge, JudgementLog, judge_rows, unjudged
from evaluation.plots import Chart, Curve, Panel, read_curves
from evaluation.refusal import RefusalJudge
from evaluation.report import build_report, write_report
from evaluation.report_text import print_report
from evaluation.rows import GenerationLog, GenerationRow
from mllm.generate import answer
from mllm.loading import MLLM, load
from stages import source_run
from stages.align import adapter_path
from stages.guarding import guard_answers, guard_facts
from stages.judging import make_judge
from stages.runs import Run
from stages.synthesize import loss_curve
from stages.trainers import device_of

log = logging.getLogger(__name__)


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for a benchmark that is missing or broken (names the file)."""
    if not run.leader:  # one process answers, judges and reports; the others are done
        return
    variants = cfg.evaluate.variants or ["base", *cfg.align.variants]
    made_from, after = run.settings("seed", "model", "evaluate"), [f"align/{v}" for v in variants if v != "base"]
    source = None if cfg.protector.source is None else Path(cfg.protector.source)
    if source is not None:  # the adapters of another run
        made_from, after = made_from | source_run.adapters(run, source, variants), []
    # A variant that is trained again loses its own answers, not those of the others.
    stage = run.stage("evaluate/generations", made_from, after, {f"align/{v}": f"{v}.jsonl" for v in variants})
    prompts = benchmark_prompts(cfg)
    logs = {v: GenerationLog(stage.folder / f"{v}.jsonl", v) for v in variants}
    if not stage.done:
        taken = {v: take(run, source, v, prompts, logs[v]) for v in variants} if source is not None else {}
        for variant in variants:
            generate(cfg, source or run.path, variant, prompts, logs[variant])
        stage.finish({"variants": variants, "prompts": len(prompts), "taken": taken})
    generated = {variant: generation.rows() for variant, generation in logs.items()}
    rows = [row for answers in generated.values() for row in answers]
    if cfg.protector.enabled:
        rows += guard_answers(cfg, run, generated)
    judge = make_judge(cfg)
    judging = run.path / "evaluate" / "judgements.jsonl"
    with JudgementLog(judging) as judgements:
        for each in judges_needed(judge):
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
            asr_judge=judge.name,
        )
    files = write_report(report, run.path, panels(cfg, run, variants))
    log_report(cfg, run.path, report, files, rows)
    print_report(report)
    log.info("report: %s", files.markdown)


def benchmark_prompts(cfg: Config) -> list[BenchmarkPrompt]:
    """All prompts of the chosen benchmarks; `evaluate.limit` keeps that many of each (task, request), evenly spread."""
    found: list[BenchmarkPrompt] = []
    for name in cfg.evaluate.benchmarks:
        if name == "micro":
            prompts = micro_benchmark(cfg.model.prompts, cfg.seed, cfg.model.modality)
        elif name == "figstep":
            prompts = read_figstep(cfg.evaluate.figstep)
        else:
            prompts = read_xstest(cfg.evaluate.xstest)
        groups: dict[tuple[str, str], list[BenchmarkPrompt]] = {}
        for p in prompts:
            groups.setdefault((p.task, p.request), []).append(p)
        for group in groups.values():
            n = min(len(group), cfg.evaluate.limit or len(group))
            found += [group[i * len(group) // n] for i in range(n)]
    return found


def take(run: Run, source: Path, variant: str, prompts: Sequence[BenchmarkPrompt], generations: GenerationLog) -> int:
    """Copies the answers that another run has on disk and this one lacks. Returns how many."""
    found = {row.id: row for row in source_run.answers(run, source, variant, prompts)}
    known = [p for p in generations.todo(prompts) if p.id in found]
    generations.append(known, [found[p.id].answer for p in known])
    if known:
        log.info("%s: %d answers taken from %s", variant, len(known), source)
    return len(known)


def generate(
    cfg: Config, trained: Path, variant: str, prompts: Sequence[BenchmarkPrompt], generations: GenerationLog
) -> None:
    """Answers what this variant has not answered yet: text and media apart, prompts of like length together."""
    todo = generations.todo(prompts)
    if not todo:
        return
    spec = cfg.model
    if cfg.evaluate.system_prompt is not None:
        import dataclasses

        spec = dataclasses.replace(spec, system_prompt=cfg.evaluate.system_prompt)
    mllm = load(spec, device_of(cfg))
    model = adapted(mllm, trained, variant)
    groups = [[p for p in todo if (p.media is None) == text] for text in (True, False)]
    with Progress(f"evaluate {variant}", len(prompts), "answers", done=len(prompts) - len(todo)) as progress:
        for group in groups:
            group.sort(key=lambda p: len(p.text))
            for at in range(0, len(group), cfg.evaluate.batch_size):
                batch = group[at : at + cfg.evaluate.batch_size]
                media = None if batch[0].media is None else [open_media(p) for p in batch]
                answers = answer(mllm, [p.text for p in batch], media, cfg.evaluate.max_new_tokens, model)
                generations.append(batch, answers)
                progress.advance(len(batch))


def adapted(mllm: MLLM, trained: Path, variant: str) -> torch.nn.Module:
    """The base model, or the model under the variant's adapter (or its fully fine-tuned weights) in that run."""
    if variant == "base":
        return mllm.model
    path = adapter_path(trained, variant)
    if (path / "adapter_config.json").exists():
        return PeftModel.from_pretrained(mllm.model, path).eval()
    tuned = type(mllm.model).from_pretrained(path, dtype=mllm.model.dtype, use_safetensors=True)
    return tuned.to(mllm.model.device).eval()


def judges_needed(judge: Judge) -> list[Judge]:
    """Compliance is always read by the refusal judge; ASR by the chosen one."""
    refusal = RefusalJudge()
    return [refusal] if judge.name == refusal.name else [refusal, judge]


def judge_all(rows: Sequence[GenerationRow], judge: Judge, judgements: JudgementLog) -> None:
    todo = unjudged(rows, judge, judgements)
    with Progress(f"judge {judge.name}", len(todo), "answers") as progress:
        n, failed = judge_rows(todo, judge, judgements, on_batch=progress.advance)
    if failed:
        log.warning(
            "%s: %d of %d answers could not be judged; they are counted apart, run again to retry them",
            judge.name,
            failed,
            n,
        )


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


def model_facts(cfg: Config) -> dict[str, Any]:
    m = cfg.model
    return {"name": m.name, "path": m.path, "revision": m.revision, "modality": m.modality, "dtype": m.dtype}


def settings(cfg: Config) -> dict[str, Any]:
    return {
        "data": cfg.data.name,
        "benchmarks": ", ".join(cfg.evaluate.benchmarks),
        "judge": cfg.judge.kind,
        "max_new_tokens": cfg.evaluate.max_new_tokens,
        "synthesis": f"slots {cfg.synthesis.slots}, lr {cfg.synthesis.lr}, at most {cfg.synthesis.max_steps} steps",
    }
