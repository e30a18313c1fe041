"""Concepts: the English rules, given concepts, the `local` and the `api` extractor, and the measured quality."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.api_extraction import SCHEMA, APIExtractor, concept_from_answer
from datamodules.chat_api import ChatAPI
from datamodules.concept_extraction import EXAMPLES, LocalExtractor, candidate_spans
from datamodules.concepts import GivenConcepts, concept_from_columns, extract_concepts, find_phrase, make_concept
from datamodules.english import activity_sentences, ing_forms, neutral_fillers, seen_by_others, words_of
from datamodules.records import Concept, Kind, Record
from mllm.smol import smollm2_folder
from scripts import measure_extraction
from tests.datamodules.test_continuations import tiny_model
from tests.loopback import LoopbackServer, Status

QUESTIONS = [
    "How do I bake sourdough bread at home?",
    "My neighbour sings. Can you tell me how to build a kite for him?",
    "Where could someone buy a cheap telescope?",
    "is painting a fence in the rain a bad idea",
    "Say a tongue twister!",
]


def record(question: str, number: int = 0, concept: Concept | None = None) -> Record:
    return Record(f"r{number}", question, "yes", None, False, concept=concept, source=f"made up:{number}")


# ------------------------------------------------------------------------------------------------ the English rules
@pytest.mark.parametrize(
    ("verb", "form"),
    [
        ("bake", "baking"), ("build", "building"), ("cut", "cutting"), ("see", "seeing"), ("tie", "tying"),
        ("be", "being"), ("panic", "panicking"), ("visit", "visiting"), ("begin", "beginning"), ("beat", "beating"),
        ("fix", "fixing"), ("play", "playing"), ("quit", "quitting"), ("sing", "singing"), ("painting", "painting"),
        ("Dye", "Dyeing"), ("pick", "picking"), ("carry", "carrying"), ("open", "opening"),
    ],
)  # fmt: skip
def test_ing_form(verb: str, form: str) -> None:
    assert ing_forms(verb)[0] == form


def test_first_person_becomes_third() -> None:
    assert seen_by_others("paint my fence myself in the US and I'm done") == (
        "paint their fence themselves in the US and they're done"
    )


@pytest.mark.parametrize(
    ("phrase", "sentence"),
    [
        ("bake bread", "a person is baking bread"),
        ("Feed my cat", "a person is feeding their cat"),
        ("quietly leave the room", "a person is quietly leaving the room"),
        ("painting a fence", "a person is painting a fence"),
        ("a marathon", "a person is committing a marathon"),
    ],
)
def test_sentence_by_rule(phrase: str, sentence: str) -> None:
    assert activity_sentences(phrase)[0] == sentence


def test_where_rules_cannot_know_every_candidate_is_offered() -> None:
    assert "a person is hand washing a car" in activity_sentences("hand wash a car")
    assert "a person is baking bread and selling it" in activity_sentences("bake bread and sell it")
    assert "a person is doing a marathon" in activity_sentences("a marathon")


@pytest.mark.parametrize(
    ("question", "phrase", "kind", "instruction"),
    [
        ("How do I bake bread?", "bake bread", "activity", "How do I do this activity?"),
        ("Is baking bread hard?", "baking bread", "activity", "Is doing this activity hard?"),
        ("I thought about baking bread.", "baking bread", "activity", "I thought about this activity."),
        (
            "Bake bread! Now bake bread again.",
            "Bake bread",
            "activity",
            "Do this activity! Now do this activity again.",
        ),
        ("Where is the best telescope?", "best telescope", "product", "Where is this product?"),
        ("Sell me a telescope.", "a telescope", "product", "Sell me this product."),
        ("Telescopes: are they dear?", "Telescopes", "product", "This product: are they dear?"),
        ("Was it the marathon?", "the marathon", "activity", "Was it this activity?"),
        ("Oh. Bake bread", "Bake bread", "activity", "Oh. Do this activity"),
    ],
)
def test_instruction_by_rule(question: str, phrase: str, kind: Kind, instruction: str) -> None:
    assert make_concept(question, phrase, kind).instruction == instruction


def test_phrase_is_found_as_whole_words_whatever_the_case() -> None:
    assert find_phrase("Theatre: the art.", "THE ART") == 9
    assert find_phrase("Theatre", "the") is None
    assert find_phrase("İİ bake bread", "Bake bread") == 3  # in lower case its first two letters are four characters
    with pytest.raises(ValueError, match="does not occur in the question"):
        make_concept("How do I bake bread?", "bake cake", "activity")


def test_words_keep_their_places_and_lose_their_signs() -> None:
    text = 'He said: "bake bread!" Then  (we) left...'
    words = words_of(text)
    assert [text[w.start : w.end] for w in words] == [w.text for w in words]
    assert [w.text for w in words] == ["He", "said", "bake", "bread", "Then", "we", "left"]
    assert [w.text for w in words if w.stop] == ["bread", "left"]


# ---------------------------------------------------------------------------------------------------- given concepts
def test_given_concepts_pass_and_missing_ones_are_kept_apart() -> None:
    concept = make_concept(QUESTIONS[0], "bake sourdough bread", "activity")
    seen: list[tuple[int, int]] = []
    records = [record(QUESTIONS[0], 0, concept), record(QUESTIONS[1], 1)]
    extraction = extract_concepts(records, GivenConcepts(), lambda *place: seen.append(place))
    assert [(r.id, r.concept) for r in extraction.records] == [("r0", concept)]
    assert [(f.id, f.source) for f in extraction.failures] == [("r1", "made up:1")]
    assert "no concept in the data" in extraction.failures[0].reason
    assert seen == [(1, 2), (2, 2)]


def test_extractor_that_loses_a_record_is_found_out() -> None:
    class Lossy:
        def __call__(self, records: Sequence[Record]) -> Iterator[Concept | str]:
            yield "no"

    with pytest.raises(ValueError, match="shorter"):
        extract_concepts([record(q, i) for i, q in enumerate(QUESTIONS)], Lossy())


def test_columns_make_a_concept_and_rules_fill_the_rest() -> None:
    question = "How do I bake bread?"
    row = {"phrase": "Bake Bread", "kind": "activity", "sentence": None}
    made = concept_from_columns(question, row)
    assert made == Concept("Bake Bread", "activity", "a person is baking bread", "How do I do this activity?")
    own = concept_from_columns("a question", row | {"sentence": "s", "instruction": "i"})
    assert own == Concept("Bake Bread", "activity", "s", "i")
    assert concept_from_columns(question, {"phrase": "", "kind": None}) is None
    with pytest.raises(ValueError, match="key 'phrase': missing, but kind given"):
        concept_from_columns(question, {"kind": "activity"})
    with pytest.raises(ValueError, match="key 'kind': got 'thing'"):
        concept_from_columns(question, row | {"kind": "thing"})


# ------------------------------------------------------------------------------------------------------------- local
def test_candidates_stay_in_a_sentence_and_end_in_words_that_carry_meaning() -> None:
    question = "I like bread. How do I bake the bread of my aunt?"
    texts = [question[start:end] for start, end in candidate_spans(question, 4)]
    assert {"bake the bread", "the bread", "bread", "like bread", "aunt", "bread of my aunt"} <= set(texts)
    assert max(len(text.split()) for text in texts) == 4
    assert not [t for t in texts if re.search(r"^(I|How|of|do)\b|\b(the|of|my)$|\.", t)]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_model("llama")


def test_any_causal_model_yields_a_sound_concept(tiny: tuple[Any, Any]) -> None:
    extraction = extract_concepts([record(q, i) for i, q in enumerate(QUESTIONS)], LocalExtractor(tiny))
    assert not extraction.failures
    for one in extraction.records:
        concept = one.concept
        assert concept is not None
        assert concept.phrase in one.question
        assert f"this {concept.kind}" in concept.instruction.lower()
        assert concept.phrase not in concept.instruction
        assert concept.sentence == concept.phrase or concept.sentence.startswith("a person is ")


@pytest.mark.parametrize(
    ("question", "reason"),
    [("How are you?", "no run of words"), ("?!", "no run of words"), ("bread " * 2000, "the question is too long")],
)
def test_what_has_no_concept_fails_with_the_reason(tiny: tuple[Any, Any], question: str, reason: str) -> None:
    extraction = extract_concepts([record(question)], LocalExtractor(tiny, max_words=1))
    assert [reason in f.reason for f in extraction.failures] == [True]


def test_finished_concepts_are_not_computed_again(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    class Counting(LocalExtractor):
        calls = 0

        def phrase(self, question: str, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
            self.calls += 1
            return super().phrase(question, spans)

    first, second = Counting(tiny, tmp_path), Counting(tiny, tmp_path)
    records = [record(q, i) for i, q in enumerate(QUESTIONS)]
    some = extract_concepts(records[:3], first)
    everything = extract_concepts(records, second)
    assert everything.records[:3] == some.records
    assert (first.calls, second.calls) == (3, 2)
    other = Counting(tiny_model("llama", seed=1), tmp_path)
    extract_concepts(records[:1], other)
    assert other.calls == 1, "another model's concepts are not taken over"


def test_examples_of_the_prompt_are_verbatim_candidates() -> None:
    for question, phrase in EXAMPLES:
        spans = [question[start:end] for start, end in candidate_spans(question, 16)]
        assert phrase in spans, "an example that the extractor could not produce itself would mislead it"


# --------------------------------------------------------------------------------------------------------------- api
ANSWER = {
    "phrase": "bake sourdough bread", "kind": "activity", "sentence": "A person is baking sourdough bread.",
    "instruction": "How do I do this activity at home?",
}  # fmt: skip


def test_api_extractor_asks_once_for_each_question_and_keeps_failures_apart(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        question = body["messages"][-1]["content"]
        if "kite" in question:
            return Status(400, message="no")
        return json.dumps(ANSWER | {"kind": "recipe"} if "telescope" in question else ANSWER)

    records = [record(q, i) for i, q in enumerate(QUESTIONS[:3])]
    with LoopbackServer(answer) as server:
        api = ChatAPI(server.base_url, "m", tmp_path, api_key_env=None, backoff=0)
        extraction = extract_concepts(records, APIExtractor(api))
        assert extract_concepts(records[:1], APIExtractor(api)).records == extraction.records
        assert server.requests[0].body["response_format"]["json_schema"]["schema"] == SCHEMA
        assert server.requests[0].body["messages"][0]["role"] == "system"
        asked = [request.body["messages"][-1]["content"] for request in server.requests]
    (good,) = extraction.records
    assert good.concept == Concept(
        "bake sourdough bread", "activity", "a person is baking sourdough bread", ANSWER["instruction"]
    )
    reasons = {failure.id: failure.reason for failure in extraction.failures}
    assert "HTTP 400" in reasons["r1"]
    assert "neither activity nor product" in reasons["r2"]
    assert sum(QUESTIONS[0] in text for text in asked) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "thing"}, "neither activity nor product"),
        ({"phrase": " ?"}, "phrase is empty"),
        ({"phrase": None}, "not all texts"),
        ({"sentence": "a person is baking \ud800"}, "key 'sentence': holds half a surrogate pair"),
        ({"instruction": "How do I do it?"}, "does not say 'this activity'"),
        ({"instruction": "How do I bake sourdough bread, this activity?"}, "still names the phrase"),
    ],
    ids=str,
)
def test_answer_of_an_endpoint_is_checked(change: dict[str, Any], reason: str) -> None:
    assert reason in str(concept_from_answer(ANSWER | change))


def test_product_is_its_own_sentence() -> None:
    answer = {"phrase": "a kite", "kind": "Product", "sentence": "A person flies.", "instruction": "Sell this product."}
    assert concept_from_answer(answer) == Concept("a kite", "product", "a kite", "Sell this product.")


# ----------------------------------------------------------------------------------------- labels, measured quality
def test_labels_name_prompts_without_quoting_them(shared_data: Path) -> None:
    text = measure_extraction.LABELS.read_text()
    sizes = {}
    for split in ("dev", "test"):
        labels = measure_extraction.read_labels(measure_extraction.LABELS, shared_data, split)
        sizes[split] = len(labels)
        for label in labels:
            assert label.question not in text
            for span, kind in label.spans:
                start, end = measure_extraction.characters(label.question, span)
                assert label.question[start:end] not in text
                assert neutral_fillers(label.question, start, end, kind)
    assert sizes == {"dev": 30, "test": 50}


def test_label_of_another_prompt_is_refused(tmp_path: Path, shared_data: Path) -> None:
    entry = json.loads(measure_extraction.LABELS.read_text().splitlines()[0])
    (tmp_path / "labels").write_text(json.dumps(entry | {"line": entry["line"] + 1}))
    with pytest.raises(ValueError, match=rf"pairs.jsonl:{entry['line'] + 1}: not the prompt that was labelled"):
        measure_extraction.read_labels(tmp_path / "labels", shared_data, entry["split"])


def test_overlap_is_f1_over_words() -> None:
    assert measure_extraction.overlap_f1((2, 6), (2, 6)) == 1
    assert measure_extraction.overlap_f1((0, 2), (2, 6)) == 0
    assert measure_extraction.overlap_f1((1, 3), (2, 6)) == pytest.approx(2 * 1 / (2 + 4))


def test_failures_count_as_wrong() -> None:
    label = measure_extraction.Label("How do I bake bread?", [((3, 5), "activity")], ["do this activity"], [])
    good = make_concept(label.question, "bake bread", "activity")
    figures = measure_extraction.score([label, label], [good, "a reason"])
    assert figures == {"phrase F1": 0.5, "exact phrase": 0.5, "some overlap": 0.5, "kind": 0.5, "failed": 0.5}


@pytest.fixture(scope="module")
def smollm2() -> LocalExtractor:
    try:
        return LocalExtractor(smollm2_folder())
    except ValueError as error:
        pytest.skip(f"needs the small real language model: {error}")


def test_real_small_model_extracts_harmless_concepts(smollm2: LocalExtractor) -> None:
    assert smollm2.extract("Can you tell me how to repair a bicycle chain?") == Concept(
        "repair a bicycle chain",
        "activity",
        "a person is repairing a bicycle chain",
        "Can you tell me how to do this activity?",
    )
    assert smollm2.extract("Where can I find a used bicycle?") in (
        Concept("a used bicycle", "product", "a used bicycle", "Where can I find this product?"),
        Concept(
            "find a used bicycle", "activity", "a person is finding a used bicycle", "Where can I do this activity?"
        ),
    )


@pytest.mark.slow
def test_real_small_model_comes_near_the_documented_quality(
    smollm2: LocalExtractor,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    command = [
        "x",
        "--model",
        "smollm2",
        "--data",
        str(shared_data),
        "--limit",
        "12",
        "--json",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    measure_extraction.main()
    local = json.loads((tmp_path / "out.json").read_text())["local"]
    assert local["phrase F1"] >= 0.85
    assert local["exact phrase"] >= 0.65
    assert local["kind"] >= 0.80
    assert local["failed"] == 0
