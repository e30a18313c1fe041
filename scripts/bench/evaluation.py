"""Answers to 200 prompts of mixed length against a loop of one `generate` after another, as public scripts have it.

    python scripts/bench/evaluation.py [--model micro_llava] [--prompts 200] [--threads 2]

Both answer the same prompts greedily with the same model and as many new tokens; half of the prompts have a picture.
What is timed is what `evaluate` does (batches of like length, `Trainer.predict`, rows on the disk) and the loop with
the processor's call in it. The loop answers an evenly spread part (`--loop`), in two halves, before and after the
batches. How many answers are equal, word for word, is printed: rounding may decide some.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from callbacks.generation_writer import GenerationWriter
from callbacks.progress import Progress
from configs.compose import compose
from datamodules.benchmark_prompts import BenchmarkPrompt, open_media
from datamodules.media_files import MediaRules
from datamodules.prompt_batches import PromptDataModule, batched
from evaluation.rows import GenerationLog
from lightning_modules.answerer import Answerer
from mllm.generate import answer
from mllm.loading import MLLM, load
from scripts.bench.machine import Clock, described, record
from scripts.bench.shapes import SHAPES, shape_words
from stages.benchmark_prompts import benchmark_prompts
from stages.media import media_rules
from stages.strategies import SeparateRanks
from stages.trainers import quieten, trainer


def chosen(prompts: list[BenchmarkPrompt], n: int) -> list[BenchmarkPrompt]:
    """As many with a picture as without, drawn from seed 0."""
    rng = random.Random(0)
    kinds = [[p for p in prompts if (p.media is None) == text] for text in (True, False)]
    return [p for kind in kinds for p in rng.sample(kind, n // 2)]


def loop(mllm: MLLM, prompts: list[BenchmarkPrompt], rules: MediaRules, new: int) -> dict[str, str]:
    """One after another."""
    out = {}
    for p in prompts:
        media = None if p.media is None else [open_media(p, rules)]
        out[p.id] = answer(mllm, [p.text], media, new)[0]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro_llava")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--loop", type=int, default=200, help="prompts of the loop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quieten()
    words = shape_words(args.model) if args.model in SHAPES else [f"model={args.model}"]
    cfg = compose(["experiment=sea_image", *words, "trainer.accelerator=cpu"]).config
    mllm, new = load(cfg.model), cfg.evaluate.max_new_tokens
    prompts, rules = chosen(benchmark_prompts(cfg), args.prompts), media_rules(cfg, mllm)
    n = min(args.loop, len(prompts))
    part = [prompts[i * len(prompts) // n] for i in range(n)]
    clock = Clock(torch.device("cpu"))

    def batches() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            log = GenerationLog(Path(folder) / "base.jsonl", "base")
            answering = trainer(cfg, Path(folder), "base", [], SeparateRanks, logged=False, precision="32-true")
            data = PromptDataModule(batched(prompts, args.batch), rules)
            with Progress("evaluate", len(prompts), "answers") as progress, log:
                writer = GenerationWriter(log, progress, {p.id for p in prompts})
                answering.callbacks.append(writer)  # type: ignore[attr-defined]
                answering.predict(Answerer(mllm, mllm.model, new), data, return_predictions=False)
            return {row.id: row.answer for row in log.rows()}

    loop(mllm, part[:2], rules, new)  # warm-up
    first, a = clock.timed(lambda: loop(mllm, part[: len(part) // 2], rules, new))
    ours, seconds = clock.timed(batches)
    second, b = clock.timed(lambda: loop(mllm, part[len(part) // 2 :], rules, new))
    alone = first | second
    equal = sum(ours[id] == said for id, said in alone.items())
    per_prompt, peer = seconds / len(prompts), (a + b) / len(part)
    lengths = [len(mllm.prompts.prompt(p.text, p.media is not None)) for p in prompts]
    print(described("cpu", args.threads))
    print(
        f"{args.model}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {new} new tokens at most\n"
        f"loop {peer * 1e3:.1f} ms a prompt, batches of {args.batch} {per_prompt * 1e3:.1f} ms, "
        f"ratio {peer / per_prompt:.2f}x; {equal} of {len(alone)} answers equal"
    )
    row = {
        "work": "evaluation", "model": args.model, "ratio": peer / per_prompt, "median_s": per_prompt,
        "median_peer_s": peer, "prompts": len(prompts), "loop": len(part), "batch": args.batch,
        "prompt_tokens": [min(lengths), max(lengths)], "max_new_tokens": new, "equal_answers": equal,
    }  # fmt: skip
    record(args.out, f"evaluation_{args.model}", row, args.threads)


if __name__ == "__main__":
    main()
