"""Tables for a README from the reports of runs that differ in their seed: means, and each run where they differ.

    for s in 0 1 2; do python train.py experiment=sea_video run=seed$s seed=$s; done
    python scripts/seed_table.py runs/sea_video/seed*

The first table has the benchmark `micro`, the second the tasks of `micro_tasks` (where the runs have them), the third
the embeddings: OSR, VSR and seconds each, as Table 6 of SEA (arXiv 2502.12562).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with a report.json, one for each seed")
    try:
        reports = [read(run) for run in parser.parse_args(argv).runs]
        alike(reports)
        print_tables(reports)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


def read(run: Path) -> Report:
    """Raises ValueError for a folder without a report."""
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name run directories whose stage evaluate is done")
    report: Report = json.loads(path.read_text())
    return report


def alike(reports: Sequence[Report]) -> None:
    """Raises ValueError if two runs have one seed, or differ in more than that."""
    seeds = [r["seed"] for r in reports]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds}: each run must have another seed")
    for report in reports[1:]:
        for key in ("experiment", "model", "settings"):
            if report[key] != reports[0][key]:
                raise ValueError(f"{report['run_dir']}: {key} {report[key]}, the first run has {reports[0][key]}")


def print_tables(reports: Sequence[Report]) -> None:
    modality = reports[0]["model"]["modality"]
    tables = [alignment_table(reports, modality), tasks_table(reports), synthesis_table(reports, modality)]
    print("\n\n".join(table for table in tables if table))


def alignment_table(reports: Sequence[Report], modality: str) -> str:
    """One row a variant: both errors on the medium, on text, and reading."""
    plain, prefixed = f"{modality}_plain", f"{modality}_prefixed"
    head = (
        f"| variant | harmful {modality}, complied (ASR), plain / prefixed | harmful text refused | "
        f"benign {modality} complied [on topic], plain / prefixed | benign text complied [on topic] | reading |"
    )
    rows = [head, "|---|---|---|---|---|---|"]
    for variant in variants(reports):
        cells = [
            " / ".join(cell(reports, variant, "micro", task, "asr") for task in (plain, prefixed)),
            cell(reports, variant, "micro", "text_only", "refusal_rate"),
            " / ".join(benign(reports, variant, "micro", task) for task in (plain, prefixed)),
            benign(reports, variant, "micro", "text_only"),
            cell(reports, variant, "micro", plain, "reading_accuracy"),
        ]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tasks_table(reports: Sequence[Report]) -> str:
    """ASR and benign compliance in each task of `micro_tasks`; "" where no run has it."""
    tasks = list(dict.fromkeys(r["task"] for r in reports[0]["results"] if r["benchmark"] == "micro_tasks"))
    if not tasks:
        return ""
    rows = [
        f"| ASR / benign complied [on topic] | {' | '.join(tasks)} |",
        "|---|" + "---|" * len(tasks),
    ]
    for variant in variants(reports):
        cells = [
            f"{cell(reports, variant, 'micro_tasks', task, 'asr')} / {benign(reports, variant, 'micro_tasks', task)}"
            for task in tasks
        ]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def synthesis_table(reports: Sequence[Report], modality: str) -> str:
    """OSR, VSR, steps and seconds; "" where a run took its embeddings from another."""
    made = [r["synthesis"] for r in reports]
    if None in made:
        return ""
    shares = [show([100 * m[key] for m in made]) for key in ("osr", "vsr")]
    seconds = " ".join(f"{m['seconds_per_embedding']:.2f}" for m in made)
    steps = " ".join(f"{m['steps_mean']:.0f}" for m in made)
    return (
        "| | embeddings | OSR | VSR | steps each | seconds each |\n|---|---|---|---|---|---|\n"
        f"| {modality} | {made[0]['n']} | {shares[0]} | {shares[1]} | {steps} | {seconds} |"
    )


def variants(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(r["variant"] for report in reports for r in report["results"] if r["guard"] == "none"))


def benign(reports: Sequence[Report], variant: str, benchmark: str, task: str) -> str:
    """Complied, and in brackets the share that also names what was asked for: `95.5 [94.6] % (94.6, 96.4)`."""
    mean, *each = cell(reports, variant, benchmark, task, "benign_compliance").split(" % ")
    topic = cell(reports, variant, benchmark, task, "benign_on_topic").split(" %")[0]
    return " ".join([f"{mean.removesuffix(' %')} [{topic}] %", *each])


def cell(reports: Sequence[Report], variant: str, benchmark: str, task: str, metric: str) -> str:
    """Of all scenarios, without a guard.

    Raises:
        ValueError: a run has no such figure.
    """
    values = []
    for report in reports:
        found = [
            r["value"]
            for r in report["results"]
            if (r["variant"], r["guard"], r["benchmark"], r["task"], r["scenario"], r["metric"])
            == (variant, "none", benchmark, task, "all", metric)
        ]
        if not found:
            raise ValueError(
                f"{report['run_dir']}: no {metric} of {variant} in {benchmark}/{task}; run it with the others"
            )
        if None in found:  # nothing could be judged
            return "-"
        values.append(100 * found[0])
    return show(values)


def show(percentages: Sequence[float]) -> str:
    """`98.8 % (99.1, 98.2, 99.1)`."""
    each = [f"{p:.1f}".removesuffix(".0") for p in percentages]
    mean = f"{sum(percentages) / len(percentages):.1f}".removesuffix(".0") + " %"
    return mean if len(set(each)) == 1 else f"{mean} ({', '.join(each)})"


if __name__ == "__main__":
    main()
