"""Trains the harm detector with several seeds under both losses, and prints mean and 95 % interval of each metric.

    python scripts/compare_detectors.py runs/detector_seeds --seeds 5 [override ...]

Each run is `python train.py experiment=harm_detector ...` in a folder of its own; finished ones are kept. A seed
draws the split, the head and the order alike, so the interval holds the luck of the test questions too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.compose import last_wins

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("bce", "bce_pairwise")
METRICS = ("auroc", "pair_accuracy", "average_precision", "ece", "recall_at_1_percent_fpr", "recall_at_5_percent_fpr")
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def trained(folder: Path, loss: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """Test metrics of one run; trains it first if that was not done."""
    run_dir = folder / f"{loss}-{seed}"
    words = ["experiment=harm_detector", f"run_dir={run_dir}", f"detector.loss={loss}", f"seed={seed}"]
    done = subprocess.run([sys.executable, "train.py", *last_wins(*words, *overrides)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    record = json.loads((run_dir / "train_detector" / "stage.json").read_text())
    return {**record["result"]["test"], "seconds": record["seconds"]}


def interval(values: list[float]) -> str:
    """`mean +- half width` of the 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    """Train, then print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    folder = args.folder.resolve()
    found = {loss: [trained(folder, loss, seed, args.overrides) for seed in range(args.seeds)] for loss in args.losses}
    print("| loss | " + " | ".join(METRICS) + " | seconds |")
    print("|---" * (len(METRICS) + 2) + "|")
    for loss, runs in found.items():
        cells = [interval([run[name] for run in runs]) for name in METRICS]
        print(f"| {loss} | " + " | ".join(cells) + f" | {statistics.fmean(run['seconds'] for run in runs):.0f} |")


if __name__ == "__main__":
    main()
