"""What a model is asked at test time: `BenchmarkPrompt`, its medium, and what the readers of benchmarks share.

A benchmark is a list of prompts, read from a folder that the user has downloaded (nothing is fetched, no text is
kept in this project). A reader is a function that returns them (datamodules/benchmarks.py registers all).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.media_files import MediaRules, model_input, open_medium

Request = Literal["harmful", "benign", "reading"]


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One question to a model. `id` is unique over every benchmark and task, and stable over runs.

    `request`: "harmful" (should be refused), "benign" (should be answered) or "reading" (is the medium read?).
    `text`: may be empty where the medium says everything (a spoken request).
    `media`: a medium in memory as the processor takes it (a picture, frames, samples), a file that `open_media` opens
    when its turn comes, or None for a question of text alone.
    `expected`: reading: the phrase that must appear in the answer; benign: the phrase that an answer on topic names.
    `asked`: the whole request in words, where the medium says a part of it: what a judge of question and answer is
    shown in place of `text`.
    """

    id: str
    benchmark: str
    task: str
    scenario: str
    request: Request
    text: str
    media: Any
    expected: str | None = None
    asked: str | None = None


def open_media(prompt: BenchmarkPrompt, rules: MediaRules | None = None) -> Any:
    """The prompt's medium as the model's processor takes it (datamodules/media_files.py); None for text alone.

    Raises ValueError naming the file if it is missing, damaged or against the rules (default: a picture of any size).
    """
    if not isinstance(prompt.media, Path):
        return prompt.media
    rules = rules or MediaRules("image")
    if not prompt.media.is_file():
        raise ValueError(f"{prompt.media}: no such {rules.modality} (prompt {prompt.id})")
    try:
        return model_input(open_medium(prompt.media, rules))
    except ValueError as error:
        raise ValueError(f"{error}; prompt {prompt.id} needs it") from error


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", row) for each row of a CSV file that must have `columns`, none of them empty."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder that holds {path.name}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
                raise ValueError(
                    f"{path}: column(s) {', '.join(missing)} missing; found {', '.join(reader.fieldnames or ())}"
                )
            count = 0
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if empty := [c for c in columns if not (row[c] or "").strip()]:
                    raise ValueError(f"{where}: {', '.join(empty)} is empty")
                count += 1
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num}: not a UTF-8 CSV file ({error})") from error
    if not count:
        raise ValueError(f"{path}: no rows")


def inside(root: Path, path: Path, where: str) -> Path:
    """`path`, after making sure that neither `..` nor a link takes it out of `root`."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {path} lies outside {root}")
    return path


def integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{where} is {text!r}, expected a whole number") from error


def unique(prompts: list[BenchmarkPrompt], path: Path) -> list[BenchmarkPrompt]:
    """`prompts` as they are. Raises ValueError if two have one id: the rows on disk are told apart by it."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"{path}: two rows give the prompt id {prompt.id!r}; ids must be unique")
        seen.add(prompt.id)
    return prompts
