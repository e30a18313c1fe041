"""Synthesis by one process and by two, one thread each: embeddings per second, in one run, in turns.

    python scripts/bench/scaling.py [--rounds 3] [-- synthesis.harmful=192 synthesis.harmless=192 ...]

Each round starts `train.py` with one process and with two (`trainer=ddp`) on the same concepts. What is compared is the
loop in which embeddings are made (`synthesize/speed.json`, the slowest rank's time); the whole command with imports,
model loading and verification stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = [
    "experiment=sea_image", "stages=[synthesize]", "synthesis.harmful=96", "synthesis.harmless=96",
    "trainer.accelerator=cpu", "logger.tensorboard=false",
]  # fmt: skip


class Timed(NamedTuple):
    """rate: embeddings a second in the loop. command: seconds from start to end."""

    rate: float
    command: float


def once(processes: int, overrides: list[str]) -> Timed:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [*WORK, *overrides, f"run_dir={run}", *(["trainer=ddp", f"trainer.devices={processes}"])]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "train.py", *words], cwd=ROOT, env=os.environ | threads, capture_output=True, text=True
        )
        command = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stderr)
        (row,) = json.loads((run / "synthesize" / "speed.json").read_text())
        return Timed(row["embeddings"] / row["seconds"], command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run (3)")
    parser.add_argument("overrides", nargs="*", help="of the configuration, after --")
    args = parser.parse_args()
    found: dict[int, list[Timed]] = {1: [], 2: []}
    for number in range(args.rounds):
        for processes in (1, 2) if number % 2 == 0 else (2, 1):  # a machine whose speed drifts favours neither
            timed = once(processes, args.overrides)
            found[processes].append(timed)
            print(
                f"round {number + 1}: {processes} process(es), {timed.rate:.2f} embeddings/s, {timed.command:.1f} s",
                flush=True,
            )
    rates = {n: statistics.median(t.rate for t in timed) for n, timed in found.items()}
    commands = {n: statistics.median(t.command for t in timed) for n, timed in found.items()}
    print(f"medians: {rates[1]:.2f} and {rates[2]:.2f} embeddings/s, {rates[2] / rates[1]:.2f}x")
    print(f"whole command: {commands[1]:.1f} and {commands[2]:.1f} s, {commands[1] / commands[2]:.2f}x")


if __name__ == "__main__":
    main()
