"""MM-SafetyBench's images, for the stage `build_benchmark`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.schema import Config
from datamodules import mm_media
from datamodules.benchmark_build import BenchmarkFolder, Made, Row
from datamodules.durable import write_durably
from datamodules.mm_safetybench import QUESTIONS, TASKS, Question, read_questions
from stages.trainers import device_of


def build_mm_safetybench(cfg: Config, folder: BenchmarkFolder) -> list[Row]:
    """TYPO; with a pipeline also SD and SD_TYPO. The questions are copied beside the images.

    Raises:
        ValueError: questions without key phrases, or a task that needs a pipeline where none is set.
    """
    build = cfg.build
    known = [name for name, task in TASKS.items() if task.folder is not None]
    tasks = build.tasks or (known if build.pipeline.path is not None else ["typo"])
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"build.tasks: {unknown[0]!r} is no task of mm_safetybench; expected some of {known}")
    questions = chosen_questions(cfg, folder)
    rows: list[Row] = []
    if "typo" in tasks:
        rows += folder.make(mm_media.typo_items(questions, build), mm_media.make, "typo")
    if "sd" in tasks or "sd_typo" in tasks:
        pictures = make_pictures(cfg, folder, questions)
        rows += pictures
        if "sd_typo" in tasks:
            items = mm_media.sd_typo_items(questions, pictures, build)
            rows += folder.make(items, mm_media.make, "sd_typo")
    return rows


def chosen_questions(cfg: Config, folder: BenchmarkFolder) -> list[Question]:
    """`build.scenarios`, of each the first `build.limit` questions; their files, with these alone, in the folder."""
    by_scenario: dict[str, list[Question]] = {}
    for question in read_questions(Path(cfg.build.source), cfg.build.scenarios):
        by_scenario.setdefault(question.scenario, []).append(question)
    kept = []
    for scenario, found in by_scenario.items():
        chosen = found[: cfg.build.limit]
        kept += chosen
        target = folder.path / QUESTIONS / f"{scenario}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        values = {question.id: dict(question.values) for question in chosen}
        write_durably(target, json.dumps(values, indent=2, ensure_ascii=False).encode())
    return kept


def make_pictures(cfg: Config, folder: BenchmarkFolder, questions: Sequence[Question]) -> list[Row]:
    """The SD images, one after another in this process, on its device. Nothing is loaded if all are there."""
    from mllm.diffusion import load_pipeline, make_picture

    build, p = cfg.build, cfg.build.pipeline
    width, height = build.size
    how = [p.path, p.revision, p.dtype, p.size, p.steps, p.guidance, p.arguments]
    items = []
    for q in questions:
        text = build.picture.replace("{phrase}", q.text(mm_media.KEY_PHRASE))
        seed = zlib.crc32(f"{cfg.seed}/{q.scenario}/{q.id}".encode())
        items.append(mm_media.sd_item(q, {"pipeline": how, "prompt": text, "seed": seed, "size": [width, height]}))
    if all(folder.holds(item) for item in items):
        return [folder.rows[item.path] for item in items]
    pipeline = load_pipeline(p, device_of(cfg))

    def make(_: Path, recipe: Mapping[str, object]) -> Made:
        seed = int(str(recipe["seed"]))
        return mm_media.jpeg(make_picture(pipeline, str(recipe["prompt"]), p, (width, height), seed))

    return folder.make(items, make, "sd", here=True)
