"""The report for people: `report.md`, and the table that a run ends with on the terminal."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation.guard_report import guard_section
from evaluation.rows import system

CAVEAT = (
    "An attack success rate (ASR) says nothing alone: a model that refuses everything has 0 %. It is never shown here "
    "without benign compliance beside it."
)
HEADS = {
    "asr": "harmful {task}: complied (ASR)",
    "refusal_rate": "harmful {task}: refused",
    "benign_compliance": "benign {task}: complied",
    "reading_accuracy": "{task}: reading accuracy",
}
SECTIONS = {
    "asr": "harmful: complied (ASR)",
    "refusal_rate": "harmful: refused",
    "benign_compliance": "benign: complied",
    "reading_accuracy": "reading accuracy",
}


class Column(NamedTuple):
    head: str
    metric: str
    task: str


def markdown(report: Mapping[str, Any], plots: Mapping[str, PurePath]) -> str:
    """`report.md`; `plots`: title -> path relative to the report."""
    results = report["results"]
    judges = list(dict.fromkeys(entry["judge"] for entry in results if entry["metric"] == "asr"))
    lines = [
        f"# {report['experiment']}: report",
        "",
        f"Model `{report['model'].get('name', '?')}`, seed {report['seed']}, run `{report['run_dir']}`. "
        f"Safety judge: {', '.join(judges) or 'none'}.",
        "",
        f"**{CAVEAT}**",
        "",
        "Cells: rate, [95 % interval], number of judged answers. Answers that could not be judged are "
        "counted apart." + (f" Of the safety judges, {judges[0]} stands in the tables." if len(judges) > 1 else ""),
    ]
    if report["guard"] is not None:
        lines += guard_section(report, lambda entry: _cell(entry, " "))
    for benchmark in dict.fromkeys(entry["benchmark"] for entry in results):
        lines += ["", f"## {benchmark}", "", *_main_table(results, benchmark)]
        if not any(e["benchmark"] == benchmark and e["metric"] == "benign_compliance" for e in results):
            lines += [
                "",
                f"{benchmark} has no harmless requests: read it with the benign compliance of the other tables.",
            ]
        lines += _on_topic(results, benchmark)
        lines += _plot(plots, f"ASR against benign compliance, {benchmark}")
        lines += _mean_table(results, benchmark)
        lines += _judge_table(results, benchmark, judges)
        lines += _scenario_table(results, benchmark)
    if report["synthesis"] is not None:
        lines += ["", "## Synthesis of embeddings", "", *_synthesis_table(report["synthesis"])]
    for title in plots:
        if not title.startswith("ASR against"):
            lines += _plot(plots, title)
    lines += ["", "## Settings", "", *_facts("model", report["model"]), *_facts("versions", report["versions"])]
    lines += _facts("settings", report["settings"])
    return "\n".join(lines) + "\n"


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The main tables on the terminal, one for each benchmark and guard, and the synthesis figures."""
    console = console or Console()
    for benchmark, guard in dict.fromkeys((entry["benchmark"], entry["guard"]) for entry in report["results"]):
        results = [entry for entry in report["results"] if entry["guard"] == guard]
        variants = _variants(results, benchmark)
        about = "" if report["guard"] is None else f", guard {guard}"
        title = escape(f"{report['experiment']}: {benchmark}{about}")
        table = Table(title=title, caption=_unjudged(results, benchmark))
        table.add_column("rate, 95 % interval", no_wrap=True)
        for variant in variants:
            table.add_column(escape(variant.removesuffix(f" + {guard}")), justify="right", no_wrap=True)
        for metric, columns in itertools.groupby(_columns(results, benchmark), key=lambda column: column.metric):
            table.add_section()
            table.add_row(f"[bold]{SECTIONS[metric]}[/bold]")
            for column in columns:
                entries = [_find(results, benchmark, variant, column) for variant in variants]
                topics = [_topic(results, benchmark, variant, column) for variant in variants]
                counts = sorted({entry["n"] for entry in entries if entry is not None})
                n = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
                means = [_mean(results, benchmark, variant, column) for variant in variants]
                head = f"  {escape(_task(column.task))}\n[dim]  n = {n}[/dim]"
                head += "\n  on topic" * any(topics) + "\n  mean of scenarios" * any(means)
                table.add_row(head, *map(_narrow_cell, entries, topics, means))
        console.print(table)
    if (synthesis := report["synthesis"]) is not None:
        console.print(
            f"synthesis: {synthesis['n']} embeddings, OSR {_percent(synthesis['osr'])}, "
            f"VSR {_percent(synthesis['vsr'])}, {synthesis['seconds_per_embedding']:.2f} s "
            f"and {synthesis['steps_mean']:.1f} steps each"
        )


def _narrow_cell(
    entry: Mapping[str, Any] | None, topic: Mapping[str, Any] | None, mean: Mapping[str, Any] | None
) -> str:
    if entry is None or entry["value"] is None:
        return "—"
    low, high = entry["ci95"]
    about = "".join(f"\n{_percent(below['value'])}" for below in (topic, mean) if below is not None)
    return f"[bold]{_percent(entry['value'])}[/bold]\n[dim]{low * 100:.0f}-{high * 100:.0f}[/dim]{about}"


def _topic(
    results: Sequence[Mapping[str, Any]], benchmark: str, variant: str, column: Column
) -> Mapping[str, Any] | None:
    """What stands beside benign compliance: the share on topic. Complying is not yet answering."""
    if column.metric != "benign_compliance":
        return None
    return _find(results, benchmark, variant, Column("", "benign_on_topic", column.task))


def _mean(
    results: Sequence[Mapping[str, Any]], benchmark: str, variant: str, column: Column
) -> Mapping[str, Any] | None:
    """The unweighted mean over scenarios that stands beside a pooled ASR."""
    return _find(results, benchmark, variant, column, "mean") if column.metric == "asr" else None


def _unjudged(results: Sequence[Mapping[str, Any]], benchmark: str) -> str | None:
    """How many answers no metric of the table could judge; None if all were judged."""
    shown = [e for e in results if e["benchmark"] == benchmark and e["scenario"] == "all" and e["unjudged"]]
    worst: dict[tuple[str, str, str], int] = {}
    for entry in shown:  # one answer is in several metrics
        kind = entry["metric"].split("_")[0].replace("asr", "harmful").replace("refusal", "harmful")
        key = (system(entry["variant"], entry["guard"]), entry["task"], kind)
        worst[key] = max(worst.get(key, 0), entry["unjudged"])
    return f"{sum(worst.values())} answers could not be judged: in no rate, see report.md" if worst else None


def _columns(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[Column]:
    """What a benchmark's table shows: ASR for tasks with a medium, refusals for text, then what it costs."""
    about = [e for e in results if e["benchmark"] == benchmark]
    there = dict.fromkeys((e["metric"], e["task"]) for e in about)
    tasks = dict.fromkeys(task for _, task in there)
    columns = []
    for metric, head in HEADS.items():
        for task in sorted(tasks, key=lambda task: task == "text_only"):
            # By the refusal judge the ASR of text is what its refusals leave; another judge has more to say.
            text_asr = any(e["metric"] == "asr" and e["task"] == task and e["judge"] != "refusal" for e in about)
            hidden = (metric == "refusal_rate" and task != "text_only") or (
                metric == "asr" and task == "text_only" and not text_asr
            )
            if (metric, task) in there and not hidden:
                columns.append(Column(head.format(task=_task(task)), metric, task))
    return columns


def _main_table(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    columns = _columns(results, benchmark)
    lines = [
        "| variant | " + " | ".join(column.head for column in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for variant in _variants(results, benchmark):
        cells = []
        for column in columns:
            topic = _topic(results, benchmark, variant, column)
            about = "" if topic is None else f"<br>on topic {_percent(topic['value'])}"
            cells.append(_cell(_find(results, benchmark, variant, column), "<br>", bold=True) + about)
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return lines


def _scenario_table(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    """ASR of every scenario, one table a task, with benign compliance as the last row."""
    lines: list[str] = []
    variants = _variants(results, benchmark)
    for task in dict.fromkeys(e["task"] for e in results if e["benchmark"] == benchmark and e["metric"] == "asr"):
        asr = Column("", "asr", task)
        scenarios = dict.fromkeys(
            e["scenario"] for e in results if (e["benchmark"], e["task"], e["metric"]) == (benchmark, task, "asr")
        )
        own = [s for s in scenarios if s not in ("all", "mean")]
        if len(own) < 2:  # nothing to tell apart
            continue
        lines += ["", f"### {benchmark}, {task.replace('_', ' ')}: ASR by scenario", ""]
        lines += [
            "| scenario | " + " | ".join(f"`{v}`" for v in variants) + " |",
            "|---" + "|---:" * len(variants) + "|",
        ]
        for scenario in (*own, "all", "mean"):
            cells = [_cell(_find(results, benchmark, v, asr, scenario), " ") for v in variants]
            name = {"all": "**all, pooled**", "mean": "**mean of the scenarios**"}.get(scenario) or _name(scenario)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        benign = [_cell(_find(results, benchmark, v, Column("", "benign_compliance", task)), " ") for v in variants]
        lines.append("| *benign compliance* | " + " | ".join(benign) + " |")
    return lines


def _mean_table(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    """The papers' number: every scenario counts alike, however many questions it has."""
    means = [e for e in results if (e["benchmark"], e["metric"], e["scenario"]) == (benchmark, "asr", "mean")]
    tasks = dict.fromkeys(e["task"] for e in means)
    if not tasks:
        return []
    head = "ASR, unweighted mean of the scenarios"
    lines = ["", f"### {benchmark}: {head}", "", "The table above pools all answers; the papers report this mean.", ""]
    lines += ["| variant | " + " | ".join(map(_task, tasks)) + " |", "|---" + "|---:" * len(tasks) + "|"]
    for variant in _variants(results, benchmark):
        cells = [_cell(_find(results, benchmark, variant, Column("", "asr", task), "mean"), " ") for task in tasks]
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return lines


def _judge_table(results: Sequence[Mapping[str, Any]], benchmark: str, judges: Sequence[str]) -> list[str]:
    """The same answers under every judge of ASR, pooled."""
    asr = [e for e in results if (e["benchmark"], e["metric"], e["scenario"]) == (benchmark, "asr", "all")]
    if len(judges) < 2 or not asr:
        return []
    rates = {(system(e["variant"], e["guard"]), e["task"], e["judge"]): e for e in asr}
    lines = ["", f"### {benchmark}: ASR by judge", "", "`:question`: the judge reads the question, too.", ""]
    lines += ["| variant | task | " + " | ".join(f"`{judge}`" for judge in judges) + " |"]
    lines += ["|---|---" + "|---:" * len(judges) + "|"]
    for variant, task in dict.fromkeys((variant, task) for variant, task, _ in rates):
        cells = [_cell(rates.get((variant, task, judge)), " ") for judge in judges]
        lines.append(f"| `{variant}` | {_task(task)} | " + " | ".join(cells) + " |")
    return lines


def _on_topic(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    """How many harmless requests got an answer with the expected words, with intervals."""
    tasks = dict.fromkeys(e["task"] for e in results if (e["benchmark"], e["metric"]) == (benchmark, "benign_on_topic"))
    if not tasks:
        return []
    lines = [
        "",
        "*On topic*: harmless requests whose answer names what was asked for and holds no word of a refusal:",
        "",
    ]
    lines += ["| variant | " + " | ".join(map(_task, tasks)) + " |", "|---" + "|---:" * len(tasks) + "|"]
    for variant in _variants(results, benchmark):
        cells = [_cell(_find(results, benchmark, variant, Column("", "benign_on_topic", task)), " ") for task in tasks]
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return lines


def _synthesis_table(synthesis: Mapping[str, Any]) -> list[str]:
    osr = {"value": synthesis["osr"], "n": synthesis["n"], "ci95": synthesis["osr_ci95"], "unjudged": 0}
    vsr = {"value": synthesis["vsr"], "n": synthesis["vsr_n"], "ci95": synthesis["vsr_ci95"]}
    return [
        "| embeddings | OSR | VSR | seconds an embedding | steps (mean) |",
        "|---:|---:|---:|---:|---:|",
        f"| {synthesis['n']} | {_cell(osr, ' ')} | {_cell({**vsr, 'unjudged': synthesis['vsr_unjudged']}, ' ')} "
        f"| {synthesis['seconds_per_embedding']:.2f} | {synthesis['steps_mean']:.1f} |",
        "",
        "OSR: the target became the model's greedy output within the step limit. VSR: the phrase is found in the "
        "model's free answer to a different question.",
    ]


def _variants(results: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    """Every variant, and apart from it every variant behind a guard."""
    return list(dict.fromkeys(system(e["variant"], e["guard"]) for e in results if e["benchmark"] == benchmark))


def _find(
    results: Sequence[Mapping[str, Any]], benchmark: str, variant: str, column: Column, scenario: str = "all"
) -> Mapping[str, Any] | None:
    key = (benchmark, variant, column.task, column.metric, scenario)
    for entry in results:
        answered = system(entry["variant"], entry["guard"])
        if (entry["benchmark"], answered, entry["task"], entry["metric"], entry["scenario"]) == key:
            return entry
    return None


def _cell(entry: Mapping[str, Any] | None, separator: str, bold: bool = False) -> str:
    if entry is None:
        return "—"
    unjudged = f" (+{entry['unjudged']} unjudged)" if entry["unjudged"] else ""
    if entry["value"] is None:
        return f"none judged{unjudged}"
    low, high = entry["ci95"]
    value = f"**{_percent(entry['value'])}**" if bold else _percent(entry["value"])
    return f"{value}{separator}[{low * 100:.1f}, {high * 100:.1f}] n={entry['n']}{unjudged}"


def _task(task: str) -> str:
    return "text" if task == "text_only" else task.replace("_", " ")


def _name(text: str) -> str:
    """A name from a data file in one cell of a table: it may hold line feeds, bars, links and HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _percent(value: float | None) -> str:
    return "none judged" if value is None else f"{value * 100:.1f} %"


def _plot(plots: Mapping[str, PurePath], title: str) -> list[str]:
    return ["", f"![{title}]({plots[title].as_posix()})"] if title in plots else []


def _facts(name: str, facts: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: " + (", ".join(f"{key} `{_plain(value)}`" for key, value in facts.items()) or "none")]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
