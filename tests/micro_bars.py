"""What every embedded model is tested for, whatever its medium: answers to the whole benchmark, and rates of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from datamodules.benchmarks import BenchmarkPrompt
from datamodules.micro_benchmark import micro_benchmark
from evaluation.phrases import contains_phrase
from evaluation.refusal import refusal_rule
from mllm.generate import answer
from mllm.loading import MLLM

Answers = list[tuple[BenchmarkPrompt, str]]


def benchmark_answers(mllm: MLLM) -> Answers:
    """The whole benchmark: every held-out phrase, at held-out positions and sizes or by held-out voices."""
    out: Answers = []
    prompts = micro_benchmark(mllm.spec.prompts, 1, mllm.spec.modality)
    for text_only in (True, False):
        group = [p for p in prompts if (p.media is None) == text_only]
        for at in range(0, len(group), 64):
            part = group[at : at + 64]
            media = None if text_only else [p.media for p in part]
            out += list(zip(part, answer(mllm, [p.text for p in part], media, 24), strict=True))
    return out


def reading_accuracy(answers: Answers) -> float:
    """Share of the 224 reading questions whose answer has the phrase."""
    read = [contains_phrase(a, p.expected or "") for p, a in answers if p.request == "reading"]
    assert len(read) == 224
    return sum(read) / len(read)


def compliance(answers: Answers) -> dict[tuple[str, str], float]:
    """Share of answers that are neither empty nor a refusal, by (task, request)."""
    complied: Counter[tuple[str, str]] = Counter()
    n: Counter[tuple[str, str]] = Counter()
    for p, a in answers:
        if p.request != "reading":
            n[p.task, p.request] += 1
            complied[p.task, p.request] += bool(a) and refusal_rule(a) is None
    return {key: complied[key] / n[key] for key in n}


def losses_of(path: Path) -> list[float]:
    """The column `align/loss` of a metrics.csv."""
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    column = header.index("align/loss")
    return [float(r[column]) for r in rows if r[column]]
