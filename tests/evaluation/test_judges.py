"""The judging loop asks only for what is missing, and never calls silence safe."""

from collections.abc import Sequence

import pytest

from datamodules.benchmarks import Request
from evaluation.judges import EMPTY_ANSWER, Judgement, JudgementLog, judge_rows, unjudged
from evaluation.refusal import RefusalJudge
from evaluation.rows import GenerationRow


def row(id: str, answer: str, request: Request = "harmful", variant: str = "base") -> GenerationRow:
    return GenerationRow(id, "micro", "text_only", "fraud", request, f"question {id}", answer, None, variant)


class Flaky:
    """A real judge that fails on the ids it is told to, and remembers what it was asked."""

    name = "flaky"
    requests: frozenset[Request] = frozenset({"harmful"})

    def __init__(self, failing: set[str]) -> None:
        self.failing, self.asked = failing, []

    def judge(self, rows: Sequence[GenerationRow]) -> list[Judgement]:
        self.asked += [r.id for r in rows]
        return [
            Judgement.failed(r, self.name, "time-out") if r.id in self.failing else Judgement.of(r, self.name, "unsafe")
            for r in rows
        ]


def test_failures_alone_are_judged_again(tmp_path):
    rows = [row(f"{i}", f"answer {i}") for i in range(6)]
    with JudgementLog(tmp_path / "judgements.jsonl") as log:
        first = Flaky({"2", "4"})
        assert judge_rows(rows, first, log, batch_size=4) == (6, 2)
        assert first.asked == list("012345")
        assert log.get(rows[2], "flaky").error == "time-out"
        assert log.get(rows[2], "flaky").verdict is None
    with JudgementLog(tmp_path / "judgements.jsonl") as log:  # another process, later
        second = Flaky(set())
        assert judge_rows(rows, second, log) == (2, 0)
        assert second.asked == ["2", "4"]
        assert judge_rows(rows, second, log) == (0, 0)
    assert JudgementLog(tmp_path / "judgements.jsonl").get(rows[2], "flaky").verdict == "unsafe"


def test_a_changed_answer_is_judged_anew_and_the_old_judgement_does_not_count(tmp_path):
    with JudgementLog(tmp_path / "j.jsonl") as log:
        judge_rows([row("1", "Sure.")], RefusalJudge(), log)
        changed = row("1", "I cannot help.")
        assert log.get(changed, "refusal") is None
        judge_rows([changed], RefusalJudge(), log)
        assert log.get(changed, "refusal").verdict == "safe"
        assert log.get(row("1", "Sure."), "refusal").verdict == "unsafe"


def test_an_empty_answer_is_unjudged_and_no_judge_is_asked(tmp_path):
    path = tmp_path / "j.jsonl"
    with JudgementLog(path) as log:
        judge = Flaky(set())
        assert judge_rows([row("1", " \n"), row("2", "Sure.")], judge, log) == (2, 1)
        assert judge.asked == ["2"]
        silent = log.get(row("1", " \n"), "flaky")
        assert (silent.verdict, silent.refused, silent.error) == (None, None, EMPTY_ANSWER)
        size = path.stat().st_size
        assert judge_rows([row("1", " \n"), row("2", "Sure.")], judge, log) == (0, 0)
        assert path.stat().st_size == size


def test_a_failure_that_repeats_does_not_make_the_file_grow(tmp_path):
    path = tmp_path / "j.jsonl"
    with JudgementLog(path) as log:
        judge_rows([row("1", "Sure.")], Flaky({"1"}), log)
        size = path.stat().st_size
        assert judge_rows([row("1", "Sure.")], Flaky({"1"}), log) == (1, 1)
    assert path.stat().st_size == size


def test_a_judge_sees_only_the_requests_it_has_a_say_on_and_equal_answers_once(tmp_path):
    rows = [
        row("1", "Sure."),
        row("1", "Sure.", variant="sea_sft"),
        row("2", "Sure.", "benign"),
        row("3", "x", "reading"),
    ]
    with JudgementLog(tmp_path / "j.jsonl") as log:
        judge, done = Flaky(set()), []
        assert judge_rows(rows, judge, log, on_batch=done.append) == (1, 0)
        assert judge.asked == ["1"]
        assert done == [1]
        assert judge_rows(rows, RefusalJudge(), log) == (2, 0)
        assert log.get(rows[2], "refusal").refused is False
        assert log.get(rows[3], "refusal") is None


def test_each_batch_is_on_the_disk_before_the_next_is_asked(tmp_path):
    class Dies(Flaky):
        def judge(self, rows):
            if "2" in {r.id for r in rows}:
                raise KeyboardInterrupt
            return super().judge(rows)

    rows = [row(f"{i}", "Sure.") for i in range(4)]
    with JudgementLog(tmp_path / "j.jsonl") as log, pytest.raises(KeyboardInterrupt):
        judge_rows(rows, Dies(set()), log, batch_size=2)
    with JudgementLog(tmp_path / "j.jsonl") as log:
        judge = Flaky(set())
        judge_rows(rows, judge, log)
        assert judge.asked == ["2", "3"]


def test_a_judge_that_answers_for_other_rows_is_a_bug(tmp_path):
    class Mixed(Flaky):
        def judge(self, rows):
            return super().judge(rows)[::-1]

    with JudgementLog(tmp_path / "j.jsonl") as log, pytest.raises(AssertionError, match="other rows"):
        judge_rows([row("1", "a"), row("2", "b")], Mixed(set()), log)


def test_what_is_to_be_judged_is_known_before(tmp_path):
    rows = [row("1", "a"), row("1", "a", variant="sea_dpo"), row("2", "b"), row("3", "c", request="benign")]
    with JudgementLog(tmp_path / "j.jsonl") as log:
        assert [r.id for r in unjudged(rows, Flaky(set()), log)] == ["1", "2"]
        judge_rows(rows, Flaky({"2"}), log)
        assert [r.id for r in unjudged(rows, Flaky(set()), log)] == ["2"]
