"""Records with a real medium: a JSONL file beside its pictures, clips or recordings, one row for each.

    {"id": "lock-1", "media": "pictures/lock.png", "question": "...", "chosen": "...", "rejected": "...",
     "harmful": true, "scenario": "...", "phrase": "pick a lock", "kind": "activity"}

`media` is a path relative to the file's folder and must stay inside it. The other keys are those of `Record`
(datamodules/records.py); the concept may be an object `concept` or the keys phrase, kind, sentence and instruction. The
question is the request in words, as in text data: what is asked beside the medium is made from the concept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.concepts import concept_from_columns
from datamodules.raw_rows import read_rows
from datamodules.records import Record, suggest

REQUIRED = ("id", "media", "question", "chosen", "harmful")
OPTIONAL = ("rejected", "scenario", "concept", "phrase", "kind", "sentence", "instruction")


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used: "file:line" and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class MediaRecord:
    """A record and its medium: `media` as the row has it (relative), `path` where it lies."""

    record: Record
    media: str
    path: Path


def read_media_records(path: str, limit: int | None = None) -> tuple[list[MediaRecord], list[BadRow]]:
    """The first `limit` sound rows of a JSONL file, and the unsound ones before them. No medium is opened yet.

    Raises:
        ValueError: there is no such file, it is no .jsonl file, or has no rows at all.
    """
    if not path.endswith((".jsonl", ".jsonl.gz")) or Path(path).is_dir():
        raise ValueError(f"{path}: expected a .jsonl file with one row for each medium")
    root = Path(path).resolve().parent
    found: dict[str, MediaRecord] = {}
    bad: list[BadRow] = []
    for row in read_rows(path):
        if limit is not None and len(found) == limit:
            break
        try:
            if row.error is not None:
                raise ValueError(row.error)
            made = _media_record(row.values, row.where, root)
            if made.record.id in found:
                raise ValueError(f"key 'id': {made.record.id!r} occurs a second time; ids must be unique")
            found[made.record.id] = made
        except ValueError as error:
            bad.append(BadRow(row.where, str(error)))
    if not found and not bad:
        raise ValueError(f"{path}: no rows; expected one for each medium")
    return list(found.values()), bad


def _media_record(values: Mapping[str, Any], where: str, root: Path) -> MediaRecord:
    known = REQUIRED + OPTIONAL
    for key in values:
        if key not in known:
            raise ValueError(f"key {key!r} is unknown, expected {', '.join(known)}.{suggest(key, known)}")
    if missing := [key for key in REQUIRED if key not in values]:
        raise ValueError(f"key {', '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing")
    media = values["media"]
    if not isinstance(media, str) or not media.strip():
        raise ValueError(f"key 'media': got {media!r:.60}, expected a path relative to {root}")
    try:
        path = (root / media).resolve()
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; links that lead in a circle
        raise ValueError(f"key 'media': {media:.60} cannot be looked up ({error!r:.80})") from None
    if not path.is_relative_to(root):  # also when a link, or an absolute path, leads out
        raise ValueError(f"key 'media': {media} lies outside {root}; keep the media in the folder of the file")
    if not there:
        raise ValueError(f"{path}: no such file, named by the key 'media'")
    record = Record(
        id=values["id"],
        question=values["question"],
        chosen=values["chosen"],
        rejected=values.get("rejected"),
        harmful=values["harmful"],
        scenario=values.get("scenario", "unspecified"),
        source=where,
    )
    return MediaRecord(record.with_concept(concept_from_columns(record.question, values)), media, path)
