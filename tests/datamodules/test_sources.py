"""From the configuration to records and concepts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from configs.schema import Api, Concepts, Data
from datamodules.chat_api import Request
from datamodules.sources import chat_api, safety_records, with_concepts

MICRO = Data(name="micro", format="micro")


def test_micro_records_are_bounded_by_number_and_limit() -> None:
    records = safety_records(MICRO, 0, 10, 6)
    assert [r.harmful for r in records] == [True] * 10 + [False] * 6
    assert len(safety_records(dataclasses.replace(MICRO, limit=7), 0, 10, 10)) == 7


def test_a_data_set_without_a_path_says_so() -> None:
    with pytest.raises(ValueError, match=r"data\.path: not set"):
        safety_records(Data(name="x", format="jsonl"), 0)


def test_harmful_and_harmless_files_are_joined_and_bounded(tmp_path: Path) -> None:
    for name, n in (("harmful", 40), ("harmless", 30)):
        rows = [{"question": f"{name} question {i}?", "chosen": "yes", "rejected": "no"} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = Data(
        name="x", format="jsonl", path=str(tmp_path / "harmful.jsonl"), harmless_path=str(tmp_path / "harmless.jsonl")
    )
    records = safety_records(data, 0, 12, 8)
    assert sum(r.harmful for r in records) == 12
    assert sum(not r.harmful for r in records) == 8
    assert all(r.question.startswith("harmful") == r.harmful for r in records)


def test_given_concepts_pass_and_missing_ones_are_kept_apart() -> None:
    records = safety_records(MICRO, 0, 2, 2)
    bare = [records[0].with_concept(None), *records[1:]]
    seen: list[int] = []
    found = with_concepts(bare, Concepts(extractor="given"), seen.append)
    assert [r.id for r in found.records] == [r.id for r in records[1:]]
    assert [f.id for f in found.failures] == [records[0].id]
    assert sum(seen) == len(records)


def test_a_key_that_is_not_set_is_told_by_the_name_of_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    api = chat_api(Api(key_env="NO_SUCH_KEY", cache_dir=str(tmp_path)), "judge.api")
    with pytest.raises(ValueError, match=r"NO_SUCH_KEY is not set: export it, or set judge\.api\.key_env to"):
        api.complete_many([Request.user("q")])


def test_auto_takes_what_is_given() -> None:
    records = safety_records(MICRO, 0, 2, 0)
    assert list(with_concepts(records, Concepts(), lambda n: None).records) == records
