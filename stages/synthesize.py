"""Stage `synthesize`: text safety records -> concepts -> control samples -> one optimised embedding each -> store.

What is in the store is never computed again: an interrupted stage goes on with the concepts that are missing. Several
devices divide the concepts (stages/shares.py); they share the store and nothing else. Several jobs can, too, each with
`synthesis.shard` (stages/synthesis_shard.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L

from callbacks.interruption import StopWhenTold
from callbacks.progress import Progress
from callbacks.report_logger import log_values
from callbacks.slot_checkpoint import GATHERED, SlotCheckpoint, exact_slots, forget_slots, gather_slots
from callbacks.store_embeddings import StoreEmbeddings
from callbacks.synthesis_progress import SynthesisProgress
from callbacks.throughput import peak_memory_mb
from callbacks.wandb_artifacts import log_artifact
from configs.schema import Config
from datamodules.control_samples import synthesis_job
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import Record, read_records, write_records
from datamodules.sources import safety_records, with_concepts
from datamodules.synthesis_ticks import SynthesisDataModule
from evaluation.phrases import shows_concept, words_of
from evaluation.report import synthesis_summary
from lightning_modules.at_work import AtWork
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from lightning_modules.slots import SecondMoment
from mllm.generate import answer_embedded
from mllm.loading import MLLM, load
from stages.runs import Run, Stage, write_json
from stages.shares import (
    Part,
    Plan,
    await_parts,
    await_plan,
    keep_figures,
    leave_part,
    make_plan,
    publish,
    read_curve,
    read_speed,
)
from stages.strategies import SeparateRanks
from stages.trainers import device_of, trainer

log = logging.getLogger(__name__)

OF_LATER_STAGES = {
    "model.lora_targets",
    "model.prompts.replay",
    "model.prompts.prefix_activity",
    "model.prompts.prefix_product",
}
OF_THE_SET = {
    f"synthesis.{key}" for key in ("harmful", "harmless", "verify", "verify_max_new_tokens", "include_failed")
}
"""Say how many embeddings there are and what becomes of them, not how one is made."""


def settings(run: Run) -> dict[str, Any]:
    """The keys that the stage depends on: all of the model's but those that alignment and evaluation alone read."""
    keys = run.settings("seed", "model", "data", "concepts", "synthesis", "store", "trainer.precision")
    return {key: value for key, value in keys.items() if key not in OF_LATER_STAGES}


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for an empty data set, a wrong model or a damaged store; OSError when the disk is full."""
    if run.shard:
        from stages.synthesis_shard import run_shard  # it is made of the parts below

        run_shard(cfg, run, run.shard)
        return
    stage = run.stage("synthesize", settings(run))
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    mllm = load(cfg.model, device_of(cfg))
    plan = None if run.leader else await_plan(stage.folder, run.session)
    records = saved_concepts(cfg, stage.folder, lambda: text_records(cfg), f"data.path={cfg.data.path}")
    with open_store(cfg, run.path, mllm) as store:
        if cfg.store.path is not None:
            check_settings(run, records, store)
        if plan is None:
            plan = make_plan(run.session, records, store, cfg.synthesis.verify)
            gather_slots(stage.folder, plan.missing)
            publish(stage.folder, plan)
        parts = work(cfg, run, stage, mllm, records, store, plan) if to_do(stage, plan) else []
        if run.leader:
            keep_figures(stage.folder, parts)
            complete(cfg, stage, records, store, run.path)
    if not run.leader:
        stage.finish()


def to_do(stage: Stage, plan: Plan) -> bool:
    """Whether anything is left: where slots are, the attempt that made the last embeddings left no figures."""
    return bool(plan.missing or plan.unverified or (stage.folder / GATHERED).exists())


def complete(cfg: Config, stage: Stage, records: Sequence[Record], store: EmbeddingStore, logs: Path) -> None:
    """Ends the stage: everything is in the store. `logs`: the folder whose W&B run has made it."""
    forget_slots(stage.folder)
    store.verify()
    result = summary(stage, records, store)
    log.info("%s", told(result["summary"]))
    figures = {name: result["summary"][name] for name in ("osr", "vsr", "steps_mean", "seconds_per_embedding")}
    log_values(cfg, logs, stage.folder, {f"eval/synthesis/{name}": v for name, v in figures.items() if v is not None})
    log_artifact(cfg, logs, "store", store.path, {**result["summary"], "model_key": store.model_key})
    stage.finish(result)


def text_records(cfg: Config) -> list[Record]:
    """The text safety records that the configuration names."""
    return safety_records(cfg.data, cfg.seed, cfg.synthesis.harmful, cfg.synthesis.harmless)


def saved_concepts(cfg: Config, folder: Path, read: Callable[[], Sequence[Record]], origin: str) -> list[Record]:
    """Records with concepts, from concepts.jsonl if an earlier process got that far. `origin` names them in errors."""
    path = folder / "concepts.jsonl"
    if path.exists():
        return read_records(path)
    records = read()
    with Progress("concepts", len(records), "records") as progress:
        found = with_concepts(records, cfg.concepts, progress.advance, str(device_of(cfg)))
    failures = folder / "concepts_failed.json"
    write_json(failures, [dataclasses.asdict(f) for f in found.failures])
    if not found.records:
        raise ValueError(f"{origin}: none of {len(records)} records yielded a concept; the reasons are in {failures}")
    if found.failures:
        log.warning(
            "%d of %d records yielded no concept; the reasons are in %s", len(found.failures), len(records), failures
        )
    write_records(path, found.records)
    return list(found.records)


def store_path(cfg: Config, run_path: Path) -> Path:
    return Path(cfg.store.path).expanduser() if cfg.store.path else run_path / "synthesize" / "store"


def open_store(cfg: Config, run_path: Path, mllm: MLLM, writer: str | None = None) -> EmbeddingStore:
    return EmbeddingStore.create_or_open(store_path(cfg, run_path), mllm.key, mllm.shapes, cfg.store.dtype, writer)


def work(
    cfg: Config, run: Run, stage: Stage, mllm: MLLM, records: Sequence[Record], store: EmbeddingStore, plan: Plan
) -> list[Part]:
    """Optimises and verifies this rank's share; the leader returns every rank's figures once all are done."""
    by_id = {r.id: r for r in records}
    keep = StoreEmbeddings(store, cfg.model.path, cfg.model.revision, settings_hash(run))
    resume = SlotCheckpoint(stage.folder, cfg.synthesis.checkpoint_every_steps)
    callbacks = [resume, keep, StopWhenTold(resume.ask)]
    at_work = AtWork(stage.name, {"synthesis.slots": cfg.synthesis.slots})
    fit = trainer(cfg, stage.folder, "synthesize", callbacks, SeparateRanks, at_work=at_work, max_epochs=1)
    rank, world = fit.global_rank, fit.world_size
    missing, unverified = plan.share(rank, world)
    resume.exact = exact_slots(stage.folder, missing, by_id) if world == 1 else None
    todo, finished = (missing, 0) if resume.exact is None else (resume.exact.ids, resume.exact.finished)
    before = len(records) - finished - (len(plan.missing) if resume.exact is None else len(todo))
    title = stage.name if world == 1 else f"{stage.name}, rank {rank} of {world}"
    progress = SynthesisProgress(title, before, before + finished + len(todo))
    fit.callbacks.append(progress)  # type: ignore[attr-defined]
    began = time.perf_counter()
    module = optimizer(cfg, mllm, [by_id[id] for id in todo], None if resume.exact is None else resume.exact.width)
    module.at_work = at_work
    with at_work.told():
        fit.fit(module, SynthesisDataModule(lambda: module.busy))
    seconds = time.perf_counter() - began
    if cfg.synthesis.verify:
        with AtWork(f"{stage.name}, verification", at_work.lower).told():
            # One process: of all records, so that the batches are those of an attempt that was not interrupted.
            verify(cfg, mllm, records if world == 1 else [by_id[id] for id in (*missing, *unverified)], store)
    figures = Part(plan.session, rank, seconds, len(missing), round(peak_memory_mb()), module.loss_by_age)
    leave_part(stage.folder, figures)
    return await_parts(stage.folder, plan.session, world) if rank == 0 else []


def optimizer(cfg: Config, mllm: MLLM, records: Sequence[Record], width: int | None = None) -> EmbeddingOptimizer:
    """The embedding optimiser with these records in its queue; `width`: exactly so many slots."""
    media_ids = sorted(mllm.anchor.media_token_ids)
    s = cfg.synthesis
    return EmbeddingOptimizer(
        mllm,
        [synthesis_job(r, mllm.prompts, cfg.model.prompts, media_ids, cfg.seed) for r in records],
        slots=s.slots,
        lr=s.lr,
        betas=s.betas,
        max_steps=s.max_steps,
        warmup_steps=s.warmup_steps,
        lr_schedule=s.lr_schedule,
        margin=s.margin,
        style_weight=s.style_weight,
        init_noise=s.init_noise,
        noise=s.noise,
        retries=s.retries,
        second_moment=cast(SecondMoment, s.second_moment),  # configs/check.py has checked it
        common=s.common,
        shared_prefix=s.shared_prefix,
        seed=cfg.seed,
        width=width,
    )


def verify(cfg: Config, mllm: MLLM, records: Sequence[Record], store: EmbeddingStore) -> None:
    """VSR: asks a *different* question about every E; marks whether the phrase is in the free answer.

    Batches are of all that are ok, whatever is marked already: padding is not quite neutral to rounding.
    """
    ok = set(store.ids(status="ok"))
    asked_about = [r for r in records if r.id in ok]
    size = cfg.synthesis.slots
    batches = [asked_about[at : at + size] for at in range(0, len(asked_about), size)]
    todo = {r.id for r in asked_about if store.meta(r.id).verified is None}
    prompts = cfg.model.prompts
    questions = {"activity": prompts.verify_activity, "product": prompts.verify_product}
    with Progress("verify", len(todo), "embeddings") as progress:
        for part in batches:
            if not any(r.id in todo for r in part):
                continue
            E = {path: e.flatten(0, 1).to(mllm.model.device) for path, e in store.batch([r.id for r in part]).items()}
            asked = [
                questions[r.concept.kind].format(modality=cfg.model.modality) for r in part if r.concept is not None
            ]
            answers = answer_embedded(mllm, asked, E, cfg.synthesis.verify_max_new_tokens)
            for record, answer in zip(part, answers, strict=True):
                if record.id not in todo:
                    continue
                assert record.concept is not None
                concept = record.concept
                # A phrase of signs alone ("?!", an emoji) cannot be looked for: not verified, rather than no synthesis.
                shown = shows_concept(answer, concept.phrase, concept.sentence) if words_of(concept.phrase) else None
                store.mark(record.id, verified=shown, answer=answer, judge="phrase")
                progress.advance()


def summary(stage: Stage, records: Sequence[Record], store: EmbeddingStore) -> dict[str, Any]:
    """OSR, VSR, steps and seconds over all records, and apart for harmful and harmless ones."""
    launches = read_speed(stage.folder)
    # Of the embeddings that were timed: a launch that was killed has left its embeddings, but no time.
    timed = max(1.0, sum(launch["embeddings"] for launch in launches))
    each = sum(launch["seconds"] for launch in launches) / timed

    def block(chosen: Sequence[Record]) -> dict[str, Any]:
        metas = [store.meta(r.id) for r in chosen]
        ok = [m for m in metas if m.status == "ok"]
        return synthesis_summary(
            [m.status == "ok" for m in metas], [m.verified for m in ok], [m.steps for m in metas], each * len(chosen)
        )

    failed = {r.id: store.meta(r.id).reason for r in records if store.meta(r.id).status == "failed"}
    by_harm = {
        name: [r for r in records if r.harmful == flag] for name, flag in (("harmful", True), ("harmless", False))
    }
    return {
        "summary": block(records),
        **{name: block(chosen) for name, chosen in by_harm.items() if chosen},
        "failed": failed,
        "ranks": max((launch["ranks"] for launch in launches), default=1),
        "peak_memory_mb": max((launch["peak_memory_mb"] for launch in launches), default=round(peak_memory_mb())),
    }


def told(result: dict[str, Any]) -> str:
    """OSR and VSR in one line: what a user must know before going on."""
    line = f"{result['n']} embeddings, OSR {result['osr']:.1%}"
    if result["vsr_n"]:
        line += f", VSR {result['vsr']:.1%} of {result['vsr_n']}"
    return f"{line}, {result['steps_mean']:.0f} steps each"


def loss_curve(run_path: Path) -> tuple[list[int], list[float], list[float]] | None:
    """Mean loss by age, of the last attempt: (steps, losses, how many embeddings each is the mean of)."""
    rows = read_curve(run_path / "synthesize")
    return ([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]) if rows else None


def settings_hash(run: Run) -> str:
    """Of what one embedding depends on, whatever stands beside it in the store."""
    of_one = ("seed", "model.", "synthesis.", "trainer.precision")
    kept = {k: v for k, v in settings(run).items() if k.startswith(of_one) and k not in OF_THE_SET}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def check_settings(run: Run, records: Sequence[Record], store: EmbeddingStore) -> None:
    """A store outside of the run may hold embeddings of these records that were made in another way.

    Raises:
        ValueError: it does; nothing is overwritten.
    """
    now = settings_hash(run)
    known = ((r, store.meta(r.id)) for r in records if r.id in store)
    other = [r.id for r, meta in known if (meta.settings_hash, meta.concept) != (now, r.concept)]
    if other:
        raise ValueError(
            f"{store.path}: {len(other)} of {len(records)} embeddings were made with other settings or concepts (the "
            f"first is {other[0]}); give another store.path, the settings they were made with, or leave out the stage "
            "synthesize"
        )
