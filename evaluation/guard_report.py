"""What a guard does to answers and what it costs: its rows of `report.json`, its block, and its part of `report.md`.

    benign_unchanged    harmless requests whose answer the guard left byte for byte as it was / all of them
    over_flagging       harmless requests whose answer the detector called harmful / those that it scored
    report["guard"]     {"detector": ..., "costs": [one entry for each variant and benchmark, `GUARD_COSTS`]}

Harmless requests are those of every benchmark: the safe prompts of XSTest among them. ASR and benign compliance of
guarded answers come from the same code as those of all answers (evaluation/report.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evaluation.guarded_rows import NOT_SCORED, RETRIED, GuardedRow
from evaluation.metrics import Rate, RateMetric
from evaluation.rows import GenerationRow

BYTES, DETECTOR = "bytes", "detector"  # the "judges" of the guard's own rates
GUARD_COSTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("variant", "benchmark"), (str,)),
    # answers = passed + detoxified + refused; failed: refused because a model of the guard broke.
    **dict.fromkeys(("answers", "passed", "detoxified", "refused", "failed"), (int,)),
    # Sums over the answers: wall time, tokens read by the detector and written by the detoxifier.
    **dict.fromkeys(("scoring_seconds", "rewriting_seconds", "tokens_scored", "tokens_written"), (float, int)),
}
Cell = Callable[[Mapping[str, Any] | None], str]

COLUMNS = {
    "asr": "harmful: complied (ASR)",
    "benign_compliance": "benign: complied",
    "benign_unchanged": "benign: unchanged",
    "over_flagging": "benign: flagged",
}


def guard_rates(benign: Sequence[GenerationRow]) -> Iterable[tuple[str, str, Rate]]:
    """(metric, judge, rate) of those among the answers to harmless requests that went through the guard."""
    rows = [row for row in benign if isinstance(row, GuardedRow)]
    if not rows:
        return
    for name, judge, outcomes in (
        ("benign_unchanged", BYTES, [row.answer == row.original for row in rows]),
        ("over_flagging", DETECTOR, [row.flagged for row in rows]),
    ):
        metric = RateMetric(sync_on_compute=False)
        metric.update(outcomes)
        yield name, judge, metric.compute()


def guard_costs(rows: Iterable[GenerationRow]) -> list[dict[str, Any]]:
    """One entry for each variant and benchmark that went through the guard, with the keys of `GUARD_COSTS`."""
    groups: dict[tuple[str, str], list[GuardedRow]] = {}
    for row in rows:
        if isinstance(row, GuardedRow):
            groups.setdefault((row.variant, row.benchmark), []).append(row)
    return [
        {
            "variant": variant,
            "benchmark": benchmark,
            "answers": len(group),
            **{action: sum(r.action == action for r in group) for action in ("passed", "detoxified", "refused")},
            "failed": sum(r.reason in RETRIED | NOT_SCORED for r in group),
            "scoring_seconds": sum(r.scoring_seconds for r in group),
            "rewriting_seconds": sum(r.rewriting_seconds for r in group),
            "tokens_scored": round(sum(r.tokens_scored for r in group)),
            "tokens_written": round(sum(r.tokens_written for r in group)),
        }
        for (variant, benchmark), group in groups.items()
    ]


def guard_section(report: Mapping[str, Any], cell: Cell) -> list[str]:
    """The part of `report.md` on the guard: every variant with and without it, then what it cost.

    Args:
        cell: shows a rate of `report["results"]`, or its absence (None), as one cell.
    """
    guard = report["guard"]
    lines = ["", "## Alignment, guard, both", ""]
    lines += [
        "Every variant with and without the guard, over the same answers. *Unchanged*: byte for byte as the model said "
        "it. *Flagged*: the detector called it harmful (over-flagging)."
    ]
    guarded = {(e["benchmark"], e["task"]): None for e in report["results"] if e["guard"] != GenerationRow.guard}
    for benchmark, task in guarded:
        lines += ["", f"### {benchmark}, {task.replace('_', ' ')}", ""]
        lines += _combinations([e for e in report["results"] if (e["benchmark"], e["task"]) == (benchmark, task)], cell)
    lines += ["", "### What the guard added", ""]
    lines += [
        "| variant | benchmark | answers | passed | detoxified | refused | of these failed | scoring: s | rewriting: s "
        "| tokens scored | tokens written |",
        "|---|---" + "|---:" * 9 + "|",
    ]
    for e in guard["costs"]:
        counts = " | ".join(str(e[key]) for key in ("answers", "passed", "detoxified", "refused", "failed"))
        lines.append(
            f"| `{e['variant']}` | {e['benchmark']} | {counts} | {_seconds(e['scoring_seconds'], e['answers'])} | "
            f"{_seconds(e['rewriting_seconds'], e['answers'])} | {e['tokens_scored']} | {e['tokens_written']} |"
        )
    lines += [
        "",
        "Seconds are wall time of the whole and, in brackets, of one answer on average; scoring includes that of "
        "rewrites. *Failed*: a model of the guard broke or gave no score, so the refusal was shown.",
    ]
    return lines


def _combinations(results: Sequence[Mapping[str, Any]], cell: Cell) -> list[str]:
    """The table of one benchmark and task: a row for each variant and guard."""
    rates: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for e in results:
        if e["scenario"] == "all":
            rates.setdefault((e["variant"], e["guard"], e["metric"]), e)  # of several judges the first
    shown = [metric for metric in COLUMNS if any(metric == known for _, _, known in rates)]
    lines = [
        "| variant | guard | " + " | ".join(COLUMNS[metric] for metric in shown) + " |",
        "|---|---" + "|---:" * len(shown) + "|",
    ]
    for variant, guard in dict.fromkeys((variant, guard) for variant, guard, _ in rates):
        cells = [cell(rates.get((variant, guard, metric))) for metric in shown]
        lines.append(f"| `{variant}` | {guard} | " + " | ".join(cells) + " |")
    return lines


def _seconds(total: float, answers: int) -> str:
    return f"{total:.2f} ({total / max(1, answers):.4f})"
