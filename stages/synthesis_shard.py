"""One shard of a synthesis: several jobs work on one run directory, each started by itself (a SLURM array).

    python train.py experiment=sea_image run=mine stages=[synthesize] synthesis.shards=4 synthesis.shard=0   # to 3

Shard i of n makes the embeddings of every n-th record from the i-th, into the store that all share. It is a stage of
its own, `synthesize/shard-i-of-n`, with its own slots, figures, journal in the store and log (`run-shard-i-of-n.log`);
so it is skipped, resumed or refused like any other stage, and may itself have several ranks. What all share - the
record of the stage `synthesize`, concepts.jsonl, store.json - is touched by one shard at a time (`Run.turn`). The shard
that finds every embedding stored and verified at its end finishes the stage `synthesize`. Nobody waits for anybody's
work, so the shards may run at once, one after the other, or again. docs/decisions/0011 says why.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

import lightning as L

from callbacks.slot_checkpoint import forget_slots, gather_slots
from configs.schema import Config
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import Record
from mllm.loading import load
from stages import ranks
from stages.runs import Run, Stage, read_record
from stages.shares import Plan, await_plan, keep_figures, make_plan, publish
from stages.synthesize import (
    check_settings,
    complete,
    open_store,
    saved_concepts,
    settings,
    store_path,
    text_records,
    to_do,
    work,
)
from stages.trainers import device_of

log = logging.getLogger(__name__)


def run_shard(cfg: Config, run: Run, name: str) -> None:
    """Raises what the whole stage raises, and ValueError while shards of another division are at work."""
    whole = begin(run)
    stage = run.stage(f"synthesize/{name}", settings(run))
    if whole is not None and whole.done:
        if not stage.done:  # this division came later; other ranks of this launch have to be told
            publish(stage.folder, Plan(run.session, [], []))
            stage.finish({"embeddings": 0})
        return
    if not stage.done:
        work_on_shard(cfg, run, stage, name)
    if whole is not None:
        with run.turn():
            end(cfg, run, whole)


def work_on_shard(cfg: Config, run: Run, stage: Stage, name: str) -> None:
    """What a stage `synthesize` does, for every n-th record."""
    L.seed_everything(cfg.seed, verbose=False)
    mllm = load(cfg.model, device_of(cfg))
    plan = None if run.leader else await_plan(stage.folder, run.session)
    with run.turn() if run.leader else nullcontext():
        records = shared_concepts(cfg, run)
    mine = records[cfg.synthesis.shard :: cfg.synthesis.shards]
    # A name of its own for each writer: also right where a file system has no locks between machines.
    writer = name.removeprefix("shard-").replace("-", "") + ("" if run.leader else f".{ranks.global_rank()}")
    with open_store(cfg, run.path, mllm, writer) as store:
        if cfg.store.path is not None:
            check_settings(run, records, store)
        if plan is None:
            plan = make_plan(run.session, mine, store, cfg.synthesis.verify)
            gather_slots(stage.folder, plan.missing)
            publish(stage.folder, plan)
        parts = work(cfg, run, stage, mllm, mine, store, plan) if to_do(stage, plan) else []
    if run.leader:
        keep_figures(stage.folder, parts)
        forget_slots(stage.folder)
    stage.finish({"embeddings": len(mine)})


def begin(run: Run) -> Stage | None:
    """The stage `synthesize`, opened for all shards; None on other ranks than the leader."""
    if not run.leader:
        return None
    with run.turn():
        return run.stage("synthesize", settings(run))


def shared_concepts(cfg: Config, run: Run) -> list[Record]:
    """The concepts of all records; the first shard makes them."""
    folder = run.path / "synthesize"
    return saved_concepts(cfg, folder, lambda: text_records(cfg), f"data.path={cfg.data.path}")


def end(cfg: Config, run: Run, whole: Stage) -> None:
    """Finishes the stage `synthesize` if nothing is left to do for any shard: nobody writes then."""
    record = read_record(run.path, whole.name)
    if record is None or record["status"] == "done":
        return
    records = shared_concepts(cfg, run)
    with EmbeddingStore.open(store_path(cfg, run.path)) as store:
        left = make_plan(run.session, records, store, cfg.synthesis.verify)
        n = len({*left.missing, *left.unverified})
        if n:
            log.info("%d of %d embeddings are left to other shards", n, len(records))
        else:
            assert run.shard is not None
            complete(cfg, whole, records, store, whole.folder / run.shard)  # each shard is a W&B run of its own
