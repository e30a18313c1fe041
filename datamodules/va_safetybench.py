"""VA-SafetyBench (Lu et al. 2025, arXiv 2502.12562): MM-SafetyBench's questions as video and as audio.

    root/Video_questions/<scenario>.json   {"0": {"Text_only": ..., "DM": ..., "TYPO": ..., "DM_TYPO": ...}, ...}
    root/Video/<scenario>/<task>/<id>.mp4
    root/Audio_questions/<scenario>.json   {"0": {"Text_only": ..., "Audio_only": null, "KPT": ..., "KPT_noise": ...}}
    root/Audio/<scenario>/<task>/<id>.mp3  (.wav, .flac or .ogg too)

The layout is the release's (https://github.com/ZeroNLP/SEA, VA-SafetyBench), whose media are a download of their own;
`experiment=build_va_safetybench_video` and `..._audio` make them here. Every task has its own wording of the question.
Eight scenarios, 972 questions in each of the two sets; every request is harmful.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.benchmark_prompts import BenchmarkPrompt, inside, unique

Kind = Literal["video", "audio"]

SCENARIOS = (
    "1-IllegalActivitiy",  # spelt so in the release
    "2-HateSpeech",
    "3-MalwareGeneration",
    "4-PhysicalHarm",
    "5-EconomicHarm",
    "6-Fraud",
    "7-Sex",
    "8-PrivacyViolence",
)
VIDEO_TASKS = {"text_only": "Text_only", "dm": "DM", "typo": "TYPO", "dm_typo": "DM_TYPO"}
"""Our name -> the release's. dm: a made clip; typo: the key phrase word by word; dm_typo: both, phrase at the end."""
AUDIO_TASKS = {"text_only": "Text_only", "audio_only": "Audio_only", "kpt": "KPT", "kpt_noise": "KPT_noise"}
"""audio_only: the question spoken, no text; kpt: the key phrase spoken; kpt_noise: the same behind white noise."""
TASKS: dict[Kind, dict[str, str]] = {"video": VIDEO_TASKS, "audio": AUDIO_TASKS}
SUFFIXES = {"video": (".mp4",), "audio": (".mp3", ".wav", ".flac", ".ogg")}
KEY_PHRASE = "Key_phrase"
"""An optional key of a question (not in the release): its key phrase, where one wants another than is found."""


@dataclass(frozen=True)
class Question:
    """One question: its wording for each task, by our names; the spoken one's is empty."""

    scenario: str
    id: str
    texts: dict[str, str]
    key_phrase: str | None
    where: str

    @property
    def key(self) -> str:
        return f"{self.scenario}/{self.id}"


def read_va_safetybench_video(root: str | Path, tasks: Sequence[str] = tuple(VIDEO_TASKS)) -> list[BenchmarkPrompt]:
    """The prompts of the chosen tasks; scenario = the release's name without its number."""
    return _prompts(Path(root), "video", tasks)


def read_va_safetybench_audio(root: str | Path, tasks: Sequence[str] = tuple(AUDIO_TASKS)) -> list[BenchmarkPrompt]:
    """The prompts of the chosen tasks. The text of audio_only is empty: everything is said."""
    return _prompts(Path(root), "audio", tasks)


def read_questions(root: Path, kind: Kind, scenarios: Sequence[str] | None = None) -> list[Question]:
    """Every question of the chosen scenarios (None: of all whose file is there), in the release's order.

    Raises:
        ValueError: no folder of questions, a file that is missing or of another layout; names file and question.
    """
    folder = questions_folder(root, kind)
    if unknown := set(scenarios or ()) - set(SCENARIOS):
        raise ValueError(f"scenario(s) {', '.join(sorted(unknown))} unknown, expected some of {', '.join(SCENARIOS)}")
    found = []
    for scenario in scenarios or [s for s in SCENARIOS if (folder / f"{s}.json").is_file()]:
        path = folder / f"{scenario}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; it is one of the eight of VA-SafetyBench") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}); fetch it again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds a {type(values).__name__}, expected an object: id -> question")
        found += [_question(scenario, id, value, kind, f"{path}, question {id!r}") for id, value in values.items()]
    if not found:
        raise ValueError(f"{folder}: no questions; expected files named {SCENARIOS[0]}.json and so on")
    return found


def questions_folder(root: Path, kind: Kind) -> Path:
    """`root/Video_questions` (or in small letters). Raises ValueError if neither is there."""
    names = (f"{kind.title()}_questions", f"{kind}_questions")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"{root}: no folder {' or '.join(names)}; give the folder of VA-SafetyBench that holds it")


def medium_path(root: Path, kind: Kind, question: Question, task: str, suffix: str) -> Path:
    """Where the release keeps the medium of a question."""
    return root / kind.title() / question.scenario / TASKS[kind][task] / f"{question.id}{suffix}"


def _question(scenario: str, id: str, value: object, kind: Kind, where: str) -> Question:
    if not id.isalnum():  # it becomes a file name
        raise ValueError(f"{where}: the id must be letters and digits")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r:.60}, expected an object with the keys {', '.join(TASKS[kind].values())}")
    texts = {}
    for task, name in TASKS[kind].items():
        if name not in value:
            raise ValueError(f"{where}: key {name!r} is missing, found {', '.join(value)}")
        text = value[name]
        if task == "audio_only" and text is None:
            text = ""
        elif not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: key {name!r} is {text!r:.60}, expected the question's text")
        texts[task] = text
    phrase = value.get(KEY_PHRASE)
    if phrase is not None and (not isinstance(phrase, str) or not phrase.strip()):
        raise ValueError(f"{where}: key {KEY_PHRASE!r} is {phrase!r:.60}, expected a text")
    return Question(scenario, id, texts, phrase, where)


def _prompts(root: Path, kind: Kind, tasks: Sequence[str]) -> list[BenchmarkPrompt]:
    if unknown := set(tasks) - set(TASKS[kind]):
        raise ValueError(
            f"VA-SafetyBench {kind} tasks {', '.join(sorted(unknown))} are unknown; expected some of "
            f"{', '.join(TASKS[kind])}"
        )
    benchmark = f"va_safetybench_{kind}"
    prompts = []
    for question in read_questions(root, kind):
        scenario = question.scenario.partition("-")[2]
        for task in tasks:
            media = None if task == "text_only" else _medium(root, kind, question, task)
            id = f"{benchmark}-{task}-{question.scenario}-{question.id}"
            text, asked = question.texts[task], question.texts["text_only"]
            prompts.append(BenchmarkPrompt(id, benchmark, task, scenario, "harmful", text, media, asked=asked))
    return unique(prompts, root)


def _medium(root: Path, kind: Kind, question: Question, task: str) -> Path:
    paths = [medium_path(root, kind, question, task, suffix) for suffix in SUFFIXES[kind]]
    for path in paths:
        if path.is_file():
            return inside(root, path, question.where)
    raise ValueError(
        f"{paths[0]}: no such file, named by {question.where}; download the media of VA-SafetyBench, or build them: "
        f"python train.py experiment=build_va_safetybench_{kind}; or leave the task {task} away (evaluate.tasks)"
    )
