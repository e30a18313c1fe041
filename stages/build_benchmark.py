"""Stage `build_benchmark`: a benchmark's media in its published layout, file by file, with a manifest.

Everything lies in one folder (`build.path`, else `build_benchmark/data`) that the benchmark's reader takes: the media,
the questions, and `manifest.jsonl`. What is there already is not made again (datamodules/benchmark_build.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from callbacks.progress import Progress
from configs.schema import Config
from datamodules import figstep_build, va_media
from datamodules.benchmark_build import BenchmarkFolder, Item, Made, Row, measures, totals
from datamodules.durable import write_durably
from datamodules.key_phrases import key_phrase
from datamodules.records import Record
from datamodules.scene_descriptions import scene_descriptions
from datamodules.sources import with_concepts
from datamodules.va_safetybench import TASKS, Kind, Question, medium_path, questions_folder, read_questions
from datamodules.video_files import VideoClip, encode_video
from stages.mm_building import build_mm_safetybench
from stages.runs import Run
from stages.trainers import device_of

log = logging.getLogger(__name__)


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for questions that cannot be read, files that could not be made, or that came out damaged."""
    source = Path(cfg.build.source)
    made_from = {**run.settings("seed", "build", "concepts"), "build.source's content": content(source)}
    stage = run.stage("build_benchmark", made_from)
    if stage.done or not run.leader:
        if not run.leader:
            stage.finish()
        return
    place = Path(cfg.build.path).expanduser() if cfg.build.path else stage.folder / "data"
    folder = BenchmarkFolder(place, cfg.build.workers or os.cpu_count() or 1, tell)
    rows = BUILDERS[cfg.build.benchmark](cfg, folder)
    if cfg.build.check and (wrong := folder.check()):
        raise ValueError(f"{len(wrong)} of {len(folder.rows)} files are damaged, the first: {wrong[0]}")
    counts = totals(rows)
    for task, of in counts.items():
        log.info("%s: %d files, %.1f MB, %.0f s of media", task, of["files"], of["bytes"] / 1e6, of["seconds"])
    log.info("%s is in %s", cfg.build.benchmark, place)
    stage.finish({"folder": str(place), "tasks": counts, "checked": cfg.build.check})


def tell(title: str, total: int, done: int) -> Progress:
    return Progress(title, total, "files", done)


def content(source: Path) -> str:
    """A hash of the questions: the media of other questions are another benchmark."""
    digest = hashlib.sha256()
    for path in sorted([*source.glob("*questions/*.json"), *source.glob("*.csv")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_video(cfg: Config, folder: BenchmarkFolder) -> list[Row]:
    """TYPO; with a pipeline also DM and DM+TYPO."""
    build = cfg.build
    tasks = chosen_tasks(cfg, "video", ["typo"] + ["dm", "dm_typo"] * (build.pipeline.path is not None))
    if build.pipeline.path is None and {"dm", "dm_typo"} & set(tasks):
        raise ValueError("build.pipeline.path is not set: dm and dm_typo need a text-to-video pipeline of diffusers")
    questions = chosen_questions(cfg, "video", folder)
    phrases = key_phrases(cfg, questions, "typo", folder.path)
    rows: list[Row] = []
    if "typo" in tasks:
        rows += folder.make(va_media.typo_items(questions, phrases, build), va_media.make, "typo")
    if "dm" in tasks or "dm_typo" in tasks:
        clips = make_clips(cfg, folder, questions, phrases)
        rows += clips
        if "dm_typo" in tasks:
            by_key = {q.key: row for q, row in zip(questions, clips, strict=True)}
            items = va_media.dm_typo_items(questions, phrases, by_key, build)
            rows += folder.make(items, va_media.make, "dm_typo")
    return rows


def build_audio(cfg: Config, folder: BenchmarkFolder) -> list[Row]:
    """Audio_only, KPT and KPT_noise."""
    tasks = chosen_tasks(cfg, "audio", list(va_media.SPOKEN_TASKS))
    questions = chosen_questions(cfg, "audio", folder)
    phrases = key_phrases(cfg, questions, "kpt", folder.path)
    items = va_media.spoken_items(questions, phrases, tasks, cfg.build, cfg.seed)
    return folder.make(items, va_media.make, "speech")


def build_figstep(cfg: Config, folder: BenchmarkFolder) -> list[Row]:
    """The images, and the list of questions."""
    source = Path(cfg.build.source)
    rows = folder.make(figstep_build.figstep_items(source, cfg.build), figstep_build.make, "figstep")
    write_durably(folder.path / "safebench.csv", figstep_build.questions_file(source, cfg.build))
    if cut := [row["path"] for row in rows if row["cut"]]:
        log.warning("%d images are cut off at the bottom, as the published ones are: %s ...", len(cut), cut[0])
    return rows


BUILDERS: dict[str, Callable[[Config, BenchmarkFolder], list[Row]]] = {
    "va_safetybench_video": build_video,
    "va_safetybench_audio": build_audio,
    "figstep": build_figstep,
    "mm_safetybench": build_mm_safetybench,
}


def chosen_tasks(cfg: Config, kind: Kind, default: Sequence[str]) -> list[str]:
    """Raises ValueError for a task that is none of the benchmark's, or has no medium."""
    tasks = cfg.build.tasks or list(default)
    known = [task for task in TASKS[kind] if task != "text_only"]
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"build.tasks: {unknown[0]!r} is no task of {cfg.build.benchmark}; expected some of {known}")
    return tasks


def chosen_questions(cfg: Config, kind: Kind, folder: BenchmarkFolder) -> list[Question]:
    """The questions of the configuration; the files they stand in are copied beside the media, with these alone."""
    source = Path(cfg.build.source)
    questions = read_questions(source, kind, cfg.build.scenarios)
    kept = []
    by_scenario: dict[str, list[Question]] = {}
    for question in questions:
        by_scenario.setdefault(question.scenario, []).append(question)
    for scenario, found in by_scenario.items():
        found = found[: cfg.build.limit]
        kept += found
        path = questions_folder(source, kind) / f"{scenario}.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        target = folder.path / f"{kind.title()}_questions" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if len(found) == len(values):
            shutil.copyfile(path, target)
        else:
            write_durably(target, json.dumps({q.id: values[q.id] for q in found}, indent=2).encode())
    return kept


def key_phrases(cfg: Config, questions: Sequence[Question], task: str, folder: Path) -> dict[str, str]:
    """`Question.key` -> key phrase: of the data, else by comparison with the task's wording, else extracted.

    Raises:
        ValueError: the extractor finds none either; names the question.
    """
    found: dict[str, str | None] = {q.key: q.key_phrase for q in questions}
    if cfg.build.phrases == "compare":
        for q in questions:
            found[q.key] = found[q.key] or key_phrase(q.texts["text_only"], q.texts[task])
    lacking = [q for q in questions if not found[q.key]]
    if lacking:
        log.info("%d key phrases come from the extractor of `concepts`", len(lacking))
        records = [Record(q.key, q.texts["text_only"], "-", None, harmful=True, source=q.where) for q in lacking]
        with Progress("key phrases", len(records), "questions") as progress:
            extraction = with_concepts(records, cfg.concepts, progress.advance, str(device_of(cfg)))
        if extraction.failures:
            failure = extraction.failures[0]
            raise ValueError(
                f"{failure.source}: no key phrase ({failure.reason}), and {len(extraction.failures) - 1} more; give it "
                'as "Key_phrase" in the question, or set concepts.extractor'
            )
        found |= {record.id: record.concept.phrase for record in extraction.records if record.concept}
    phrases = {key: phrase for key, phrase in found.items() if phrase}
    write_durably(folder / "key_phrases.json", json.dumps(phrases, indent=2, ensure_ascii=False).encode())
    return phrases


def make_clips(
    cfg: Config, folder: BenchmarkFolder, questions: Sequence[Question], phrases: Mapping[str, str]
) -> list[Row]:
    """The DM clips, one after another in this process, on its device. Nothing is loaded if all are there."""
    from mllm.diffusion import check_pipeline, load_pipeline, make_clip

    build, device = cfg.build, device_of(cfg)
    check_pipeline(build.pipeline)  # describing the scenes takes its time
    wanted = {q.key: phrases[q.key] for q in questions}
    with Progress("scenes", len(wanted), "descriptions") as progress:
        scenes = scene_descriptions(wanted, build.scenes, cfg.seed, progress.advance, str(device))
    write_durably(folder.path / "scenes.json", json.dumps(scenes, indent=2, ensure_ascii=False).encode())
    n, (width, height) = round(build.clip_seconds * build.fps), build.size
    p = build.pipeline
    how = [p.path, p.revision, p.dtype, p.frames, p.size, p.steps, p.guidance, p.arguments]
    items = []
    for q in questions:
        seed = zlib.crc32(f"{cfg.seed}/{q.key}".encode())
        recipe = {"kind": "dm", "pipeline": how, "scene": scenes[q.key], "frames": n, "fps": build.fps, "seed": seed}
        about = {"task": "dm", "scenario": q.scenario, "id": q.id, "text": phrases[q.key]}
        path = medium_path(Path(), "video", q, "dm", ".mp4").as_posix()
        items.append(Item(path, {**recipe, "size": [width, height]}, about))
    if all(folder.holds(item) for item in items):
        return [folder.rows[item.path] for item in items]
    pipeline = load_pipeline(p, device)

    def make(_: Path, recipe: Mapping[str, object]) -> Made:
        frames = make_clip(pipeline, str(recipe["scene"]), p, (width, height), n, int(str(recipe["seed"])))
        return Made(encode_video(frames, build.fps), measures(VideoClip(frames, build.fps)))

    return folder.make(items, make, "dm", here=True)
