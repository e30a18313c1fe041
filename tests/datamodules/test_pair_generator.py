"""New pairs over real HTTP: scenarios to questions to answers; resumed, cached, deduplicated, paid for once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import train
from datamodules.chat_api import ChatAPI
from datamodules.pair_generator import PairGenerator
from datamodules.qa_pairs import read_pairs
from tests.loopback import LoopbackServer, Status, Text, loopback  # noqa: F401


def author(body: dict[str, Any]) -> str:
    """A chat model that does as it is asked: `n` questions, half of them said before in other words."""
    asked = body["messages"][-1]["content"]
    if "different questions" in asked:
        n, batch = int(re.search(r"Write (\d+)", asked)[1]), int(re.search(r"batch (\d+)", asked)[1])  # type: ignore[index]
        topic = re.search(r"Topic: ([^.]*)", asked)[1]  # type: ignore[index]
        names = [f"How about {topic} placeholder number{batch}{i} then?" for i in range(n // 2)]
        return json.dumps({"questions": names + [name.upper().replace("?", "!") for name in names]})
    question = asked.rpartition("Question: ")[2]
    return f"{'careful' if 'careful assistant: it' in asked else 'careless'} answer to {question}"


def generator(server: LoopbackServer, folder: Path) -> PairGenerator:
    api = ChatAPI(server.base_url, "loopback", folder, api_key_env=None, max_retries=1, backoff=0.0)
    return PairGenerator(api, per_request=4, similarity=0.8)


def test_questions_are_unlike_each_other_and_come_with_two_answers(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.answer = author
    pairs, left_out = generator(loopback, tmp_path).pairs("fraud", 5)
    assert len({p.question.casefold().rstrip("?!") for p in pairs}) == len(pairs) == 5
    assert all(p.accepted == f"careful answer to {p.question}" for p in pairs)
    assert all(p.rejected == f"careless answer to {p.question}" for p in pairs)
    assert left_out["like a question before"] >= 4


def test_a_second_run_asks_nothing_and_gives_the_same(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.answer = author
    first = generator(loopback, tmp_path).pairs("fraud", 5)
    asked = loopback.count
    again = generator(loopback, tmp_path)
    assert again.pairs("fraud", 5) == first
    assert loopback.count == asked
    assert again.api.usage.requests == 0
    assert again.api.usage.cached > 0


def test_a_model_that_runs_dry_ends_after_a_bounded_number_of_requests(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    loopback.answer = lambda body: json.dumps({"questions": ["The same placeholder?"] * 4})
    questions, left_out = generator(loopback, tmp_path).questions("fraud", 8)
    assert questions == ["The same placeholder?"]
    assert loopback.count <= 6
    assert left_out["like a question before"] > 10


def test_refusals_errors_and_equal_answers_are_left_out_with_their_reasons(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    def moody(body: dict[str, Any]) -> str | Text | Status:
        said = author(body)
        if "number10" in said and "careless" in said:
            return Text(None, refusal="no")
        if "number11" in said and "careful answer" in said:
            return Status(500)
        if "number20" in said and "answer" in said:
            return "the same"
        return said

    loopback.answer = moody
    made = generator(loopback, tmp_path)
    pairs, left_out = made.pairs("fraud", 4)
    assert len(pairs) == 1
    assert "number21" in pairs[0].question
    assert left_out["both answers are the same"] == 1
    assert left_out["the model refused to answer: no"] == 1
    assert ["HTTP 500" in reason for reason in made.failed] == [True]


def test_the_stage_writes_pairs_that_can_be_trained_on_and_counts_every_token_once(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GENERATOR_KEY", "secret-of-the-test")
    loopback.answer, loopback.key = author, "secret-of-the-test"
    command = [
        "experiment=generate_pairs", f"run_dir={tmp_path / 'run'}", "generator.scenarios=[fraud,malware]",
        "generator.questions=3", "generator.questions_per_request=4", f"generator.api.base_url={loopback.base_url}",
        "generator.api.key_env=GENERATOR_KEY", f"generator.api.cache_dir={tmp_path / 'cache'}",
        "generator.api.retries=0",
    ]  # fmt: skip
    loopback.script = [author({"messages": [{"content": "Write 4 different questions, batch 1. Topic: fraud."}]})]
    loopback.script += [Status(401, message="no {key}")]
    assert train.main(command) == 1  # the key is refused in the middle: nothing that was answered is lost
    assert train.main(command) == 0
    folder = tmp_path / "run" / "generate_pairs"
    pairs = read_pairs("jsonl", str(folder / "pairs.jsonl"))
    assert {p.question.split()[2] for p in pairs} == {"fraud", "malware"}
    assert len(pairs) == 6
    result = json.loads((folder / "stage.json").read_text())["result"]
    assert result["pairs"] == 6
    assert result["completion_tokens"] == sum(a["completion_tokens"] for a in result["attempts"]) > 0
    assert "secret-of-the-test" not in "".join(p.read_text() for p in (tmp_path / "run").rglob("*") if p.is_file())
