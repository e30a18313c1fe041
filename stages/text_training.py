"""What the stages `train_detector` and `train_detoxifier` share: the backbone, its adapter, the fit, the export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from callbacks.interruption import checkpoints, last_checkpoint
from callbacks.training_progress import TrainingProgress
from configs.schema import Config, Lora
from datamodules.micro_pairs import micro_parts
from datamodules.qa_batches import QuestionTexts, StepDataModule
from datamodules.qa_pairs import Answer, Part, QAPair, read_pairs, require, split_pairs
from lightning_modules.detoxifier import DetoxifierTuner
from lightning_modules.harm_detector import HarmDetector
from mllm.frozen_layers import freeze_lower
from stages.runs import Stage
from stages.strategies import SharedStep
from stages.trainers import trainer


def question_parts(cfg: Config) -> dict[Part, list[QAPair]]:
    """The labelled answers of `data`, split by question; `pairs.limit` bounds the questions of the training part.

    Raises:
        ValueError: the data is missing, malformed, or a part lacks a label.
    """
    d = cfg.data
    if d.format == "micro":
        parts = micro_parts(cfg.model.prompts, cfg.seed, cfg.pairs.validation, cfg.model.modality, cfg.model.plugin)
    else:
        if d.path is None:
            raise ValueError(f"data.path: not set; data.format={d.format} reads a file, a folder or a hub id")
        where = {"subset": d.subset, "split": d.split, "revision": d.revision}
        bad_rows: Any = d.bad_rows
        pairs = read_pairs(d.format, d.path, columns=d.columns, bad_rows=bad_rows, **where)  # type: ignore[arg-type]
        if d.harmless_path is not None:  # harmless questions: their answers are harmless, whichever column they are in
            columns = d.harmless_columns or d.columns
            more = read_pairs("jsonl", d.harmless_path, columns=columns, bad_rows=bad_rows)
            for p in more[: d.harmless_limit]:
                pairs.append(QAPair(p.question, Answer(p.better.text, True), None, p.group, p.source))
        parts = split_pairs(pairs, cfg.seed, d.holdout, cfg.pairs.validation)
    if cfg.pairs.limit is not None:
        kept = set(list(dict.fromkeys(p.group for p in parts["train"]))[: cfg.pairs.limit])
        parts["train"] = [p for p in parts["train"] if p.group in kept]
    require(parts, d.holdout, cfg.pairs.validation)
    return parts


def adapted(model: PreTrainedModel, cfg: Config, lora: Lora, task: str) -> nn.Module:
    """The model with LoRA above the frozen layers, or with everything above them unfrozen.

    Raises:
        ValueError: LoRA's targets are not set or match no module.
    """
    b = cfg.backbone
    freeze_lower(model, b.frozen_layers)
    if b.full_finetune:
        return model
    if not b.lora_targets:
        raise ValueError(f"backbone {b.name}: backbone.lora_targets is empty; name modules, or full_finetune=true")
    layers = range(b.frozen_layers, model.config.get_text_config().num_hidden_layers)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=b.lora_targets,
        layers_to_transform=list(layers),
        task_type=task,
    )
    return get_peft_model(model, config)


def harmful_weight(train: Sequence[QuestionTexts]) -> float:
    """Harmless labels for each harmful one."""
    harmless = sum(label for q in train for _, label in q.labels)
    return harmless / max(1, sum(len(q.labels) for q in train) - harmless)


def steps_of(epochs: float, items: int, batch_size: int) -> int:
    """Optimiser steps of so many passes; one at least."""
    return max(1, math.ceil(epochs * items / min(batch_size, items)))


def fit(
    cfg: Config,
    stage: Stage,
    module: HarmDetector | DetoxifierTuner,
    data: StepDataModule,
    steps: int,
    every: int,
    clip: float,
    part: str = "",
    learned: str = "",
) -> None:
    """Trains, or continues from the last checkpoint of an interrupted attempt.

    A `part` of a stage has checkpoints of its own, and no loggers: they would show several curves as one. `learned`:
    names what is learned from, where the stage's settings do not; checkpoints of other data are not gone on from.
    """
    folder = stage.folder / "checkpoints" / part.replace(" ", "_") / learned
    at_work = module.at_work
    fitting = trainer(
        cfg,
        stage.folder,
        stage.name,
        [*checkpoints(folder, every), TrainingProgress(part or stage.name)],
        SharedStep,
        logged=not part,
        at_work=at_work,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip or None,
    )
    size = data.batches.buckets.batch_size
    if size < fitting.world_size:
        raise ValueError(
            f"{stage.name}: a batch has {size} examples, expected one at least for each of {fitting.world_size} "
            "devices; raise batch_size or give more data"
        )
    with at_work.told():
        fitting.fit(module, data, ckpt_path=last_checkpoint(folder), weights_only=True)


def export(
    model: nn.Module, tokenizer: Any, folder: Path, base: str, full: bool, weights: dict[str, Any] | None = None
) -> None:
    """Weights (an adapter, or all of them) and tokenizer, for plain transformers and peft. `weights`: whole ones, where
    the model's are in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    if not full:
        model.peft_config["default"].base_model_name_or_path = base  # type: ignore[index, union-attr]
    model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a checkpoint computes."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
