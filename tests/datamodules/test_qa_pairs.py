"""Labelled answers: every layout, labels never inverted, splits by question."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.qa_pairs import Answer, QAPair, read_pairs, require, split_pairs
from datamodules.text_safety import ReadReport


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pku(first_safe: bool, second_safe: bool, best: int) -> dict[str, Any]:
    return {
        "prompt": "How?", "response_0": "first", "response_1": "second",
        "is_response_0_safe": first_safe, "is_response_1_safe": second_safe, "safer_response_id": best,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "better", "worse"),
    [
        (pku(True, False, 0), Answer("first", True), Answer("second", False)),
        (pku(False, True, 1), Answer("second", True), Answer("first", False)),
        (pku(False, False, 1), Answer("second", False), Answer("first", False)),
        (pku(True, True, 0), Answer("first", True), Answer("second", True)),
    ],
)
def test_saferlhf_flags_are_the_labels(row: dict[str, Any], better: Answer, worse: Answer, tmp_path: Path) -> None:
    (pair,) = read_pairs("saferlhf", jsonl(tmp_path, row))
    assert (pair.question, pair.better, pair.worse) == ("How?", better, worse)
    assert pair.contrast == (better.harmless and not worse.harmless)


def test_pairs_of_every_layout(tmp_path: Path) -> None:
    expected = (Answer("yes", True), Answer("no", False))
    rows = {
        "saferlhf": {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        "jsonl": {"question": "Q", "accepted": "yes", "rejected": "no"},
    }
    for format, row in rows.items():
        (pair,) = read_pairs(format, jsonl(tmp_path, row))  # type: ignore[arg-type]
        assert (pair.question, pair.answers) == ("Q", expected)
    (pair,) = read_pairs("jsonl", jsonl(tmp_path, {"q": "Q", "good": "yes", "bad": "no"}),
                         columns={"question": "q", "accepted": "good", "rejected": "bad"})  # fmt: skip
    assert pair.answers == expected
    path = tmp_path / "dialogues.jsonl.gz"
    dialogue = {w: f"\n\nHuman: Q\n\nAssistant: {text}" for w, text in (("chosen", "yes"), ("rejected", "no"))}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(dialogue))
    (pair,) = read_pairs("hh_rlhf", str(path))
    assert (pair.question, pair.answers) == ("Q", expected)


@pytest.mark.parametrize(
    ("label", "harmless"),
    [("harmless", True), ("Safe", True), (1, True), (True, True), ("1", True),
     ("harmful", False), ("unsafe", False), (0, False), (False, False), ("0", False)],
)  # fmt: skip
def test_a_label_of_one_means_harmless_in_every_spelling(label: object, harmless: bool, tmp_path: Path) -> None:
    (pair,) = read_pairs("jsonl", jsonl(tmp_path, {"question": "Q", "answer": "A", "label": label}))
    assert pair.answers == (Answer("A", harmless),)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "Q", "answer": "A", "label": "maybe"}, "1 = harmless"),
        ({"question": "Q", "answer": "A"}, "no column 'accepted'"),
        ({"question": "Q", "acepted": "A", "rejected": "B"}, "Did you mean 'acepted'"),
        ({"question": "  ", "accepted": "A", "rejected": "B"}, "the question is empty"),
        ({"question": "Q", "accepted": 3, "rejected": "B"}, "answer: got a int"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_key(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Q", "accepted": "A", "rejected": "B"}, row)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: ") as error:
        read_pairs("jsonl", path)
    assert told in str(error.value)
    report = ReadReport()
    assert len(read_pairs("jsonl", path, bad_rows="skip", report=report)) == 1
    assert [where.rpartition(":")[2] for where, _ in report.bad] == ["2"]


def test_equal_rows_are_votes_and_are_kept(tmp_path: Path) -> None:
    row = {"question": "Q", "accepted": "A", "rejected": "B"}
    report = ReadReport()
    assert len(read_pairs("jsonl", jsonl(tmp_path, row, row, row), report=report)) == 3
    assert not report.left_out


def many(n: int) -> list[QAPair]:
    return [QAPair(f"Q {i // 3}", Answer(f"a{i}", True), Answer(f"b{i}", False), f"Q {i // 3}") for i in range(n)]


def test_no_question_is_in_two_parts_and_more_rows_move_none() -> None:
    parts = split_pairs(many(600), seed=0, holdout=0.2, validation=0.1)
    questions = {name: {p.question for p in pairs} for name, pairs in parts.items()}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["val"]
    assert not questions["val"] & questions["test"]
    assert sum(map(len, questions.values())) == 200
    assert 20 <= len(questions["test"]) <= 60
    more = split_pairs([*many(900)[600:], *many(600)[::-1]], seed=0, holdout=0.2, validation=0.1)
    for name, before in questions.items():
        assert before <= {p.question for p in more[name]}
    shouted = [QAPair(p.question.upper(), p.better, p.worse, p.question.upper()) for p in many(600)]
    upper = split_pairs(shouted, seed=0, holdout=0.2, validation=0.1)
    assert {q.upper() for q in questions["test"]} == {p.question for p in upper["test"]}


def test_a_part_with_one_label_only_is_refused() -> None:
    parts = split_pairs(many(60), seed=0, holdout=0.2, validation=0.2)
    require(parts, 0.2, 0.2)
    parts["val"] = [QAPair("Q", Answer("a", True), None, "Q")]
    with pytest.raises(ValueError, match="val: 1 pairs with one label only"):
        require(parts, 0.2, 0.2)


def test_the_saferlhf_sample_reads_whole(shared_data: Path) -> None:
    report = ReadReport()
    pairs = read_pairs("saferlhf", str(shared_data / "saferlhf" / "pairs.jsonl"), report=report)
    assert report.rows == 4230
    assert not report.bad
    assert len(pairs) + sum(report.left_out.values()) == 4230
    assert all(p.contrast for p in pairs)
