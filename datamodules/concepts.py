"""What a question is about: concepts from the data's own columns, and what every extractor has in common.

    extraction = extract_concepts(records, extractor, progress)
    extraction.records     the records whose concept is known, in their order
    extraction.failures    the others, each with the reason

Extractors: `GivenConcepts` (the data has them), `LocalExtractor` and `ApiExtractor` (datamodules/concept_extraction.py
and concept_api.py). SEA (arXiv 2502.12562, section 3.2) uses GPT-4o-mini; its prompt is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datamodules.english import activity_sentences, neutral_fillers, neutral_instruction, words_of
from datamodules.records import Concept, Kind, Record

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Failure:
    """A record without a concept, and why."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True)
class Extraction:
    """Records with their concepts, and the failures; together they are all that came in."""

    records: tuple[Record, ...]
    failures: tuple[Failure, ...]


class Extractor(Protocol):
    """Yields, for each record in turn, its concept, or the reason why there is none."""

    def __call__(self, records: Sequence[Record]) -> Iterator[Concept | str]: ...


class GivenConcepts:
    """The concepts that the data set has."""

    def __call__(self, records: Sequence[Record]) -> Iterator[Concept | str]:
        for record in records:
            yield record.concept or "no concept in the data: map the columns phrase and kind, or use another extractor"


def extract_concepts(records: Sequence[Record], extractor: Extractor, progress: Progress | None = None) -> Extraction:
    """Give every record its concept. `progress(done, total)` after each."""
    done: list[Record] = []
    failures: list[Failure] = []
    for number, (record, result) in enumerate(zip(records, extractor(records), strict=True), 1):
        if isinstance(result, Concept):
            done.append(record.with_concept(result))
        else:
            failures.append(Failure(record.id, record.source, result))
        if progress is not None:
            progress(number, len(records))
    return Extraction(tuple(done), tuple(failures))


def make_concept(question: str, phrase: str, kind: Kind) -> Concept:
    """A concept by rule from a phrase that stands in the question.

    Raises:
        ValueError: the phrase does not occur in the question.
    """
    start = find_phrase(question, phrase)
    if start is None:
        raise ValueError("key 'phrase': does not occur in the question, so no instruction can be made; give one")
    end = start + len(phrase)
    phrase = question[start:end]  # as the question spells it
    sentence = phrase if kind == "product" else activity_sentences(phrase)[0]
    instruction = neutral_instruction(question, start, end, neutral_fillers(question, start, end, kind)[0])
    return Concept(phrase, kind, sentence, instruction)


def concept_from_columns(question: str, values: Mapping[str, Any]) -> Concept | None:
    """The concept in a row's columns phrase, kind and perhaps sentence and instruction, or in its object `concept`.

    Raises:
        ValueError: half a concept; names the key.
    """
    nested = values.get("concept")
    if isinstance(nested, Mapping):
        values = nested
    given = {key: str(values[key]).strip() for key in ("phrase", "kind", "sentence", "instruction") if values.get(key)}
    if not given:
        return None
    if "phrase" not in given or "kind" not in given:
        raise ValueError(
            f"key {'phrase' if 'phrase' not in given else 'kind'!r}: missing, but {', '.join(given)} given"
        )
    if len(given) < 4:
        made = make_concept(question, given["phrase"], given["kind"])  # type: ignore[arg-type]
        given = {"sentence": made.sentence, "instruction": made.instruction} | given
    return Concept(**given)  # type: ignore[arg-type]


def find_phrase(question: str, phrase: str) -> int | None:
    """Where the phrase stands in the question as whole words, whatever the case; None if nowhere."""
    wanted = phrase.lower()
    starts = [word.start for word in words_of(question)]
    for start in starts:
        # Cut, then lowered: lowering may lengthen what stands before (a capital I with a dot).
        end = start + len(phrase)
        if question[start:end].lower() == wanted and not question[end : end + 1].isalnum():
            return start
    return None
