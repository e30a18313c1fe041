"""Guarded answers on disk: each belongs to one original, costs are shared out, what broke is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.guarded_rows import GuardedLog, Spent, guarded_rows
from evaluation.rows import GenerationRow
from mllm.guard import Guarded

NO = "Sorry, I cannot help with that."


def generated(n: int, answer: str = "yes") -> list[GenerationRow]:
    return [
        GenerationRow(f"p{i}", "micro", "text_only", "art", "benign", f"q{i}", f"{answer} {i}", None, "base")
        for i in range(n)
    ]


def results(rows: list[GenerationRow]) -> list[Guarded]:
    """Passed, detoxified, refused, broken, empty."""
    a, b, c, d, e = (row.answer for row in rows)
    return [
        Guarded(a, a, 0.9, None, "passed", "harmless"),
        Guarded(b, "no", 0.1, 0.8, "detoxified", "rewritten"),
        Guarded(c, NO, 0.1, 0.2, "refused", "rewrite_harmful"),
        Guarded(d, NO, None, None, "refused", "detector_timeout"),
        Guarded(e, e, None, None, "passed", "empty"),
    ]


def test_a_batchs_costs_are_shared_by_the_answers_that_caused_them() -> None:
    rows = guarded_rows(generated(5), results(generated(5)), Spent(4.0, 6.0, 40, 10))
    assert [row.scoring_seconds for row in rows] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert [row.tokens_scored for row in rows] == [10, 10, 10, 10, 0]
    assert [row.rewriting_seconds for row in rows] == [0, 3.0, 3.0, 0, 0]
    assert [row.tokens_written for row in rows] == [0, 5, 5, 0, 0]
    assert [row.flagged for row in rows] == [False, True, True, None, False]  # nobody knows what was not scored
    assert Spent(4.0, 6.0, 40, 10).since(Spent(1.0, 2.0, 30, 4)) == Spent(3.0, 4.0, 10, 6)


def test_rows_come_back_whole_and_what_broke_is_to_be_done_again(tmp_path: Path) -> None:
    answers = generated(5)
    rows = guarded_rows(answers, results(answers), Spent(1.0, 0.0, 9, 0))
    with GuardedLog(tmp_path / "base.jsonl") as log:
        assert log.todo(answers) == answers
        log.append(rows)
        assert log.rows(answers) == rows
        assert log.todo(answers) == [answers[3]]
        assert log.rows(answers)[1].answer_hash != answers[1].answer_hash  # judged as another answer
    with GuardedLog(tmp_path / "base.jsonl") as log:
        now = Guarded("yes 3", "yes 3", 0.7, None, "passed", "harmless")
        healed = guarded_rows([answers[3]], [now], Spent(1.0, 0.0, 1, 0))
        log.append(healed)
        assert log.todo(answers) == []
        assert log.rows(answers)[3] == healed[0]


def test_a_row_about_another_answer_never_counts(tmp_path: Path) -> None:
    old = generated(5, "old")
    log = GuardedLog(tmp_path / "base.jsonl")
    with log:
        log.append(guarded_rows(old, results(old), Spent(1.0, 0.0, 9, 0)))
    new = generated(5, "new")
    assert log.rows(new) == []
    assert log.todo(new) == new


def test_a_row_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.jsonl").write_text('{"id": "p1"}\n')
    with pytest.raises(ValueError, match=r"base\.jsonl:1: keys \['id'\], expected .*'original'"):
        GuardedLog(tmp_path / "base.jsonl").todo(generated(1))
