"""Embeddings per second of the slot engine against the plain reading of the paper, in one run on the same concepts.

    python scripts/bench/synthesis.py [micro_llava|smol_llava|llava_small] [--slots 64] [--concepts 64] [--plain 8]

`llava_small` (scripts/bench/shapes.py): 576 image tokens before a language model of 42 M parameters and 32,064 words.

Plain reading (SEA, arXiv 2502.12562, section 3): one concept at a time, two separate forwards (content, style) with all
logits, torch's Adam. Both sides bypass the encoder, share learning rate, start and stopping rule, and must reach the
same OSR. The plain side runs on an evenly spread part of the concepts (`--plain`), in two halves before and after the
slot engine, so that a machine whose speed drifts does not favour either.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
from trl.trainer.utils import selective_log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import compose
from datamodules.control_samples import SynthesisJob, synthesis_job
from datamodules.micro_world import records
from datamodules.synthesis_ticks import SynthesisDataModule
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from mllm.loading import MLLM, load
from scripts.bench.shapes import SHAPES, shape_words
from stages.trainers import quieten


@dataclass(frozen=True)
class Side:
    """What one side did: wall and CPU seconds for `n` embeddings, `ok` of them finished, `steps` on average."""

    n: int
    ok: int
    steps: float
    wall: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.n / self.wall


def plain(mllm: MLLM, jobs: Sequence[SynthesisJob], settings: dict[str, object]) -> Side:
    """One concept at a time, one sample a forward, logits everywhere."""
    wall, cpu, ok, steps = time.perf_counter(), time.process_time(), 0, []
    scale = {path: float(e.float().square().mean().sqrt()) for path, e in mllm.anchor.E0_by_path.items()}
    for job in jobs:
        E = {path: e.float().clone().requires_grad_() for path, e in mllm.anchor.E0_by_path.items()}
        groups = [{"params": [e], "lr": settings["lr"] * scale[path]} for path, e in E.items()]  # type: ignore[operator]
        adam = torch.optim.Adam(groups, betas=tuple(settings["betas"]))  # type: ignore[arg-type]
        steps.append(0)
        for step in range(int(str(settings["max_steps"])) + 1):
            steps[-1] = step
            losses, lead = [], []
            for branch in job.item.branches:
                ids = torch.cat([job.item.prefix, branch.ids])[None]
                target = torch.cat([torch.zeros(len(job.item.prefix), dtype=torch.bool), branch.target])[1:]
                with mllm.anchor.inject(E):
                    out = mllm.model(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        use_cache=False,
                        **mllm.anchor.media_inputs(1),
                        **mllm.anchor.type_inputs(ids),
                    )
                logits, labels = out.logits[0, :-1], ids[0, 1:]
                losses.append(-selective_log_softmax(logits, labels)[target].mean())
                chosen, wanted = logits.detach()[target], labels[target]
                top = chosen.topk(2).values
                hit = chosen.argmax(-1) == wanted
                lead.append(bool((hit & (top[:, 0] - top[:, 1] >= settings["margin"])).all()))  # type: ignore[operator]
            if all(lead):
                ok += 1
                break
            adam.zero_grad()
            sum(losses).backward()  # type: ignore[union-attr]
            adam.step()
    return Side(len(jobs), ok, statistics.fmean(steps), time.perf_counter() - wall, time.process_time() - cpu)


def slot_engine(mllm: MLLM, jobs: Sequence[SynthesisJob], slots: int, settings: dict[str, object]) -> Side:
    module = EmbeddingOptimizer(mllm, jobs, slots=slots, retries=0, **settings)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, SynthesisDataModule(lambda: module.busy))
    out = module.outbox
    steps = statistics.fmean(o.steps for o in out)
    return Side(len(out), sum(o.ok for o in out), steps, time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="micro_llava")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--concepts", type=int, default=128)
    parser.add_argument("--plain", type=int, default=8, help="concepts of the plain side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quieten()
    words = [f"model={args.model}"]
    if args.model in SHAPES:
        words = shape_words(args.model)
    cfg = compose(["experiment=sea_image", *words]).config
    s = cfg.synthesis
    settings: dict[str, object] = {
        "lr": s.lr,
        "betas": s.betas,
        "max_steps": s.max_steps,
        "margin": s.margin,
        "seed": 0,
    }
    mllm = load(cfg.model)
    media_ids = sorted(mllm.anchor.media_token_ids)
    chosen = records("train", args.concepts // 2, args.concepts - args.concepts // 2)
    jobs = [synthesis_job(r, mllm.prompts, cfg.model.prompts, media_ids, 0) for r in chosen]
    sample = jobs[:: max(1, len(jobs) // args.plain)][: args.plain]
    slot_engine(mllm, jobs[:2], 2, {**settings, "max_steps": 2})  # warm-up
    first = plain(mllm, sample[: len(sample) // 2], settings)
    engine = slot_engine(mllm, jobs, args.slots, settings)
    second = plain(mllm, sample[len(sample) // 2 :], settings)
    paper = Side(
        first.n + second.n,
        first.ok + second.ok,
        (first.steps * first.n + second.steps * second.n) / (first.n + second.n),
        first.wall + second.wall,
        first.cpu + second.cpu,
    )
    ratio = engine.rate / paper.rate
    per_step = (paper.wall / (paper.n * (paper.steps + 1))) / (engine.wall / (engine.n * (engine.steps + 1)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"model {args.model}, {args.threads} threads, torch {torch.__version__}, device cpu, float32")
    for name, side in (("plain reading", paper), (f"slot engine, S={args.slots}", engine)):
        print(
            f"{name:22s} {side.n:4d} embeddings, OSR {side.ok / side.n:6.1%}, {side.steps:6.1f} steps, "
            f"{side.rate:8.3f}/s wall, {side.n / side.cpu:8.3f} per CPU-second"
        )
    print(
        f"ratio {ratio:.2f}x by embeddings per second, {per_step:.2f}x by optimiser steps per second; "
        f"peak memory {peak:.0f} MB"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "work": "synthesis", "model": args.model, "ratio": ratio, "ratio_per_step": per_step, "threads": args.threads,
        "slots": args.slots, "plain": asdict(paper), "engine": asdict(engine), "peak_memory_mb": peak, "device": "cpu",
    }  # fmt: skip
    (args.out / f"synthesis_{args.model}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
