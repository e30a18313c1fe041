"""Compares what `plan=true` expects with what torch gave out in a real run, stage by stage (docs/memory.md).

    python scripts/measure_memory.py experiment=sea_image trainer.accelerator=cpu

Runs a few real steps of every stage on the CPU in a temporary run directory. Measured: the weights that the module
holds when a fit begins, and the largest sum of what torch's CPU allocator gave out and took back since
(torch.profiler, profile_memory), which also sees what kernels take for themselves. Prints one row for each stage:
expected and measured bytes, and their ratio.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile

import train
from configs.compose import compose, last_wins
from mllm.live_bytes import bytes_of
from stages.memory_plan import needs, place_of, size

FEW = [
    "synthesis.max_steps=3", "synthesis.retries=0", "synthesis.include_failed=true", "synthesis.verify=false",
    "evaluate.limit=20", "evaluate.variants=[base]", "logger.tensorboard=false", "callbacks.throughput=false",
]  # fmt: skip


def measured(action: Callable[[], Any], weights: int) -> int:
    """Bytes of the peak: weights that are there, and what is allocated while `action` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        action()
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


def compare(words: list[str], steps: int = 4) -> list[tuple[str, int, int]]:
    """(stage, expected, measured) of each stage of the run that the words describe."""
    given = compose(last_wins(*FEW, *words)).config
    few = [f"variants.{name}.steps={steps}" for name in given.align.variants]
    with tempfile.TemporaryDirectory() as folder:
        words = last_wins(*FEW, *few, *words, f"run_dir={Path(folder) / 'run'}")
        cfg = compose(words).config
        expected = [row.need for row in needs(cfg, place_of(cfg)) if not row.need.stage.endswith("scores")]
        seen: list[int] = []
        originals = L.Trainer.fit, L.Trainer.predict

        def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: L.Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
                held = module if any(True for _ in module.parameters()) else module.model
                whole = [*held.parameters(), *held.buffers()]
                if "_mllm" in vars(module):  # the embedding optimiser holds the frozen model apart
                    whole += [*module._mllm[0].model.parameters(), *module._mllm[0].model.buffers()]
                seen.append(measured(lambda: original(self, module, *args, **kwargs), bytes_of(whole)))

            return call

        L.Trainer.fit, L.Trainer.predict = wrapped(originals[0]), wrapped(originals[1])  # type: ignore[method-assign]
        try:
            code = train.main(words)
        finally:
            L.Trainer.fit, L.Trainer.predict = originals  # type: ignore[method-assign]
    if code != 0:
        raise SystemExit(f"the run ended with {code}")
    return [(need.stage, need.peak, peak) for need, peak in zip(expected, seen, strict=True)]


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    for stage, expected, peak in compare(sys.argv[1:]):
        print(f"{stage:18} expected {size(expected):>10}  measured {size(peak):>10}  ratio {expected / peak:.2f}")


if __name__ == "__main__":
    main()
