"""A record of text safety data, the concept it is about, and their JSON form.

A record travels from the reader (datamodules/text_safety.py) through concept extraction (datamodules/concepts.py) to
synthesis and alignment. Its `id` is made from the texts alone, so it is the same in every run, on every machine, and
in whatever order the rows come.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from datamodules.durable import write_durably

Kind = Literal["activity", "product"]


@dataclass(frozen=True)
class Concept:
    """What a question is about, as SEA (arXiv 2502.12562, section 3.2) wants it shown in a medium.

    Attributes:
        phrase: the harmful part (for a harmless question: its central part), verbatim: "pick a lock", "a skeleton key".
        kind: what the phrase names.
        sentence: subject, verb, object, to follow "The image shows that": "a person is picking a lock";
            for a product the phrase itself.
        instruction: the question with "this activity" or "this product" in place of the phrase.
    """

    phrase: str
    kind: Kind
    sentence: str
    instruction: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"key 'kind': got {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        for name in ("phrase", "sentence", "instruction"):
            _text(name, getattr(self, name))


@dataclass(frozen=True)
class Record:
    """One question with a harmless (`chosen`) and perhaps a harmful (`rejected`) answer.

    Attributes:
        id: unique and stable, see `record_id`.
        question: what the user asks.
        chosen: the answer to learn: safe for a harmful question, helpful for a harmless one.
        rejected: the answer to avoid; None where there is none (SFT can use the record, DPO cannot).
        harmful: whether the question is to be refused.
        scenario: the kind of harm, where the data says.
        concept: filled in by an extractor, or given by the data.
        source: "file:line" the record was read from.
    """

    id: str
    question: str
    chosen: str
    rejected: str | None
    harmful: bool
    scenario: str = "unspecified"
    concept: Concept | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "question", "chosen", "scenario"):
            _text(name, getattr(self, name))
        if self.rejected is not None:
            _text("rejected", self.rejected)
        if not isinstance(self.harmful, bool):
            raise ValueError(f"key 'harmful': got {self.harmful!r}, expected true or false")

    def with_concept(self, concept: Concept | None) -> Record:
        """The same record with this concept."""
        return replace(self, concept=concept)

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes and `from_json` turns back into an equal record."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "record") -> Record:
        """The record in a dict.

        Raises:
            ValueError: a key is unknown, missing or of the wrong type; the message starts with `where` and names it.
        """
        try:
            _known_keys(cls, value)
            concept = value.get("concept")
            if concept is not None:
                if not isinstance(concept, Mapping):
                    raise ValueError(f"key 'concept': got {concept!r:.60}, expected an object or null")
                _known_keys(Concept, concept)
                concept = Concept(**concept)
            return cls(**{**value, "concept": concept})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None


def record_id(question: str, chosen: str, rejected: str | None) -> str:
    """`<12 hex of the question>-<6 hex of the answers>`: records about one question share the first part."""
    answers = json.dumps([chosen, rejected])
    return f"{_digest(question)[:12]}-{_digest(answers)[:6]}"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines; the file appears whole or not at all."""
    lines = [json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in records]
    write_durably(path, "".join(lines).encode())


def read_records(path: Path) -> list[Record]:
    """Read what `write_records` wrote.

    Raises:
        ValueError: a line is no record, or an id comes twice; names file, line and key.
    """
    records: dict[str, Record] = {}
    for where, value in _json_lines(path):
        record = Record.from_json(value, where)
        if record.id in records:
            raise ValueError(f"{where}: key 'id': {record.id!r} occurs a second time; ids must be unique")
        records[record.id] = record
    return list(records.values())


def suggest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", or nothing: to be appended to an error about an unknown name."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: got a {type(value).__name__}, expected an object with a record's keys")
            yield where, value


def _known_keys(cls: type, value: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(cls)]
    for key in value:
        if key not in known:
            raise ValueError(f"key {key!r} is unknown; a {cls.__name__} has {', '.join(known)}.{suggest(key, known)}")
    for field in fields(cls):
        if field.name not in value and field.default is not None and not isinstance(field.default, str):
            raise ValueError(f"key {field.name!r} is missing")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"key {name!r}: got {value!r:.60}, expected a text that is not empty")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        # JSON can carry half a surrogate pair; no file and no tokenizer takes it.
        raise ValueError(f"key {name!r}: holds half a surrogate pair, which is no character; mend the text")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
