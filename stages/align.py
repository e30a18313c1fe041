"""Stage `align`: LoRA (or full fine-tuning) of the model by SFT or DPO, one sub-stage for each variant.

Text variants see text records only. SEA variants also see embeddings from the store in place of encoded media; the
encoder never runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from peft import PeftModel

from callbacks.interruption import checkpoints, last_checkpoint
from callbacks.probe import Probe
from callbacks.progress import Progress
from callbacks.training_progress import TrainingProgress
from callbacks.wandb_artifacts import log_artifact, use_artifact
from configs.schema import AlignVariant, Config
from datamodules.alignment import AlignmentDataModule, AlignmentExample, Batches, chunks, encode, examples
from datamodules.durable import write_durably
from datamodules.embedding_store import EmbeddingStore
from datamodules.prompt_batches import PromptBatches, batched
from datamodules.records import Record, read_records
from lightning_modules.aligner import Aligner, trainable_model
from lightning_modules.at_work import AtWork
from lightning_modules.dpo_aligner import DPOAligner, load_reference, save_reference
from lightning_modules.losses import DPOLossType
from lightning_modules.sft_aligner import SFTAligner
from mllm.branches import Item
from mllm.loading import MLLM, load
from mllm.recomputing import recompute_activations
from stages.benchmark_prompts import benchmark_prompts
from stages.encode import RECORDS as REAL_RECORDS
from stages.manifest import versions
from stages.media import media_rules
from stages.model_card import model_card
from stages.ranks import wait_for
from stages.replays import replayed
from stages.runs import Run, Stage
from stages.strategies import SharedStep
from stages.synthesize import store_path, text_records
from stages.trainers import device_of, trainer


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError when there is no store for a SEA variant, or DPO lacks rejected answers."""
    unknown = [v for v in cfg.align.variants if v not in cfg.variants]
    if unknown:
        raise ValueError(f"align.variants: {', '.join(unknown)} not in variants; there are {', '.join(cfg.variants)}")
    for name in cfg.align.variants:
        align_variant(cfg, run, name, cfg.variants[name])


def align_variant(cfg: Config, run: Run, name: str, variant: AlignVariant) -> None:
    """One variant: data, adapter, fit, export to `align/<name>/adapter`."""
    keys = ["seed", "model", "data", "synthesis.harmful", "synthesis.harmless", f"variants.{name}", "trainer.precision"]
    after = []
    if variant.data == "sea":
        # Of the stage synthesize, whose own settings do not count where the store is another run's.
        keys += ["align.refusal", "synthesis.include_failed"]
        keys += ["synthesis.verify_max_new_tokens"] * bool(variant.mixture.replay)
        after = ["synthesize"] * (cfg.store.path is None) + ["encode"] * (cfg.real.path is not None)
        keys += ["real"] * (cfg.real.path is not None)
    keys += ["align.probe_every_steps", "align.probe_prompts", "align.patience"]
    made_from = run.settings(*keys, "store.path")
    if cfg.align.patience is not None:  # answers decide when training ends; the finished variant may be asked anything
        made_from |= {f"{key} (probes)": value for key, value in run.settings("evaluate").items()}
    stage = run.stage(f"align/{name}", made_from, after=after)
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    mllm = load(cfg.model, device_of(cfg))
    store = EmbeddingStore.open(store_path(cfg, run.path), mllm.key) if variant.data == "sea" else None
    records = aligned_records(cfg, run, store)
    usable = set() if store is None else set(store.ids(status=None if cfg.synthesis.include_failed else "ok"))
    replays = (
        replayed(cfg, run, stage, mllm, store, sorted(usable)) if store is not None and variant.mixture.replay else None
    )
    prompts, modality = cfg.model.prompts, cfg.model.modality
    data = examples(records, usable, variant.mixture, prompts, modality, cfg.align.refusal, cfg.seed, replays)
    media_ids = sorted(mllm.anchor.media_token_ids)
    items = [encode(e, mllm.prompts, media_ids, pairs=variant.method == "dpo") for e in data]
    module = aligner(mllm, variant, cfg.align.precompute_reference)
    if cfg.trainer.activation_checkpointing:
        recompute_activations(module.model)
    datamodule = AlignmentDataModule(data, items, variant.mixture, store, variant.steps, variant.batch_size, cfg.seed)
    if isinstance(module, DPOAligner) and cfg.align.precompute_reference:
        with AtWork(stage.name, lower(name, variant)).told():
            module.reference = reference(run, stage, module, datamodule.batches, data, items, variant)
    read_from = {}
    if store is not None and run.leader:
        read_from["store"] = use_artifact(cfg, run.path, "store", store.path)
    steps = fit(cfg, stage, name, mllm, module, datamodule, variant)
    used = {e.embedding for e in data if e.embedding is not None}
    real = used & set(store.ids(source="real")) if store is not None else set()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    result = {
        "examples": len(data),
        "embeddings": len(used),
        "real_embeddings": len(real),
        "steps": steps,
        "trained_parameters": trained,
    }
    weights = module.whole_weights()
    if run.leader:
        export(cfg, stage, module, variant, weights)
        card = model_card(cfg, name, variant, result, versions())
        write_durably(adapter_path(run.path, name) / "README.md", card.encode())
        log_artifact(cfg, run.path, "adapter", adapter_path(run.path, name), {"variant": name, **result, **read_from})
    stage.finish(result)


def aligned_records(cfg: Config, run: Run, store: EmbeddingStore | None) -> list[Record]:
    """Text records; with a store, each with the concept that its embedding was made from, and those of real media."""
    if store is None:
        return text_records(cfg)
    if cfg.store.path is None:
        records = read_records(run.path / "synthesize" / "concepts.jsonl")
    else:
        records = [r.with_concept(store.meta(r.id).concept) if r.id in store else r for r in text_records(cfg)]
    return records + (read_records(run.path / REAL_RECORDS) if cfg.real.path else [])


def aligner(mllm: MLLM, variant: AlignVariant, precompute: bool) -> Aligner:
    model = trainable_model(mllm, variant)
    common = {
        "steps": variant.steps,
        "micro_batch_size": variant.micro_batch_size,
        "lr": variant.lr,
        "warmup_steps": variant.warmup_steps,
        "weight_decay": variant.weight_decay,
        "grad_clip": variant.grad_clip,
        "noise": variant.embedding_noise,
        "attack_radius": variant.attack_radius,
    }
    if variant.method == "sft":
        return SFTAligner(mllm, model, **common)  # type: ignore[arg-type]
    return DPOAligner(
        mllm,
        model,
        beta=variant.beta,
        loss_type=cast(DPOLossType, variant.loss_type),  # configs/check.py has checked it
        label_smoothing=variant.label_smoothing,
        sft_weight=variant.sft_weight,
        reference={} if precompute else None,
        **common,
    )


def fit(
    cfg: Config,
    stage: Stage,
    name: str,
    mllm: MLLM,
    module: Aligner,
    data: AlignmentDataModule,
    variant: AlignVariant,
) -> int:
    """Trains, or continues from the last checkpoint of an interrupted attempt. Returns the steps taken."""
    folder = stage.folder / "checkpoints"
    callbacks = [*probes(cfg, name, mllm), *checkpoints(folder, variant.checkpoint_every_steps), TrainingProgress(name)]
    module.at_work = at_work = AtWork(stage.name, lower(name, variant))
    fitting = trainer(
        cfg, stage.folder, name, callbacks, SharedStep, at_work=at_work, max_steps=variant.steps, max_epochs=-1
    )
    if variant.batch_size < fitting.world_size:
        raise ValueError(
            f"variants.{name}.batch_size: got {variant.batch_size}, expected at least one example for each of "
            f"{fitting.world_size} devices"
        )
    with at_work.told():
        fitting.fit(module, data, ckpt_path=last_checkpoint(folder), weights_only=True)
    return fitting.global_step


def probes(cfg: Config, name: str, mllm: MLLM) -> list[Probe]:
    """A part of the benchmarks, asked while the variant `name` is trained; [] without `align.probe_every_steps`."""
    if cfg.align.probe_every_steps is None:
        return []
    few = replace(cfg, evaluate=replace(cfg.evaluate, limit=cfg.align.probe_prompts))
    prompts = [p for p in benchmark_prompts(few) if p.request != "reading"]
    batches = PromptBatches(batched(prompts, cfg.evaluate.batch_size), media_rules(cfg, mllm))
    limit = cfg.evaluate.max_new_tokens
    return [Probe(name, mllm, batches, cfg.align.probe_every_steps, limit, cfg.align.patience, cfg.evaluate.batch_size)]


def lower(name: str, variant: AlignVariant) -> dict[str, int]:
    """What decides how much memory a step takes."""
    return {f"variants.{name}.micro_batch_size": variant.micro_batch_size}


def export(
    cfg: Config, stage: Stage, module: Aligner, variant: AlignVariant, weights: Mapping[str, Any] | None
) -> None:
    """The adapter (or the fine-tuned model), and with `merge` the full checkpoint."""
    folder = stage.folder / "adapter"
    module.export(str(folder), weights)
    if variant.merge and not variant.full_finetune:
        whole = load(cfg.model)  # the trained one may be in shards
        merged = PeftModel.from_pretrained(whole.model, folder).merge_and_unload()
        merged.save_pretrained(stage.folder / "merged")
        whole.processor.save_pretrained(stage.folder / "merged")


def reference(
    run: Run,
    stage: Stage,
    module: DPOAligner,
    batches: Batches,
    data: Sequence[AlignmentExample],
    items: Sequence[Item],
    variant: AlignVariant,
) -> dict[str, tuple[float, float]]:
    """Reference log-probs of every pair, computed once (by the leader) and cached in the stage's folder."""
    path = stage.folder / "reference_logps.safetensors"
    ids = [e.id for e in data]
    if not run.leader:
        return wait_for(lambda: load_reference(path, ids), "the reference log-probs")
    if (cached := load_reference(path, ids)) is not None:
        return cached
    found: dict[str, tuple[float, float]] = {}
    size = variant.micro_batch_size
    # Alike items together: a text prompt is not padded to an image's length.
    order = sorted(range(len(items)), key=lambda i: (data[i].embedding is None, len(items[i].prefix)))
    with Progress("reference log-probs", len(items), "pairs") as progress:
        for at in range(0, len(order), size):
            batch = batches.collate(order[at : at + size])
            for part, E, part_ids in chunks(batch, size):
                values = module.reference_logps(part, E).tolist()
                found |= {i: (v[0], v[1]) for i, v in zip(part_ids, values, strict=True)}
            progress.advance(len(order[at : at + size]))
    save_reference(path, ids, torch.tensor([found[i] for i in ids]))
    return found


def adapter_path(run_path: Path, variant: str) -> Path:
    return run_path / "align" / variant / "adapter"
