"""Readers of text safety data: formats, labels, splits, bad rows. All texts are made up; real files only counted."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules import raw_rows
from datamodules.records import Concept, Record
from datamodules.text_safety import TextSafetyData

PAIR = {"prompt": "How do I do the bad thing?", "chosen": "Please do not.", "rejected": "Like this."}


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    return [{key: f"{text} {i}" for key, text in PAIR.items()} for i in range(start, start + n)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, values: Iterable[Any]) -> str:
    text = "".join(value + "\n" if isinstance(value, str) else json.dumps(value) + "\n" for value in values)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{who}: {said}" for who, said in zip(("Human", "Assistant") * len(turns), turns, strict=False))


def only(data: TextSafetyData) -> Record:
    (record,) = data.records("all")
    return record


def test_saferlhf_pair_becomes_a_harmful_record(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [PAIR])
    record = only(TextSafetyData("saferlhf", path))
    assert (record.question, record.chosen, record.rejected) == (PAIR["prompt"], PAIR["chosen"], PAIR["rejected"])
    assert (record.harmful, record.scenario, record.concept, record.source) == (True, "unspecified", None, f"{path}:1")


def hub_row(safe: tuple[bool, bool], best: int, **more: Any) -> dict[str, Any]:
    harms = {"Violence": False, "Theft": True}
    return {
        "prompt": "q", "response_0": "zero", "response_1": "one", "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1], "safer_response_id": best, "response_0_harm_category": harms,
        "response_1_harm_category": harms, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (hub_row((True, False), 0), ("zero", "one")),
        (hub_row((False, True), 1), ("one", "zero")),
        (hub_row((True, True), 1), ("one", None)),
    ],
    ids=["first safe", "second safe", "both safe"],
)
def test_hub_columns_of_saferlhf(tmp_path: Path, row: dict[str, Any], answers: tuple[str, str | None]) -> None:
    record = only(TextSafetyData("saferlhf", write(tmp_path / "d.jsonl", [row])))
    assert (record.chosen, record.rejected, record.harmful, record.scenario) == (*answers, True, "Theft")


def test_row_without_a_safe_answer_is_never_a_target(tmp_path: Path) -> None:
    data = TextSafetyData("saferlhf", write(tmp_path / "d.jsonl", [hub_row((False, False), 0), PAIR]))
    assert only(data).question == PAIR["prompt"]
    assert data.report.left_out == {"both answers are unsafe": 1}


@pytest.mark.parametrize("best", [1, 2, None, "0", False, 0.0])
def test_contradicting_or_odd_safety_labels_are_a_bad_row(tmp_path: Path, best: Any) -> None:
    path = write(tmp_path / "d.jsonl", [hub_row((True, False), best)])
    with pytest.raises(ValueError, match=rf"d.jsonl:1: key 'safer_response_id': got {best!r}"):
        TextSafetyData("saferlhf", path).records("all")


def test_dialogue_is_cut_at_the_last_answer_even_if_both_begin_alike(tmp_path: Path) -> None:
    row = {
        "chosen": dialogue("a question", "I am sorry, no."),
        "rejected": dialogue("a question", "I am sorry, but yes."),
    }
    record = only(TextSafetyData("hh_rlhf", write(tmp_path / "d.jsonl.gz", [row])))
    assert (record.question, record.chosen, record.rejected) == (
        "a question",
        "I am sorry, no.",
        "I am sorry, but yes.",
    )
    assert record.harmful


def test_longer_dialogues_are_left_out_or_become_transcripts(tmp_path: Path) -> None:
    front = ("hello", "hi there", "a question")
    path = write(tmp_path / "d.jsonl", [{"chosen": dialogue(*front, "no"), "rejected": dialogue(*front, "yes")}])
    with pytest.raises(ValueError, match="1 left out: the dialogue has more than one turn"):
        TextSafetyData("hh_rlhf", path).records("all")
    record = only(TextSafetyData("hh_rlhf", path, multi_turn="transcript"))
    assert record.question == "Human: hello\n\nAssistant: hi there\n\nHuman: a question"
    assert (record.chosen, record.rejected) == ("no", "yes")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("just text", dialogue("q", "a"), "key 'chosen': expected a dialogue"),
        (dialogue("q", ""), dialogue("q", "a"), "key 'chosen': a turn of the dialogue is empty"),
        (dialogue("q", "a"), dialogue("q", "a"), "the same dialogue"),
        (dialogue("q", "a"), dialogue("other", "a"), "differ in the assistant's last turn only"),
        (dialogue("q", "a"), dialogue("q", "b", "r", "c"), "differ in the assistant's last turn only"),
        (dialogue("q"), dialogue("q", "a"), "key 'chosen': expected a dialogue"),
        (None, dialogue("q", "a"), "key 'chosen': expected a dialogue"),
    ],
)
def test_malformed_dialogue_names_the_row(tmp_path: Path, chosen: Any, rejected: str, message: str) -> None:
    path = write(tmp_path / "d.jsonl", [{"chosen": chosen, "rejected": rejected}])
    with pytest.raises(ValueError, match=rf"d.jsonl:1: .*{message}"):
        TextSafetyData("hh_rlhf", path).records("all")


MAPPED = {
    "ask": "How do I pick a lock?",
    "safe": "no",
    "unsafe": "so",
    "bad": "1",
    "area": "theft",
    "what": "pick a lock",
    "sort": "activity",
}
COLUMNS = {
    "question": "ask",
    "chosen": "safe",
    "rejected": "unsafe",
    "harmful": "bad",
    "scenario": "area",
    "phrase": "what",
    "kind": "sort",
}


def mapped_file(folder: Path, how: str) -> tuple[str, dict[str, Any]]:
    """The same row as JSON lines, CSV, a parquet folder and a saved data set."""
    if how in ("jsonl", "jsonl.gz"):
        return write(folder / f"d.{how}", [MAPPED]), {"format": "jsonl"}
    if how in ("csv", "csv.gz"):
        path = folder / "d.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(MAPPED))
            writer.writeheader()
            writer.writerow(MAPPED)
        if how == "csv.gz":
            path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        return str(folder / f"d.{how}"), {"format": "csv"}
    table = datasets.Dataset.from_list([MAPPED])
    if how == "parquet folder":
        (folder / "hub").mkdir()
        table.to_parquet(folder / "hub" / "train.parquet")
        return str(folder / "hub"), {"format": "huggingface"}
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([MAPPED] * 2), "held_out": table})
    splits.save_to_disk(str(folder / "saved"))
    return str(folder / "saved"), {"format": "huggingface", "split": "held_out"}


@pytest.mark.parametrize("how", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet folder", "saved data set"])
def test_columns_are_mapped_from_every_container(tmp_path: Path, how: str) -> None:
    path, settings = mapped_file(tmp_path, how)
    record = only(TextSafetyData(path=path, columns=COLUMNS, **settings))
    assert (record.question, record.chosen, record.rejected) == ("How do I pick a lock?", "no", "so")
    assert (record.harmful, record.scenario) == (True, "theft")
    assert record.concept == Concept(
        "pick a lock", "activity", "a person is picking a lock", "How do I do this activity?"
    )
    place = {"jsonl": f"{path}:1", "jsonl.gz": f"{path}:1", "csv": f"{path}:2", "csv.gz": f"{path}:2"}
    assert record.source == place.get(how, f"{path}[{settings.get('split', 'train')}]:0")


def test_records_written_by_the_project_are_read_back(tmp_path: Path) -> None:
    concept = Concept("pick a lock", "activity", "someone picks a lock", "List steps for this activity.")
    one = Record("id-1", "How do I pick a lock?", "no", None, True, "theft", concept, "x")
    path = write(tmp_path / "d.jsonl", [one.to_json()])
    again = only(TextSafetyData("jsonl", path))
    assert (again.id, again.concept, again.harmful, again.rejected) == (one.id, concept, True, None)


@pytest.mark.parametrize(
    ("value", "flag"), [(True, True), ("false", False), (0, False), ("Harmful", True), ("harmless", False)]
)
def test_label_column_decides(tmp_path: Path, value: Any, flag: bool) -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b", "harmful": value}
    assert only(TextSafetyData("jsonl", write(tmp_path / "d.jsonl", [row]))).harmful is flag


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "chosen": "a", "harmful": "maybe"}, "key 'harmful': got 'maybe'"),
        ({"question": "q", "chosen": "a", "harmful": None}, "key 'harmful': got 'None'"),
        ({"question": "q", "chosen": "a"}, "neither a column 'harmful' nor a rejected answer"),
        ({"question": "q", "chosen": "", "rejected": "b"}, "key 'chosen': got '', expected a text"),
        ({"question": 3, "chosen": "a"}, "key 'question': got a int, expected a text"),
        ({"question": None, "chosen": "a", "rejected": "b"}, "key 'question': got a NoneType, expected a text"),
        ({"question": "q", "chosen": None, "rejected": "b"}, "key 'chosen': got a NoneType, expected a text"),
        ({"question": "q \ud800", "chosen": "a", "rejected": "b"}, "key 'question': holds half a surrogate pair"),
        (
            {"quesion": "q", "chosen": "a"},
            "no column 'question', the row has quesion, chosen; map it.*Did you mean 'quesion'",
        ),
        ({"question": "q", "chosen": "a", "rejected": "b", "phrase": "q"}, "key 'kind': missing"),
        (
            {"question": "q", "chosen": "a", "rejected": "b", "phrase": "z", "kind": "product"},
            "does not occur in the question",
        ),
        ("{", "not a line of JSON"),
        ("[]", "got a list, expected an object"),
        ("[" * 100_000, "not a line of JSON"),
        ('{"question": ' + "1" * 5000 + "}", "not a line of JSON"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_row_stops_or_is_counted(tmp_path: Path, row: Any, message: str, caplog: pytest.LogCaptureFixture) -> None:
    good = {"question": "fine", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "d.jsonl", [good, row, good | {"question": "also fine"}])
    with pytest.raises(ValueError, match=rf"d.jsonl:2: .*{message}"):
        TextSafetyData("jsonl", path).records("all")
    data = TextSafetyData("jsonl", path, bad_rows="skip")
    assert len(data.records("all")) == 2
    assert [where for where, _ in data.report.bad] == [f"{path}:2"]
    assert f"1 bad row(s) skipped, the first: {path}:2" in caplog.text


def test_bad_csv_rows_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('question,chosen,rejected\n"two\nlines",a,b\nq2,a\nq3,a,b\n')
    data = TextSafetyData("csv", str(path), bad_rows="skip")
    assert sorted(r.source for r in data.records("all")) == [f"{path}:2", f"{path}:5"]
    assert data.report.bad == [(f"{path}:4", "got 2 cells, the header has 3")]


@pytest.mark.parametrize("sign", ["\u2028", "\x0c", "\x85", "\x1c"])
def test_only_a_line_feed_ends_a_csv_row(tmp_path: Path, sign: str) -> None:
    path = tmp_path / "d.csv"
    path.write_text(f"question,chosen,rejected\nwhat{sign}is this,a,b\n", encoding="utf-8")
    assert only(TextSafetyData("csv", str(path))).question == f"what{sign}is this"


def test_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2: not a line of JSON \(byte 12 is not UTF-8\)"):
        TextSafetyData("saferlhf", str(path)).records()


def test_rows_that_are_all_bad_are_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["{", "{"])
    with pytest.raises(
        ValueError, match=r"d.jsonl: no usable record in 2 row\(s\); the first bad row: .*d.jsonl:1: not a line"
    ):
        TextSafetyData("saferlhf", path, bad_rows="skip").records()


def test_empty_file_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d.jsonl: no usable record in 0 row"):
        TextSafetyData("saferlhf", write(tmp_path / "d.jsonl", [])).records()


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"pears.jsonl: no such file. Did you mean '.*pairs.jsonl'"):
        TextSafetyData("saferlhf", str(tmp_path / "pears.jsonl")).records()


@pytest.mark.parametrize(
    ("name", "message"), [("d.parquet", "expected a file ending in"), ("nowhere", "no such file or folder")]
)
def test_wrong_kind_of_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "d.parquet").touch()
    with pytest.raises(ValueError, match=message):
        TextSafetyData("huggingface", str(tmp_path / name)).records()


def test_truncated_gzip_names_the_file(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "d.jsonl.gz", rows(500)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"d.jsonl.gz: damaged gzip file"):
        TextSafetyData("saferlhf", str(path)).records()


def test_unknown_column_lists_what_there_is(tmp_path: Path) -> None:
    path, settings = mapped_file(tmp_path, "parquet folder")
    with pytest.raises(ValueError, match=r"no column 'safes', the row has ask, safe, .*Did you mean 'safe'"):
        TextSafetyData(path=path, columns=COLUMNS | {"chosen": "safes"}, **settings).records()


def test_unknown_split_of_a_saved_data_set_suggests(tmp_path: Path) -> None:
    path, _ = mapped_file(tmp_path, "saved data set")
    with pytest.raises(ValueError, match=r"no split 'heldout', it has train, held_out. Did you mean 'held_out'"):
        TextSafetyData("huggingface", path, columns=COLUMNS, split="heldout").records()


def test_all_missing_columns_are_told_at_once_with_the_keys_that_map_them(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "answer": "a", "harmful": True}])
    with pytest.raises(ValueError) as caught:
        TextSafetyData("jsonl", path).records()
    told = str(caught.value)
    assert "no column 'question', 'chosen', the row has prompt, answer, harmful" in told
    assert "map it with data.columns.question=... data.columns.chosen=..." in told
    assert "(data.bad_rows=skip " in told
    with pytest.raises(ValueError, match="no column 'prompt', 'rejected'") as caught:
        TextSafetyData("saferlhf", write(tmp_path / "s.jsonl", [{"chosen": "a"}])).records()
    assert "data.columns" not in str(caught.value), "this format has columns of its own"
    settings = {"harmless_path": path, "harmless_columns": {"question": "prompt"}}
    good = write(tmp_path / "g.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"no column 'chosen', .*map it with data\.harmless_columns\.chosen=\.\.\."):
        TextSafetyData("jsonl", good, **settings).records()


def test_folder_without_data_is_refused_before_its_tree_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"\(no data in this folder, it holds notes\.txt\); name a file"):
        TextSafetyData("jsonl", str(tmp_path)).records()
    write(tmp_path / "d.jsonl", rows(1))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "module.py").touch()
    monkeypatch.setattr(raw_rows, "MOST_ENTRIES", 3)
    with pytest.raises(ValueError, match=r"more than 3 files; name one file, or a data set's own folder"):
        TextSafetyData("jsonl", str(tmp_path)).records()


def test_folder_with_a_loading_script_is_refused_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"evil: not readable as a data set"):
        TextSafetyData("huggingface", str(folder)).records()
    assert not (tmp_path / "ran").exists()


def test_harmless_records_come_from_a_second_source(tmp_path: Path) -> None:
    harmful = write(tmp_path / "a.jsonl", rows(20))
    harmless = write(tmp_path / "b.jsonl", [{"q": f"How do I bake bread {i}?", "a": "Gently."} for i in range(10)])
    data = TextSafetyData(
        "saferlhf",
        harmful,
        harmless_path=harmless,
        harmless_columns={"question": "q", "chosen": "a"},
        limit=5,
        harmless_limit=3,
    )
    kept = data.records("train")
    assert [sum(r.harmful is flag for r in kept) for flag in (True, False)] == [5, 3]
    assert all(r.rejected is None and r.chosen == "Gently." for r in kept if not r.harmful)


def test_harmless_source_of_the_same_format_needs_no_map(tmp_path: Path) -> None:
    harmful = write(tmp_path / "a.jsonl", [{"chosen": dialogue("bad", "no"), "rejected": dialogue("bad", "yes")}])
    harmless = write(tmp_path / "b.jsonl", [{"chosen": dialogue("good", "yes"), "rejected": dialogue("good", "hm")}])
    kept = TextSafetyData("hh_rlhf", harmful, harmless_path=harmless).records("all")
    assert {r.question: r.harmful for r in kept} == {"bad": True, "good": False}


def split_of_each(path: str, **settings: Any) -> Mapping[str, str]:
    data = TextSafetyData("saferlhf", path, holdout=0.2, validation=0.1, repeated_prompts="all", **settings)
    return {r.id: split for split in ("train", "val", "test") for r in data.records(split)}


def test_split_is_by_prompt_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    twice = rows(300) + [row | {"rejected": "Another way."} for row in rows(300)]
    twice[7] = twice[7] | {"prompt": twice[7]["prompt"].upper() + "  "}  # the same prompt, for a reader
    shuffled = random.Random(1).sample(twice, len(twice)) + rows(50, start=1000)
    one = split_of_each(write(tmp_path / "a.jsonl", twice))
    two = split_of_each(write(tmp_path / "b.jsonl", shuffled))
    assert len(one) == 600
    assert one == {key: two[key] for key in one}
    by_prompt: dict[str, set[str]] = {}
    for record in TextSafetyData("saferlhf", str(tmp_path / "a.jsonl"), repeated_prompts="all").records("all"):
        by_prompt.setdefault(record.question.casefold().strip(), set()).add(one[record.id])
    assert len(by_prompt) == 300
    assert all(len(splits) == 1 for splits in by_prompt.values())
    shares = [sum(s == split for s in one.values()) / len(one) for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert split_of_each(str(tmp_path / "a.jsonl"), seed=1) != one


def test_limit_keeps_the_same_records_in_whatever_order_they_come(tmp_path: Path) -> None:
    values = rows(100)
    a = TextSafetyData("saferlhf", write(tmp_path / "a.jsonl", values), limit=8).records()
    b = TextSafetyData("saferlhf", write(tmp_path / "b.jsonl", values[::-1]), limit=8).records()
    more = TextSafetyData("saferlhf", str(tmp_path / "a.jsonl"), limit=16).records()
    assert [r.id for r in a] == [r.id for r in b] == [r.id for r in more[:8]]
    assert [r.id for r in a] != [
        r.id for r in TextSafetyData("saferlhf", str(tmp_path / "a.jsonl"), limit=8, seed=1).records()
    ]


def test_repeated_prompts_keep_one_record_or_all(tmp_path: Path) -> None:
    same = [PAIR, PAIR | {"rejected": "Or like that."}, PAIR]
    data = TextSafetyData("saferlhf", write(tmp_path / "a.jsonl", same))
    kept = only(data)
    assert data.report.left_out == {"an equal row came before": 1, "another record has the same prompt": 1}
    assert only(TextSafetyData("saferlhf", write(tmp_path / "b.jsonl", same[::-1]))).id == kept.id
    everything = TextSafetyData("saferlhf", str(tmp_path / "a.jsonl"), repeated_prompts="all").records("all")
    assert len({r.id for r in everything}) == 2


def test_given_ids_must_not_name_two_records(tmp_path: Path) -> None:
    values = [{"id": "x", "question": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    path = write(tmp_path / "d.jsonl", values)
    with pytest.raises(ValueError, match=rf"d.jsonl:2: key 'id': 'x' also at {path}:1, with other texts"):
        TextSafetyData("jsonl", path).records()


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", rows(3))
    with pytest.raises(ValueError, match=r"no record in split 'val' \(of 3\)"):
        TextSafetyData("saferlhf", path).records("val")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "saferlfh"}, "format='saferlfh': expected one of.*Did you mean 'saferlhf'"),
        ({"bad_rows": "ignore"}, "bad_rows='ignore'"),
        ({"holdout": 0.6, "validation": 0.4}, "leave some for training"),
        ({"limit": -1}, "limit=-1"),
        ({"columns": {"question": "q"}}, "format=saferlhf has columns of its own"),
        ({"format": "jsonl", "columns": {"quest": "q"}}, "'quest': expected one of.*Did you mean 'question'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSafetyData(**({"format": "saferlhf", "path": "x.jsonl"} | settings))


def test_real_saferlhf_file_is_read_whole(shared_data: Path) -> None:
    data = TextSafetyData("saferlhf", str(shared_data / "saferlhf" / "pairs.jsonl"), repeated_prompts="all")
    kept = data.records("all")
    assert (data.report.rows, len(kept), data.report.bad) == (4230, 4230 - sum(data.report.left_out.values()), [])
    assert all(r.harmful and r.rejected for r in kept)
    one = hashlib.sha256(kept[0].question.encode()).hexdigest()[:12]
    assert kept[0].id.startswith(one)


def test_real_hh_file_is_read_and_its_bad_rows_counted(shared_data: Path) -> None:
    path = str(shared_data / "hh_rlhf" / "harmless_base_test.jsonl.gz")
    data = TextSafetyData("hh_rlhf", path, bad_rows="skip", multi_turn="transcript", repeated_prompts="all")
    kept = data.records("all")
    assert data.report.rows == 2312
    assert len(kept) + len(data.report.bad) + sum(data.report.left_out.values()) == 2312
    assert len(data.report.bad) <= 10
