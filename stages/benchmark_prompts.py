"""The prompts of the benchmarks that a configuration chooses."""

from __future__ import annotations

import inspect
from pathlib import Path

from configs.keys import nearest
from configs.schema import BENCHMARKS, Config
from datamodules.benchmarks import READERS, BenchmarkPrompt
from datamodules.micro_benchmark import micro_benchmark, micro_tasks
from datamodules.micro_media import micro_medium
from datamodules.micro_utility import micro_utility

MODALITY = {
    "figstep": "image",
    "mm_safetybench": "image",
    "va_safetybench_video": "video",
    "va_safetybench_audio": "audio",
}
"""What a benchmark's media are, where that is settled."""

DRAWN = {"micro": micro_benchmark, "micro_tasks": micro_tasks, "micro_utility": micro_utility}
"""Of the micro world, which lie nowhere."""


def benchmark_prompts(cfg: Config) -> list[BenchmarkPrompt]:
    """All prompts of `evaluate.benchmarks`, of the tasks and scenarios that are chosen; `evaluate.limit` keeps that
    many of each (task, request), evenly spread.

    Raises:
        ValueError: a benchmark is missing or broken (names the file), has no such task or scenario, or has media that
            the model does not take.
    """
    return [prompt for name in cfg.evaluate.benchmarks for prompt in _limited(_chosen(cfg, name), cfg.evaluate.limit)]


def check_drawn(cfg: Config) -> None:
    """The tasks of the benchmarks of the micro world, without drawing a medium.

    Raises:
        ValueError: the modality has no medium in the micro world, or a benchmark has no such task.
    """
    for name in cfg.evaluate.benchmarks:
        if BENCHMARKS[name] is not None:
            continue
        modality = cfg.model.modality
        medium = micro_medium(modality, cfg.model.plugin)
        there = {
            "micro": ("text_only", f"{modality}_plain", f"{modality}_prefixed"),
            "micro_tasks": medium.tasks,
            "micro_utility": ("words", "style", f"{modality}_steps", "text_steps"),
        }[name]
        if not there:
            raise ValueError(f"evaluate.benchmarks: {name} has nothing for the modality {modality}; leave it away")
        if unknown := [task for task in cfg.evaluate.tasks or () if task not in there]:
            raise ValueError(f"evaluate.tasks: {name} has no task {unknown[0]!r}, {nearest(unknown[0], there)}")


def _chosen(cfg: Config, name: str) -> list[BenchmarkPrompt]:
    tasks, scenarios = cfg.evaluate.tasks, cfg.evaluate.scenarios
    prompts = _read(cfg, name)
    if tasks is not None:
        there = dict.fromkeys(p.task for p in prompts)
        if unknown := [task for task in tasks if task not in there]:
            raise ValueError(f"evaluate.tasks: {name} has no task {unknown[0]!r}, {nearest(unknown[0], there)}")
        prompts = [p for p in prompts if p.task in tasks]
    if scenarios is not None:
        there = dict.fromkeys(p.scenario for p in prompts)
        if unknown := [scenario for scenario in scenarios if scenario not in there]:
            raise ValueError(f"evaluate.scenarios: {name} has no scenario {unknown[0]!r}, {nearest(unknown[0], there)}")
        prompts = [p for p in prompts if p.scenario in scenarios]
    modality = MODALITY.get(name)
    if modality not in (None, cfg.model.modality) and any(p.media is not None for p in prompts):
        raise ValueError(
            f"evaluate.benchmarks: the media of {name} are of modality {modality}, model.modality is "
            f"{cfg.model.modality}: take another model, or evaluate.tasks=[text_only]"
        )
    return prompts


def _read(cfg: Config, name: str) -> list[BenchmarkPrompt]:
    """All tasks, or those that are chosen where a reader can leave the others away: their media may not be there."""
    if (key := BENCHMARKS[name]) is None:
        return DRAWN[name](cfg.model.prompts, cfg.seed, cfg.model.modality, cfg.model.plugin)
    reader, root = READERS[name], Path(getattr(cfg.evaluate, key))
    if cfg.evaluate.tasks is not None and "tasks" in inspect.signature(reader).parameters:
        return reader(root, tasks=cfg.evaluate.tasks)
    return reader(root)


def _limited(prompts: list[BenchmarkPrompt], limit: int | None) -> list[BenchmarkPrompt]:
    groups: dict[tuple[str, str], list[BenchmarkPrompt]] = {}
    for p in prompts:
        groups.setdefault((p.task, p.request), []).append(p)
    return [
        group[i * len(group) // n]
        for group in groups.values()
        for n in [min(len(group), limit or len(group))]
        for i in range(n)
    ]
