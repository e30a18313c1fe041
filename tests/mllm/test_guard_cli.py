"""`python -m mllm.guard`: real files, real processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mllm.guard import REFUSAL
from mllm.guard_cli import main
from tests.mllm.guard_world import MARKER, detector, detector_folder, detoxifier_folder, words
from tests.streaming_upstream import Events, StreamingUpstream, delta, whole

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"id": n, "question": "w1 ?", "answer": words(9, n, 4 if n % 3 == 0 else None)} for n in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"]])
def test_help_answers_within_a_second_and_a_half(words: list[str]) -> None:
    def used() -> float:  # processor time: the wall clock also counts whatever else the machine is doing
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    done = subprocess.run(
        [sys.executable, "-m", "mllm.guard", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--detector" in done.stdout
    assert used() - before < 1.5


def test_help_of_serve_tells_every_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for part in ("S seconds, to the upstream (default: 10.0)", "largest request (default: 20971520)", "default: 8001"):
        assert part in out
    assert "default: None" not in out


def test_mistakes_are_told_without_a_word_from_the_libraries() -> None:
    words = ["serve", "--detector", "/nowhere", "--model", "micro_lava"]
    done = subprocess.run(
        [sys.executable, "-m", "mllm.guard", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model=micro_lava: no such model")
    assert line.endswith("did you mean micro_llava?")


def output(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_score_adds_the_detectors_score_and_verdict(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--detector", str(detector_folder()), rows]) == 0
    out = output(capsys)
    scores = detector().score([r["question"] for r in ROWS], [r["answer"] for r in ROWS])  # type: ignore[misc]
    for row, made, score in zip(ROWS, out, scores.tolist(), strict=True):
        assert made == {
            **row,
            "harmless_score": pytest.approx(score, abs=1e-6),
            "harmful": MARKER in str(row["answer"]),
        }


def test_detoxify_adds_what_may_be_shown(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["detoxify", "--detector", str(detector_folder()), "--max-rewrite-tokens", "12"]
    assert main([*command, "--detoxifier", str(detoxifier_folder()), rows]) == 0
    for row, made in zip(ROWS, output(capsys), strict=True):
        assert {key: made[key] for key in row} == row
        shown = ("detoxified", "this is fine.") if MARKER in str(row["answer"]) else ("passed", row["answer"])
        assert (made["action"], made["guarded_answer"]) == shown
    assert main([*command, rows]) == 0
    assert {m["guarded_answer"] for m in output(capsys) if m["action"] != "passed"} == {REFUSAL}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "in.jsonl:2: no JSON"),
        ("[1]", "in.jsonl:2: got a list"),
        ('{"question": "w1"}', "in.jsonl:2: 'answer' is missing"),
        ('{"question": "w1", "answer": "\\ud800"}', "in.jsonl:2: 'answer' holds half a surrogate pair"),
        ('{"question": 1, "answer": "x"}', "in.jsonl:2: 'question' is missing or no text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "w1", "answer": "w2"}\n' + text + "\n")
    assert main(["score", "--detector", str(detector_folder()), str(path)]) == 2
    assert message in caplog.text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["score", "--detector", "/nowhere", "x"], "no such file"),
        (["score", "--detector", "DETECTOR", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["serve", "--detector", "DETECTOR", "--upstream", "ftp://x"], "expected http(s)://"),
        (["serve", "--detector", "DETECTOR", "--upstream", "http://key:secret@x/v1"], "no login"),
        (["serve", "--detector", "DETECTOR", "--upstream", "http://x/v1", "--host", "0.0.0.0"], "API key"),
        (["serve", "--detector", "DETECTOR", "--upstream", "http://x/v1", "--upstream-key-env", "NOT_SET"], "NOT_SET"),
        (["serve", "--detector", "DETECTOR", "--upstream", "http://x/v1", "--timeout", "0"], "above 0"),
        (["serve", "--detector", "DETECTOR", "--model", "no_such_model"], "no_such_model"),
    ],
)
def test_a_mistaken_command_is_one_message_and_exit_code_2(
    command: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(detector_folder()) if word == "DETECTOR" else word for word in command]) == 2
    assert message in caplog.text
    assert "secret" not in caplog.text


def test_the_server_process_serves_guards_and_stops_gracefully() -> None:
    """The real command: an answer that is under way when SIGTERM comes is finished first."""
    with StreamingUpstream(lambda body: Events([delta("w1 w2. "), 1.5, *whole("w3.")])) as upstream:
        command = [sys.executable, "-m", "mllm.guard", "serve", "--upstream", upstream.base_url, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--detector", str(detector_folder()), "--threads", "1"],
            cwd=ROOT,
            env={**os.environ, "SEAWALL_GUARD_KEY": "a-key-of-the-test"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if "listening on" in line).split()[-1]
            assert httpx.get(address.removesuffix("/v1") + "/healthz", timeout=30).status_code == 200
            assert httpx.get(f"{address}/models", timeout=30).status_code == 401
            client = openai.OpenAI(base_url=address, api_key="a-key-of-the-test", max_retries=0, timeout=60)
            ask: Any = [{"role": "user", "content": "w1 ?"}]
            stream = client.chat.completions.create(model="m", messages=ask, stream=True)
            texts = [next(stream).choices[0].delta.content]
            process.send_signal(signal.SIGTERM)
            texts += [e.choices[0].delta.content or "" for e in stream]
            assert "".join(texts) == "w1 w2. w3."
            start = time.monotonic()
            assert process.wait(30) in (0, -signal.SIGTERM)
            assert time.monotonic() - start < 20
            assert MARKER not in process.stderr.read()
        finally:
            process.kill()
            process.wait()
