"""What the guard costs on benign traffic, as a share of generation time, and against the released procedure.

    python scripts/bench/guard.py [micro_llava|smol_llava]
        [--detector DIR | --backbone micro|minilm|smollm2 [--layers 15 20]] [--dtype bfloat16]
        [--answers 64] [--batch 16] [--released 4] [--max-new-tokens 64] [--threads 2]

One run, the same questions, images and answers on every side, in alternating rounds, so that a machine whose speed
drifts favours nobody:
    guard      answers generated `--batch` at a time, scored by `Guard.check`
    released   the public code of MLLM-Protector: one sample at a time through everything (`--released` of each batch)
    streaming  the answers scored sentence by sentence, reading on from the cache, against re-reading from the start
Without --detector the backbone gets a fresh head, on section means of `--layers` if they are given: what scoring costs
does not depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import compose
from datamodules.benchmarks import BenchmarkPrompt, open_media
from datamodules.micro_benchmark import micro_benchmark
from mllm.backbones import backbone_folder, load_classifier, load_headless, load_tokenizer
from mllm.detector import Detector, DetectorSpec
from mllm.generate import answer
from mllm.guard import Guard
from mllm.guard_segments import Segmenter
from mllm.loading import MLLM, load
from mllm.sections import SectionClassifier, SectionHead
from stages.trainers import quieten


class Clock:
    """Wall and CPU seconds by name, over all rounds; CPU seconds say more on a machine with other work to do."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        return result


def untrained(backbone: str, layers: list[int], dtype: torch.dtype) -> Detector:
    """Flags nothing (threshold 0): benign traffic."""
    torch.manual_seed(0)
    folder = backbone_folder(backbone)
    tokenizer = load_tokenizer(folder)
    model: PreTrainedModel | SectionClassifier
    if layers:
        bare = load_headless(folder, dtype)
        model = SectionClassifier(bare, layers, SectionHead(2 * len(layers) * bare.config.hidden_size, 512))
    else:
        model = load_classifier(folder, tokenizer, dtype)
    return Detector(model, tokenizer, DetectorSpec(threshold=0.0, max_length=256, max_question=64))


def generate(mllm: MLLM, prompts: list[BenchmarkPrompt], tokens: int) -> list[str]:
    media = [open_media(p) for p in prompts]
    return answer(mllm, [p.text for p in prompts], media if media[0] is not None else None, tokens)


def stream(guard: Guard, question: str, text: str) -> int:
    growing = guard.begin(question)
    for at in range(0, len(text), 8):
        growing.feed(text[at : at + 8])
    growing.finish()
    return len(growing.scores)


def reread(guard: Guard, question: str, text: str) -> None:
    segments = Segmenter(guard.scoring.count, guard.every_tokens)
    for cut in [*segments.feed(text), *segments.finish()]:
        guard.detector.score([question], [text[:cut]])


def _ratios(s: dict[str, float], scale: float) -> dict[str, float]:
    """Of seconds by name; `scale`: answers for each one that was done alone."""
    single, alone = s["score, one at a time"] * scale, s["generate, one at a time"] * scale
    return {
        "share": s["score"] / s["generate"],
        "score": single / s["score"],
        "all": (single + alone) / (s["generate"] + s["score"]),
        "stream": s["stream, re-reading"] / s["stream"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="micro_llava")
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--backbone", default="micro")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the detector")
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--released", type=int, default=4, help="answers of each batch done one at a time")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quieten()
    cfg = compose(["experiment=sea_image", f"model={args.model}"]).config
    mllm = load(cfg.model)
    dtype = getattr(torch, args.dtype)
    detector = (
        Detector.load(args.detector, dtype=dtype) if args.detector else untrained(args.backbone, args.layers, dtype)
    )
    guard = Guard(detector, batch_size=args.batch)
    benign = [p for p in micro_benchmark(cfg.model.prompts) if p.request == "benign" and p.media is not None]
    benign = benign[: args.answers - args.answers % args.batch]
    if not benign:
        raise SystemExit(f"--answers {args.answers}: fewer than one batch of {args.batch}")
    generate(mllm, benign[: args.batch], 2)  # warm-up
    guard.check([benign[0].text], ["warm-up"])
    clock, checks, passed, tokens = Clock(), 0, 0, 0
    for at in range(0, len(benign), args.batch):
        part = benign[at : at + args.batch]
        questions = [p.text for p in part]
        answers = clock.measure("generate", lambda p=part: generate(mllm, p, args.max_new_tokens))
        results = clock.measure("score", lambda q=questions, a=answers: guard.check(q, a))
        passed += sum(r.answer == a for r, a in zip(results, answers, strict=True))
        tokens += sum(len(mllm.processor.tokenizer(a)["input_ids"]) for a in answers)
        for p, q, a in list(zip(part, questions, answers, strict=True))[: args.released]:
            clock.measure("generate, one at a time", lambda p=p: generate(mllm, [p], args.max_new_tokens))
            clock.measure("score, one at a time", lambda q=q, a=a: detector.score([q], [a]))
        long = " ".join(answers)  # an answer of many sentences
        checks += clock.measure("stream", lambda q=questions[0], t=long: stream(guard, q, t))
        clock.measure("stream, re-reading", lambda q=questions[0], t=long: reread(guard, q, t))
    n, singles = len(benign), args.released * len(benign) // args.batch
    ratios = {kind: _ratios(s, n / singles) for kind, s in (("wall", clock.wall), ("cpu", clock.cpu))}
    read = str(args.detector or " ".join([args.backbone, *map(str, args.layers)]))
    record = {
        "work": "guard", "model": args.model, "detector": read, "batch": args.batch,
        "answers": n, "threads": args.threads, "wall": clock.wall, "cpu": clock.cpu, "ratios": ratios,
        "byte_identical": passed / n,
    }  # fmt: skip
    print(
        f"model {args.model}, float32; detector {read}, {args.dtype}; batch {args.batch}, {args.threads} threads, CPU"
    )
    print(f"{n} benign answers of {tokens / n:.0f} tokens, byte-identical {passed / n:.1%}; streaming: {checks} checks")
    for kind, r in ratios.items():
        print(
            f"by {kind:4s} seconds: scoring is {r['share']:.2%} of generation; against one at a time: scoring "
            f"{r['score']:.2f}x, generation and scoring {r['all']:.2f}x; streaming on against anew {r['stream']:.2f}x"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"guard_{args.model}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
