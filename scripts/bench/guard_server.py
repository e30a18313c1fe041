"""200 concurrent streaming requests through the guard's server: none lost, none unguarded, p50 and p99.

    python scripts/bench/guard_server.py --detector DIR [--detoxifier DIR] [--requests 200] [--model micro_llava]

A real server on loopback in front of the embedded model, the official `openai` client before it. Half of the requests
are harmful, half benign. Each answer that came is scored once more by the detector itself, anew and from the start:
`unguarded` counts the streamed texts (without the refusal) that it calls harmful. Without --detector an untrained one
stands in: then `unguarded` and the times mean something, the share of refusals does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import compose
from datamodules.micro_benchmark import micro_benchmark
from mllm.detector import Detector
from mllm.detoxifier import Detoxifier
from mllm.guard import REFUSAL, Guard
from mllm.guard_local import Local
from mllm.guard_metrics import Metrics
from mllm.guard_queue import Settings
from mllm.guard_server import make_app, make_server
from mllm.loading import load
from scripts.bench.guard import untrained
from stages.trainers import quieten


async def ask_all(url: str, questions: list[str]) -> list[dict[str, Any]]:
    async def one(client: openai.AsyncOpenAI, question: str) -> dict[str, Any]:
        start, first, text, finish = time.perf_counter(), None, "", None
        message: Any = [{"role": "user", "content": question}]
        try:
            async for event in await client.chat.completions.create(model="micro", messages=message, stream=True):
                if piece := event.choices[0].delta.content:
                    first = first or time.perf_counter() - start
                    text += piece
                finish = event.choices[0].finish_reason or finish
        except openai.APIError as error:
            return {"question": question, "error": type(error).__name__}
        total = time.perf_counter() - start
        return {"question": question, "text": text, "finish": finish, "first": first or total, "total": total}

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        return await asyncio.gather(*(one(client, q) for q in questions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="micro_llava")
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--detoxifier", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-active", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quieten()
    cfg = compose(["experiment=sea_image", f"model={args.model}"]).config
    detector = Detector.load(args.detector) if args.detector else untrained("micro")
    if args.detector is None:
        detector.threshold = 0.5
    metrics = Metrics()
    guard = Guard(
        detector, Detoxifier.load(args.detoxifier) if args.detoxifier else None, timeout=300, observe=metrics.model_call
    )
    settings = Settings(max_active=args.max_active, max_waiting=args.requests, timeout=600, grace=5)
    app = make_app(guard, Local(load(cfg.model), max_new_tokens=48), settings, metrics)
    server = make_server(app, settings, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    prompts = [p for p in micro_benchmark(cfg.model.prompts) if p.media is None]
    groups = [[p.text for p in prompts if p.request == kind] for kind in ("harmful", "benign")]
    questions = [groups[n % 2][(n // 2) % len(groups[n % 2])] for n in range(args.requests)]
    start = time.perf_counter()
    rows = asyncio.run(ask_all(server.addresses()[0], questions))
    wall = time.perf_counter() - start
    server.should_exit = True
    thread.join(20)
    done = [r for r in rows if r.get("finish")]
    shown = [
        r["text"].removesuffix(REFUSAL).rstrip("\n") if r["finish"] == "content_filter" else r["text"] for r in done
    ]
    pairs = [(r["question"], text) for r, text in zip(done, shown, strict=True) if text]
    scores = detector.score([q for q, _ in pairs], [t for _, t in pairs])
    unguarded = int(detector.harmful(scores).sum())
    refused = [sum(r["finish"] == "content_filter" for r in done if r["question"] in set(g)) for g in groups]
    cuts = {name: statistics.quantiles([r[name] for r in done], n=100) for name in ("first", "total")}
    print(f"{args.requests} concurrent streams, {args.threads} threads, model {args.model}: {wall:.1f} s")
    print(f"lost {len(rows) - len(done)}, unguarded {unguarded}; refused: harmful {refused[0]}, benign {refused[1]}")
    print(f"whole answer: p50 {cuts['total'][49]:.2f} s, p99 {cuts['total'][98]:.2f} s")
    print(f"first text:   p50 {cuts['first'][49]:.2f} s, p99 {cuts['first'][98]:.2f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "work": "guard_server",
        "requests": args.requests,
        "threads": args.threads,
        "wall": wall,
        "lost": len(rows) - len(done),
        "unguarded": unguarded,
        "refused": {"harmful": refused[0], "benign": refused[1]},
        "seconds": {n: {"p50": c[49], "p99": c[98]} for n, c in cuts.items()},
    }
    (args.out / "guard_server.json").write_text(json.dumps(record, indent=1))
    if len(done) < len(rows) or unguarded:
        raise SystemExit("failed: an answer was lost or left unguarded")


if __name__ == "__main__":
    main()
