"""Answers on disk survive what happens to processes and disks."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from datamodules.benchmarks import BenchmarkPrompt
from datamodules.durable import BusyError, CorruptFileError
from evaluation.rows import GenerationLog, GenerationRow


def prompts(n: int) -> list[BenchmarkPrompt]:
    return [BenchmarkPrompt(f"p{i}", "micro", "text_only", "fraud", "harmful", f"question {i}", None) for i in range(n)]


def test_rows_come_back_as_written_with_any_text(tmp_path):
    asked = [BenchmarkPrompt("p", "micro", "image_plain", "art", "reading", "What? 日本\u2028", None, "bake the cake")]
    with GenerationLog(tmp_path / "deep" / "base.jsonl", "base") as log:
        rows = log.append(asked, ['line\nbreak "quoted" \u2028 ü {answer}'])
    again = GenerationLog(tmp_path / "deep" / "base.jsonl", "base").rows()
    assert again == rows
    assert again[0].request == "reading"
    assert again[0].expected == "bake the cake"
    assert again[0].prompt == "What? 日本\u2028"
    line = json.loads((tmp_path / "deep" / "base.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert set(line) == {
        "id",
        "benchmark",
        "task",
        "scenario",
        "request",
        "prompt",
        "answer",
        "expected",
        "variant",
        "asked",
    }


def test_only_unanswered_prompts_are_left(tmp_path):
    asked = prompts(5)
    with GenerationLog(tmp_path / "base.jsonl", "base") as log:
        assert log.todo(asked) == asked
        log.append(asked[1:3], ["a", ""])  # an empty answer is an answer
        assert [p.id for p in log.todo(asked)] == ["p0", "p3", "p4"]


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_last_line_is_dropped_and_generated_again(tmp_path, cut):
    path = tmp_path / "base.jsonl"
    with GenerationLog(path, "base") as log:
        log.append(prompts(3), ["a0", "a1", "a2"])
    os.truncate(path, path.stat().st_size - cut)
    with GenerationLog(path, "base") as log:
        assert [p.id for p in log.todo(prompts(3))] == ["p2"]
        log.append(log.todo(prompts(3)), ["again"])
    assert [row.answer for row in GenerationLog(path, "base").rows()] == ["a0", "a1", "again"]


WRITER = """
import sys
from datamodules.benchmarks import BenchmarkPrompt
from evaluation.rows import GenerationLog
log = GenerationLog(sys.argv[1], "base")
for i in range(10**6):
    batch = [BenchmarkPrompt(f"p{i}-{k}", "b", "t", "s", "harmful", "q", None) for k in range(4)]
    log.append(batch, ["answer " * 50] * 4)
    print(i, flush=True)
"""


def test_kill_9_loses_no_batch_that_was_written(tmp_path):
    path = tmp_path / "base.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    confirmed = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with GenerationLog(path, "base") as log:  # the kernel has freed the lock
        ids = {row.id for row in log.rows()}
        assert {f"p{i}-{k}" for i in confirmed for k in range(4)} <= ids
        log.append(prompts(1), ["on we go"])
    assert len(GenerationLog(path, "base").rows()) == len(ids) + 1


def test_a_full_disk_names_the_file_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "base.jsonl"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with GenerationLog(path, "base") as log:
        log.append(prompts(2), ["a", "b"])
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limit[1]))
        try:
            with pytest.raises(OSError, match=r"base\.jsonl"):
                log.append(prompts(4)[2:], ["c" * 500, "d"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert path.stat().st_size == size
        assert [p.id for p in log.todo(prompts(4))] == ["p2", "p3"]


def test_two_writers_of_one_file_are_refused(tmp_path):
    with (
        GenerationLog(tmp_path / "base.jsonl", "base") as first,
        GenerationLog(tmp_path / "base.jsonl", "base") as second,
    ):
        first.append(prompts(1), ["a"])
        with pytest.raises(BusyError, match=r"base\.jsonl"):
            second.append(prompts(1), ["b"])


def test_answers_of_another_variant_or_question_are_not_mixed_in(tmp_path):
    path = tmp_path / "base.jsonl"
    with GenerationLog(path, "base") as log:
        log.append(prompts(1), ["a"])
    with pytest.raises(ValueError, match=r"base\.jsonl:1: an answer of 'base' in the file of 'sea_dpo'"):
        GenerationLog(path, "sea_dpo").rows()
    other = BenchmarkPrompt("p0", "micro", "text_only", "fraud", "harmful", "another question", None)
    with pytest.raises(ValueError, match=r"'p0' belongs to another question"):
        GenerationLog(path, "base").todo([other])
    with pytest.raises(ValueError, match="'p0' occurs 2 times"):
        GenerationLog(path, "base").todo([other, other])
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        GenerationLog(path, "base").append(prompts(2), ["a"])


def test_a_foreign_line_names_file_and_line(tmp_path):
    path = tmp_path / "base.jsonl"
    with GenerationLog(path, "base") as log:
        log.append(prompts(1), ["a"])
    with path.open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(CorruptFileError, match=r"base\.jsonl:2: keys \['id'\], expected"):
        GenerationLog(path, "base").rows()


def test_rows_of_before_there_was_the_whole_request_are_read(tmp_path):
    path = tmp_path / "base.jsonl"
    with GenerationLog(path, "base") as log:
        (row,) = log.append(prompts(1), ["a"])
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "asked"}
    path.write_text(json.dumps(old) + "\n")
    assert GenerationLog(path, "base").rows() == [row]


def test_the_hash_tells_answers_apart():
    def row(answer: str) -> GenerationRow:
        return GenerationRow("p", "b", "t", "s", "harmful", "q", answer, None, "base")

    assert row("a").answer_hash == row("a").answer_hash != row("a ").answer_hash
    assert len(row("\ud800").answer_hash) == 16
