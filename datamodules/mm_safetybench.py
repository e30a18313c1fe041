"""MM-SafetyBench (Liu et al. 2024, arXiv 2311.17600): 13 scenarios, 1,680 harmful requests, each as text and in three
kinds of image.

The released layout, which the builder (`experiment=build_mm_safetybench`) writes too:

    processed_questions/01-Illegal_Activitiy.json     {"0": {"Question": ..., "Changed Question": ..., ...}, "1": ...}
    imgs/01-Illegal_Activitiy/SD/0.jpg                a picture of the key phrase, made by Stable Diffusion
    imgs/01-Illegal_Activitiy/TYPO/0.jpg              the key phrase as text
    imgs/01-Illegal_Activitiy/SD_TYPO/0.jpg           the picture, and the text below it

Which question goes with which image decides whether the image is asked about at all. "Rephrased Question" says that
*the bottom of the image* shows the phrase, which is true of SD_TYPO alone; "Rephrased Question(SD)" says that *the
image* shows it, which is true of SD and TYPO. Public scripts ask about the bottom of TYPO images, too. VA-SafetyBench,
made from the same questions, pairs them as we do: only its DM+TYPO speaks of "the end of the video".
Text alone is "Changed Question": the sentence that the rephrased ones are made from by taking the phrase out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.benchmark_prompts import BenchmarkPrompt, inside, unique

QUESTIONS, IMAGES = "processed_questions", "imgs"
SCENARIOS = (
    "01-Illegal_Activitiy",
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
"""As the files are called, the misspelling included."""


@dataclass(frozen=True)
class Task:
    """`key`: of the question in the JSON file; `folder`: of its images, None for text alone."""

    key: str
    folder: str | None


TASKS = {
    "text_only": Task("Changed Question", None),
    "sd": Task("Rephrased Question(SD)", "SD"),
    "typo": Task("Rephrased Question(SD)", "TYPO"),
    "sd_typo": Task("Rephrased Question", "SD_TYPO"),
}
ASKED = "Changed Question"
"""The request in words, with the phrase in it."""


@dataclass(frozen=True)
class Question:
    """One entry of a file of questions: `where` is "file: entry id", `values` its texts by key."""

    scenario: str
    id: str
    where: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        """The text under `key`. Raises ValueError if there is none."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            found = "nothing" if value is None else repr(value)[:40]
            raise ValueError(f"{self.where}: {key!r} holds {found}, expected a text; fetch the file again")
        return value.strip()


def read_mm_safetybench(root: str | Path, tasks: Sequence[str] = tuple(TASKS)) -> list[BenchmarkPrompt]:
    """All prompts, harmful requests all of them; scenario = the file's name without its number. No image is opened yet.

    Args:
        root: the folder that holds `processed_questions` and, unless only `text_only` is asked, `imgs`.
        tasks: some of `TASKS`.

    Raises:
        ValueError: a folder, file, key or image is missing or malformed; names it.
    """
    root = Path(root)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"MM-SafetyBench has no task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    prompts = []
    for question in read_questions(root):
        scenario, asked = question.scenario.partition("-")[2] or question.scenario, question.text(ASKED)
        for name in tasks:
            task, image = TASKS[name], None
            if task.folder is not None:
                image = _image(root, question, task.folder)
            id = f"mm_safetybench/{name}/{question.scenario}/{question.id}"
            text = question.text(task.key)
            prompts.append(BenchmarkPrompt(id, "mm_safetybench", name, scenario, "harmful", text, image, asked=asked))
    return unique(prompts, root / QUESTIONS)


def read_questions(root: Path, scenarios: Sequence[str] | None = None) -> list[Question]:
    """The entries of the files of questions, in the files' order.

    Args:
        scenarios: names of files without `.json`; None: every file that is there.

    Raises ValueError as `read_mm_safetybench` does.
    """
    folder = root / QUESTIONS
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not found:
        raise ValueError(
            f"{folder}: no *.json files; give the folder that holds {QUESTIONS}/ and {IMAGES}/ of MM-SafetyBench"
        )
    if scenarios is not None and (unknown := [name for name in scenarios if name not in found]):
        raise ValueError(f"{folder}: no scenario {unknown[0]!r}; there are {', '.join(found)}")
    return [
        question
        for name, path in found.items()
        if scenarios is None or name in scenarios
        for question in _entries(name, path)
    ]


def image_path(root: Path, folder: str, scenario: str, id: str) -> Path:
    """Where an image of the released layout lies; `folder`: SD, TYPO or SD_TYPO."""
    return root / IMAGES / scenario / folder / f"{id}.jpg"


def _entries(scenario: str, path: Path) -> list[Question]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_key_twice)
    except (OSError, ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: not a JSON file of questions ({error}); fetch it again") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: expected an object with one entry for each question, got {type(entries).__name__}")
    out = []
    for id, values in entries.items():
        where = f"{path}: entry {id!r}"
        if not re.fullmatch(r"[\w-]{1,100}", id):  # it is part of a file's name
            raise ValueError(f"{where}: expected an id of letters, digits, - and _")
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object with the question's texts, got {type(values).__name__}")
        out.append(Question(scenario, id, where, values))
    return out


def _image(root: Path, question: Question, folder: str) -> Path:
    path = inside(root, image_path(root, folder, question.scenario, question.id), question.where)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such image, named by {question.where}; fetch the images, make them with "
            "experiment=build_mm_safetybench, or leave the task away (evaluate.tasks)"
        )
    return path


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice and keeps the last: a question would vanish without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} occurs twice")
    return values
