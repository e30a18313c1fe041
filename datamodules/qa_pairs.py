"""Answers to questions, labelled harmless or harmful and paired by question: what detector and detoxifier learn from.

    pairs = read_pairs("saferlhf", "pairs.jsonl")
    parts = split_pairs(pairs, seed=0, holdout=0.1, validation=0.1)     # {"train": [...], "val": [...], "test": [...]}

Layouts of a row (a file, a folder or a hub id, datamodules/raw_rows.py):
    saferlhf     prompt, chosen (harmless), rejected (harmful); or PKU-SafeRLHF's response_0, response_1,
                 is_response_0_safe, is_response_1_safe, safer_response_id: its flags are the labels.
    hh_rlhf      chosen, rejected: whole dialogues; the preferred answer counts as harmless, the other as harmful.
    jsonl, csv, huggingface
                 question, accepted, rejected;  or question, answer, label, where label says harmless / harmful
                 (also safe / unsafe, 1 / 0, true / false: 1 = harmless, as in the paper). `columns` maps other names.

Splits are by question, never by row: one question's answers stay together, whatever else is in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.raw_rows import Row, read_rows
from datamodules.records import suggest
from datamodules.text_safety import Format, LeftOut, ReadReport, flag, from_dialogues, split_of

Part = Literal["train", "val", "test"]

_HARMLESS = {"harmless": True, "safe": True, "harmful": False, "unsafe": False}
_PKU = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id")


@dataclass(frozen=True)
class Answer:
    """An answer and its label, h of the paper: True = harmless."""

    text: str
    harmless: bool


@dataclass(frozen=True)
class QAPair:
    """A question with one or two answers.

    Attributes:
        better: the preferred (or only) answer. Both answers of a pair may carry the same label.
        worse: the other one; None where there is one answer only.
        group: what the split goes by; the question, unless the data set knows better.
        source: "file:line".
    """

    question: str
    better: Answer
    worse: Answer | None
    group: str
    source: str = ""

    @property
    def id(self) -> str:
        """Made from the texts alone."""
        text = "\0".join([self.question, *(a.text for a in self.answers)])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def answers(self) -> tuple[Answer, ...]:
        return (self.better,) if self.worse is None else (self.better, self.worse)

    @property
    def contrast(self) -> bool:
        """One harmless and one harmful answer: what pair accuracy and the detoxifier need."""
        return self.worse is not None and self.better.harmless and not self.worse.harmless


def read_pairs(
    format: Format,
    path: str,
    *,
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    bad_rows: Literal["stop", "skip"] = "stop",
    report: ReadReport | None = None,
) -> list[QAPair]:
    """All pairs in the order of the rows; `report` is filled with what became of the rows.

    A row that comes again is kept: in preference data it is another annotator's vote, and pairs on which annotators
    agree come more often (SafeRLHF sample: 4,230 rows, 2,970 distinct). Each text is still computed once
    (datamodules/qa_batches.py).

    Raises:
        ValueError: a missing file, an unknown column, a bad row (names file and line), or nothing usable.
    """
    report = ReadReport() if report is None else report
    found: list[QAPair] = []
    for row in read_rows(path, subset, split, revision):
        report.rows += 1
        try:
            if row.error is not None:
                raise ValueError(row.error)
            found.append(_pair(format, row, columns or {}))
        except LeftOut as why:
            report.left_out[str(why)] += 1
        except ValueError as error:
            if bad_rows == "stop":
                raise ValueError(f"{row.where}: {error} (bad_rows=skip counts such rows and goes on)") from None
            report.bad.append((row.where, str(error)))
    if not found:
        first = "; the first bad row: " + ": ".join(report.bad[0]) if report.bad else ""
        raise ValueError(f"{path}: no usable pair in {report.rows} row(s){first}")
    return found


def split_pairs(pairs: Iterable[QAPair], seed: int, holdout: float, validation: float) -> dict[Part, list[QAPair]]:
    """The pairs of each part, in an order that depends on seed and texts alone.

    Raises:
        ValueError: a part is empty.
    """
    parts: dict[Part, list[QAPair]] = {"train": [], "val": [], "test": []}
    for pair in sorted(pairs, key=lambda p: hashlib.sha256(f"{seed}/{p.id}".encode()).hexdigest()):
        parts[split_of(pair.group, seed, holdout, validation)].append(pair)  # type: ignore[index]
    return parts


def require(parts: Mapping[Part, Sequence[QAPair]], holdout: float, validation: float) -> None:
    """Raises ValueError for an empty part, or one that knows only one label."""
    for name, chosen in parts.items():
        labels = {a.harmless for p in chosen for a in p.answers}
        if len(labels) < 2:
            raise ValueError(
                f"{name}: {len(chosen)} pairs with {'no label' if not labels else 'one label only'}; harmless and "
                f"harmful answers are needed in every part (data.holdout={holdout}, pairs.validation={validation})"
            )


def _pair(format: Format, row: Row, columns: Mapping[str, str]) -> QAPair:
    values = row.values
    if format == "hh_rlhf":
        found = from_dialogues(values, "skip")
        return _made(row, found["question"], found["chosen"], True, found["rejected"], False)
    if format == "saferlhf" and "response_0" in values:
        _need(_PKU, values)
        best = values["safer_response_id"]
        if best not in (0, 1):
            raise ValueError(f"key 'safer_response_id': got {best!r}, expected 0 or 1")
        safe = [flag(name, values[name]) for name in _PKU[3:5]]
        return _made(
            row,
            values["prompt"],
            values[f"response_{best}"],
            safe[best],
            values[f"response_{1 - best}"],
            safe[1 - best],
        )
    if format == "saferlhf":
        _need(("prompt", "chosen", "rejected"), values)
        return _made(row, values["prompt"], values["chosen"], True, values["rejected"], False)
    names = {name: columns.get(name, name) for name in ("question", "answer", "label", "accepted", "rejected")}
    if names["label"] in values:
        _need((names["question"], names["answer"]), values)
        label = _label(names["label"], values[names["label"]])
        return _made(row, values[names["question"]], values[names["answer"]], label, None, False)
    _need((names["question"], names["accepted"], names["rejected"]), values)
    return _made(row, values[names["question"]], values[names["accepted"]], True, values[names["rejected"]], False)


def _made(row: Row, question: Any, better: Any, better_label: bool, worse: Any, worse_label: bool) -> QAPair:
    """Empty answers are answers (a model may say nothing); an empty question is none."""
    for name, text in (("question", question), ("answer", better), ("rejected answer", worse)):
        if not isinstance(text, str) and not (worse is None and name == "rejected answer"):
            raise ValueError(f"{name}: got a {type(text).__name__}, expected a text")
    if not question.strip():
        raise ValueError("the question is empty")
    other = None if worse is None else Answer(worse.strip(), worse_label)
    return QAPair(question.strip(), Answer(better.strip(), better_label), other, question.strip(), row.where)


def _label(name: str, value: object) -> bool:
    """True = harmless."""
    word = str(value).strip().lower()
    if word in _HARMLESS:
        return _HARMLESS[word]
    if word in ("1", "1.0", "true"):
        return True
    if word in ("0", "0.0", "false"):
        return False
    raise ValueError(
        f"key {name!r}: got {str(value)[:20]!r}, expected harmless/harmful, safe/unsafe or 1/0 (1 = harmless)"
    )


def _need(names: Sequence[str], values: Mapping[str, Any]) -> None:
    for name in names:
        if name not in values:
            have = ", ".join(map(str, values)) or "none"
            raise ValueError(f"no column {name!r}, the row has {have}.{suggest(name, map(str, values))}")
