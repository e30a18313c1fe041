"""Every variant answers every prompt, on as many devices as there are; each prompt once.

The leader writes down what has no answer yet (`todo.json`). Rank 0 appends to the variant's own file, every other rank
to a file of its own (`rank-<n>/<variant>.jsonl`), which the leader takes in when all are done, or at the next launch if
this one is cut off. Each rank says that it is done (`part-<rank>.json`): the one moment when somebody waits.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from callbacks.generation_writer import GenerationWriter
from callbacks.progress import Progress
from configs.schema import Config
from datamodules.benchmark_prompts import BenchmarkPrompt
from datamodules.prompt_batches import PromptDataModule, unanswered
from evaluation.rows import GenerationLog
from lightning_modules.answerer import Answerer
from lightning_modules.at_work import AtWork
from mllm.loading import MLLM, load
from stages.align import adapter_path
from stages.media import media_rules
from stages.ranks import wait_for
from stages.runs import Run, Stage, write_json
from stages.strategies import SeparateRanks
from stages.trainers import device_of, trainer

UNANSWERED = "todo.json"


def answer_all(
    cfg: Config,
    run: Run,
    stage: Stage,
    trained: Path,
    prompts: Sequence[BenchmarkPrompt],
    logs: Mapping[str, GenerationLog],
) -> None:
    """Answers what is not answered yet; on the leader, returns when all ranks are done.

    Args:
        trained: run directory that has the variants' adapters.
        logs: variant -> its file.

    Raises:
        ValueError: prompts are left without an answer.
    """
    if run.leader:
        for stale in stage.folder.glob("part-*.json"):
            stale.unlink()
        for log in logs.values():
            take_in(log, prompts)
        ids = {variant: [p.id for p in log.todo(prompts)] for variant, log in logs.items()}
        write_json(stage.folder / UNANSWERED, {"session": run.session, "todo": ids})
    todo = wait_for(lambda: _of_session(stage.folder / UNANSWERED, run.session), "the list of prompts to answer")
    rank, world = 0, 1
    for variant, ids in todo["todo"].items():
        if ids:
            rank, world = generate(cfg, stage, trained, logs[variant], prompts, set(ids))
    if not run.leader:
        if rank:
            write_json(stage.folder / f"part-{rank}.json", {"session": run.session})
        return
    for other in range(1, world):
        path = stage.folder / f"part-{other}.json"
        wait_for(lambda path=path: _of_session(path, run.session), f"rank {other}")  # type: ignore[misc]
        path.unlink()
    for variant, log in logs.items():
        take_in(log, prompts)
        if left := log.todo(prompts):
            raise ValueError(f"{variant}: {len(left)} prompts have no answer ({left[0].id}, ...); start the run again")
    for folder in stage.folder.glob("rank-*"):
        shutil.rmtree(folder)


def generate(
    cfg: Config,
    stage: Stage,
    trained: Path,
    generations: GenerationLog,
    prompts: Sequence[BenchmarkPrompt],
    missing: Collection[str],
) -> tuple[int, int]:
    """This rank's share of one variant's answers to those that are `missing` (ids). Returns (rank, number of ranks)."""
    variant, spec = generations.variant, cfg.model
    if cfg.evaluate.system_prompt is not None:
        spec = dataclasses.replace(spec, system_prompt=cfg.evaluate.system_prompt)
    mllm = load(spec, device_of(cfg))
    given = cfg.evaluate.adapters.get(variant)
    model = adapted(mllm, adapter_path(trained, variant) if given is None else Path(given), variant)
    # Answers are those of the weights as they are loaded, whatever the precision of training.
    at_work = AtWork(f"{stage.name}, {variant}", {"evaluate.batch_size": cfg.evaluate.batch_size})
    answering = trainer(
        cfg, stage.folder, variant, [], SeparateRanks, logged=False, precision="32-true", at_work=at_work
    )
    rank, world = answering.global_rank, answering.world_size
    batches = unanswered(prompts, cfg.evaluate.batch_size, missing)
    data = PromptDataModule(batches, media_rules(cfg, mllm))
    mine = sum(p.id in missing for batch in batches[rank::world] for p in batch)
    title = f"evaluate {variant}" if world == 1 else f"evaluate {variant}, rank {rank} of {world}"
    before = len(prompts) - len(missing)
    own = generations if rank == 0 else GenerationLog(_own(generations.path, rank), variant)
    answerer = Answerer(mllm, model, cfg.evaluate.max_new_tokens)
    answerer.at_work = at_work
    with Progress(title, before + mine, "answers", done=before) as progress, own, at_work.told():
        answering.callbacks.append(GenerationWriter(own, progress, missing))  # type: ignore[attr-defined]
        answering.predict(answerer, data, return_predictions=False)
    return rank, world


def take_in(generations: GenerationLog, prompts: Sequence[BenchmarkPrompt]) -> None:
    """Moves the answers of other ranks into the variant's file."""
    by_id = {p.id: p for p in prompts}
    for path in sorted(generations.path.parent.glob(f"rank-*/{generations.path.name}")):
        rows = [row for row in GenerationLog(path, generations.variant).rows() if row.id in by_id]
        missing = {p.id for p in generations.todo(prompts)}
        new = [row for row in rows if row.id in missing]
        generations.append([by_id[row.id] for row in new], [row.answer for row in new])
        path.unlink()
    generations.close()


def adapted(mllm: MLLM, path: Path, variant: str) -> torch.nn.Module:
    """The base model, or the model under the variant's adapter (or its fully fine-tuned weights) in that folder.

    Raises:
        ValueError: the adapter does not fit the model; names both.
    """
    if variant == "base":
        return mllm.model
    if (path / "adapter_config.json").exists():
        try:
            return PeftModel.from_pretrained(mllm.model, path).eval()
        except (RuntimeError, ValueError, KeyError) as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"{path}: the adapter of {variant} does not fit {mllm.spec.path} ({told})") from error
    tuned = type(mllm.model).from_pretrained(path, dtype=mllm.model.dtype, use_safetensors=True)
    return tuned.to(mllm.model.device).eval()


def _own(path: Path, rank: int) -> Path:
    return path.parent / f"rank-{rank}" / path.name


def _of_session(path: Path, session: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found if found["session"] == session else None
