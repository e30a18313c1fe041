"""Text safety data: from SafeRLHF, HH-RLHF, JSON lines, CSV or any Hugging Face data set to `Record`s.

    data = TextSafetyData("saferlhf", "pairs.jsonl", limit=2000, harmless_path="helpful.jsonl", harmless_limit=1000)
    data.records("train"), data.records("test"), data.report

Formats (what the rows of `path` look like, be it a file, a folder or a hub id):
    saferlhf     prompt, chosen, rejected; or PKU-SafeRLHF's prompt, response_0, response_1, is_response_0_safe,
                 is_response_1_safe, safer_response_id.
    hh_rlhf      chosen, rejected: whole dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ...".
    jsonl, csv, huggingface   our fields, or `columns` saying which column holds which.

Labels. A column `harmful` decides where there is one. Without it a pair (an answer to learn and an answer to avoid)
has a harmful question, and whatever comes from `harmless_path` a harmless one. A PKU-SafeRLHF row without a safe answer
is left out: a harmful answer is never a target. One whose answers are both safe keeps no rejected answer.

Splits are by prompt and depend on the prompt's text and the seed alone, so that more rows, or another order, move no
prompt from training to test.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, get_args

from datamodules.concepts import concept_from_columns
from datamodules.raw_rows import Row, read_rows
from datamodules.records import Record, record_id, suggest

log = logging.getLogger(__name__)

Format = Literal["saferlhf", "hh_rlhf", "jsonl", "csv", "huggingface"]
Split = Literal["train", "val", "test", "all"]

REQUIRED = ("question", "chosen")
OPTIONAL = ("rejected", "harmful", "scenario", "id", "concept", "phrase", "kind", "sentence", "instruction")


@dataclass
class ReadReport:
    """What became of the rows. `bad`: ("file:line", reason); `left_out`: reason -> count of sound rows not wanted."""

    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class MissingColumnError(ValueError):
    """A row without a column that its layout or the configuration asks for: seldom the row's own fault."""


class LeftOut(Exception):
    """A row that is well formed but not used; the message is the reason."""


class TextSafetyData:
    """Text safety data, read once, on first use.

    Args:
        format: how rows are laid out, see above.
        path: a .jsonl or .csv file (also .gz), the folder of a data set, or a data set id on the hub.
        columns: our field -> their column, where the names differ. Fields: question, chosen (required), rejected,
            harmful, scenario, id, and of a given concept phrase, kind, sentence, instruction.
        harmless_path: a second source, of harmless questions, laid out like the first.
        harmless_columns: its columns, if it is laid out differently.
        subset, split, revision: of a Hugging Face data set.
        limit, harmless_limit: at most so many harmful and harmless records in what `records` returns.
        holdout, validation: shares of the prompts that go to "test" and "val"; the rest is "train".
        seed: of the split, of what a limit keeps, and of the order.
        bad_rows: "stop" at the first row that cannot be read, or "skip" and count it (see `report`).
        repeated_prompts: keep "one" record for each prompt (chosen by its texts, not by the order), or "all".
        multi_turn: hh_rlhf dialogues of several turns: "skip", or put the whole "transcript" into the question.

    Raises:
        ValueError: an impossible setting; when reading: a missing file, an unknown column, a bad row, no record at all.
    """

    def __init__(
        self,
        format: Format,
        path: str,
        *,
        columns: Mapping[str, str] | None = None,
        harmless_path: str | None = None,
        harmless_columns: Mapping[str, str] | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        limit: int | None = None,
        harmless_limit: int | None = None,
        holdout: float = 0.1,
        validation: float = 0.0,
        seed: int = 0,
        bad_rows: Literal["stop", "skip"] = "stop",
        repeated_prompts: Literal["one", "all"] = "one",
        multi_turn: Literal["skip", "transcript"] = "skip",
    ):
        one_of("data.format", format, get_args(Format))
        one_of("data.bad_rows", bad_rows, ("stop", "skip"))
        one_of("repeated_prompts", repeated_prompts, ("one", "all"))
        one_of("multi_turn", multi_turn, ("skip", "transcript"))
        if not (holdout >= 0 and validation >= 0 and holdout + validation < 1):
            raise ValueError(
                f"holdout={holdout}, validation={validation}: expected shares that leave some for training"
            )
        for name, value in (("limit", limit), ("harmless_limit", harmless_limit)):
            if value is not None and value < 0:
                raise ValueError(f"data.{name}={value}: expected 0 or more, or null for all")
        if columns and format in ("saferlhf", "hh_rlhf"):
            raise ValueError(
                f"data.columns: format={format} has columns of its own; use jsonl, csv or huggingface to map them"
            )
        for mapping in (columns or {}, harmless_columns or {}):
            for name in mapping:
                one_of("data.columns: field", name, REQUIRED + OPTIONAL)
        self.format, self.path, self.columns = format, str(path), dict(columns or {})
        self.harmless_path, self.harmless_columns = harmless_path, dict(harmless_columns or {})
        self.subset, self.split, self.revision = subset, split, revision
        self.limit, self.harmless_limit = limit, harmless_limit
        self.holdout, self.validation, self.seed = holdout, validation, seed
        self.bad_rows, self.repeated_prompts, self.multi_turn = bad_rows, repeated_prompts, multi_turn
        self.report = ReadReport()

    def records(self, split: Split = "train") -> list[Record]:
        """The records of one split, in an order that depends on the seed and the texts alone.

        Raises:
            ValueError: the data cannot be read, or the split is empty.
        """
        one_of("split", split, get_args(Split))
        chosen: list[Record] = []
        for harmful, limit in ((True, self.limit), (False, self.harmless_limit)):
            part = [r for r in self._all if r.harmful is harmful and split in ("all", self._split_of(r.question))]
            chosen += part[:limit]
        if not chosen:
            raise ValueError(
                f"{self.path}: no record in split {split!r} (of {len(self._all)}); change data.holdout={self.holdout} "
                "or the limits"
            )
        return sorted(chosen, key=self._order)

    def glance(self, rows: int) -> None:
        """Looks at the first rows of each source.

        Raises:
            ValueError: a source cannot be read or a row is bad; where bad rows are skipped, if all lack a column.
        """
        for harmless, path in ((False, self.path), (True, self.harmless_path)):
            if path is None:
                continue
            where = () if harmless else (self.subset, self.split, self.revision)
            looked = list(islice(read_rows(path, *where), rows))
            lacking = 0
            for row in looked:
                try:
                    if row.error is not None:
                        raise ValueError(row.error)
                    self._record(row, harmless)
                except LeftOut:
                    continue
                except ValueError as error:
                    lacking += isinstance(error, MissingColumnError)
                    if self.bad_rows == "stop" or lacking == len(looked):
                        raise self._stop(row, error) from None

    @cached_property
    def _all(self) -> list[Record]:
        self.report = ReadReport()
        records: dict[str, Record] = {}
        for harmless, path in ((False, self.path), (True, self.harmless_path)):
            if path is None:
                continue
            before = len(records)
            where = () if harmless else (self.subset, self.split, self.revision)
            self._read(read_rows(path, *where), harmless, records)
            if len(records) == before:
                bad = "; the first bad row: " + ": ".join(self.report.bad[0]) if self.report.bad else ""
                rest = "".join(f"; {count} left out: {why}" for why, count in self.report.left_out.items())
                raise ValueError(f"{path}: no usable record in {self.report.rows} row(s){bad}{rest}")
        if self.report.bad:
            log.warning(
                "%s: %d bad row(s) skipped, the first: %s: %s", self.path, len(self.report.bad), *self.report.bad[0]
            )
        if self.repeated_prompts == "one":
            by_prompt: dict[str, Record] = {}
            for record in sorted(records.values(), key=lambda r: r.id):
                if by_prompt.setdefault(_prompt_key(record.question), record) is not record:
                    self.report.left_out["another record has the same prompt"] += 1
            return sorted(by_prompt.values(), key=self._order)
        return sorted(records.values(), key=self._order)

    def _read(self, rows: Iterable[Row], harmless: bool, records: dict[str, Record]) -> None:
        for row in rows:
            self.report.rows += 1
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                record = self._record(row, harmless)
                twin = records.setdefault(record.id, record)
                if twin is not record:
                    if (twin.question, twin.chosen, twin.rejected) != (record.question, record.chosen, record.rejected):
                        raise ValueError(f"key 'id': {record.id!r} also at {twin.source}, with other texts")
                    raise LeftOut("an equal row came before")
            except LeftOut as why:
                self.report.left_out[str(why)] += 1
            except ValueError as error:
                if self.bad_rows == "stop":
                    raise self._stop(row, error) from None
                self.report.bad.append((row.where, str(error)))

    def _stop(self, row: Row, error: ValueError) -> ValueError:
        hint = " (data.bad_rows=skip counts such rows and goes on)" if self.bad_rows == "stop" else ""
        return ValueError(f"{row.where}: {error}{hint}")

    def _record(self, row: Row, harmless: bool) -> Record:
        values, columns, key = row.values, self.columns, "data.columns"
        if harmless and self.harmless_columns:
            columns, key = self.harmless_columns, "data.harmless_columns"
        elif self.format == "saferlhf":
            values = _from_saferlhf(values)
        elif self.format == "hh_rlhf":
            values = from_dialogues(values, self.multi_turn)
        values = _rename(values, columns, key)
        question, chosen, rejected = values["question"], values["chosen"], values.get("rejected") or None
        for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
            if not isinstance(text, str) and not (text is None and name == "rejected"):
                raise ValueError(f"key {columns.get(name, name)!r}: got a {type(text).__name__}, expected a text")
        if "harmful" in values:
            harmful = flag(columns.get("harmful", "harmful"), values["harmful"])
        elif rejected is None and not harmless and self.format != "saferlhf":
            raise ValueError("neither a column 'harmful' nor a rejected answer says whether the question is harmful")
        else:
            harmful = not harmless
        question, chosen, rejected = question.strip(), chosen.strip(), (rejected and rejected.strip()) or None
        return Record(
            id=str(values.get("id") or record_id(question, chosen, rejected)),
            question=question,
            chosen=chosen,
            rejected=rejected,
            harmful=harmful,
            scenario=str(values.get("scenario") or "unspecified"),
            concept=concept_from_columns(question, values),
            source=row.where,
        )

    def _split_of(self, question: str) -> Split:
        return split_of(question, self.seed, self.holdout, self.validation)

    def _order(self, record: Record) -> str:
        return _hash(f"{self.seed}/order/{record.id}")


def split_of(question: str, seed: int, holdout: float, validation: float = 0.0) -> Split:
    """The split of a question: a function of its words (not of case or spacing), the seed and the shares."""
    place = int(_hash(f"{seed}/split/{_prompt_key(question)}")[:13], 16) / 16**13
    return "test" if place < holdout else "val" if place < holdout + validation else "train"


def _rename(values: Mapping[str, Any], columns: Mapping[str, str], key: str | None = None) -> dict[str, Any]:
    """The row under our names; columns that are asked for (or required) and absent are one error that suggests some.

    Args:
        key: of the configuration, by which a user maps columns; None where the format has columns of its own.
    """
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in REQUIRED + OPTIONAL:
        column = columns.get(name, name)
        if column in values:
            found[name] = values[column]
        elif name in REQUIRED or name in columns:
            missing[name] = column
    if missing:
        unmapped = " ".join(f"{key}.{name}=..." for name in missing if name not in columns)
        raise MissingColumnError(
            _no_column(list(missing.values()), values, f"; map it with {unmapped}" if unmapped and key else "")
        )
    return found


def _no_column(missing: list[str], values: Mapping[str, Any], hint: str = "") -> str:
    have = ", ".join(map(str, values)) or "none"
    near = "".join(dict.fromkeys(suggest(column, map(str, values)) for column in missing))
    return f"no column {', '.join(map(repr, missing))}, the row has {have}{hint}.{near}"


def _from_saferlhf(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if "response_0" not in values:
        return _rename(values, {"question": "prompt", "rejected": "rejected"})
    names = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id")
    if missing := [name for name in names if name not in values]:
        raise MissingColumnError(_no_column(missing, values))
    safe = [flag(name, values[name]) for name in names[3:5]]
    if not any(safe):
        raise LeftOut("both answers are unsafe")
    best = values["safer_response_id"]
    # JSON's true and 1.0 are equal to 1, but name no column.
    if type(best) is not int or best not in (0, 1) or not safe[best]:
        raise ValueError(f"key 'safer_response_id': got {best!r}, expected 0 or 1, and the answer to be safe")
    harms = values.get(f"response_{1 - best}_harm_category")
    return {
        "question": values["prompt"],
        "chosen": values[f"response_{best}"],
        "rejected": None if all(safe) else values[f"response_{1 - best}"],
        "scenario": next((name for name, on in harms.items() if on), None) if isinstance(harms, Mapping) else None,
    }


def from_dialogues(values: Mapping[str, Any], multi_turn: str) -> Mapping[str, Any]:
    """question, chosen, rejected of an HH-RLHF row. Raises ValueError, and LeftOut for dialogues of several turns."""
    pair = _rename(values, {"question": "chosen", "rejected": "rejected"})
    turns = {name: _turns(name, pair[name]) for name in ("chosen", "rejected")}
    if turns["chosen"] == turns["rejected"]:
        raise ValueError("chosen and rejected are the same dialogue")
    from trl.data_utils import extract_prompt  # a second, and `datasets` with it: only for dialogues

    parts = extract_prompt(turns)
    prompt = parts["prompt"]
    if not prompt or prompt[-1]["role"] != "user" or len(parts["chosen"]) != 1 or len(parts["rejected"]) != 1:
        raise ValueError("expected two dialogues that differ in the assistant's last turn only")
    if len(prompt) > 1 and multi_turn == "skip":
        raise LeftOut("the dialogue has more than one turn")
    names = {"user": "Human", "assistant": "Assistant"}
    transcript = "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in prompt)
    return {
        "question": prompt[0]["content"] if len(prompt) == 1 else transcript,
        "chosen": parts["chosen"][0]["content"],
        "rejected": parts["rejected"][0]["content"],
    }


def _turns(name: str, text: object) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", text) if isinstance(text, str) else [""]
    if len(parts) < 5 or parts[0].strip():
        raise ValueError(f"key {name!r}: expected a dialogue '\\n\\nHuman: ...\\n\\nAssistant: ...'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    if not all(turn["content"] for turn in turns):
        raise ValueError(f"key {name!r}: a turn of the dialogue is empty")
    return turns


def flag(name: str, value: object) -> bool:
    """A yes or no in any of its spellings. Raises ValueError naming the key."""
    words = {"true": True, "1": True, "yes": True, "harmful": True}
    words |= {"false": False, "0": False, "no": False, "harmless": False}
    flag = words.get(str(value).strip().lower())
    if flag is None:
        raise ValueError(f"key {name!r}: got {str(value)[:20]!r}, expected true/false, 1/0, yes/no or harmful/harmless")
    return flag


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raises ValueError with a suggestion unless `value` is one of the known choices."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}.{suggest(str(value), known)}")


def _prompt_key(question: str) -> str:
    return " ".join(question.casefold().split())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
