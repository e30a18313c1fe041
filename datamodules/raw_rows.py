"""Rows of JSON lines, CSV files and Hugging Face data sets, each with the place it came from.

A row that cannot be read is a `Row` with `error`, so that the caller decides whether that stops the run. A file that
cannot be read at all is a `ValueError` that names it. Data sets never run code of their own: `datasets` 4 and later
refuse loading scripts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datamodules.records import suggest

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
DATA_FILES = (*SUFFIXES, ".json", ".json.gz", ".jsonl.zst", ".parquet", ".arrow", ".tsv", ".tar", ".zip")
"""What a folder must hold something of, to be that of a data set."""
MOST_ENTRIES = 10_000
"""Files and folders in a data set's folder; with more it is something else, a home or a checkout."""


@dataclass(frozen=True)
class Row:
    """One row: `where` ("file:line", or "data set[split]:row") and either its `values` by column or an `error`."""

    where: str
    values: Mapping[str, Any]
    error: str | None = None


def read_rows(path: str, subset: str | None = None, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file (`SUFFIXES`), of a data set's folder, or of a data set on the hub (owner/name).

    Args:
        subset, split, revision: of a data set; a file has none of them.

    Raises:
        ValueError: nothing is there, or the file as a whole cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        yield from _dataset_rows(path, subset, split, None)
    elif path.endswith(SUFFIXES):
        if not place.is_file():
            near = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
            raise ValueError(f"{path}: no such file.{suggest(path, near)}")
        reader = _json_rows if ".jsonl" in place.name else _csv_rows
        try:
            yield from reader(place)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    elif place.exists():
        raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, or the folder of a data set")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        yield from _dataset_rows(path, subset, split, revision)
    else:
        raise ValueError(f"{path}: no such file or folder, and no data set id (owner/name) either")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # also a number of thousands of digits, brackets without end
                yield Row(where, {}, f"not a line of JSON ({_brief(error)})")
                continue
            if isinstance(values, dict):
                yield Row(where, values)
            else:
                yield Row(where, {}, f"got a {type(values).__name__}, expected an object with one key for each column")


def _csv_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({_brief(error)}); convert it first") from None
    # Not splitlines(): to it a line separator or form feed inside a cell would end the row.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(where, {}, f"not a row of CSV ({error})")
            continue
        if cells is None:
            return
        if header is None:
            header = cells
        elif len(cells) == len(header):
            yield Row(where, dict(zip(header, cells, strict=True)))
        elif cells:
            yield Row(where, {}, f"got {len(cells)} cells, the header has {len(header)}")


def _dataset_rows(path: str, subset: str | None, split: str, revision: str | None) -> Iterator[Row]:
    import datasets  # half a second and many files: only where a data set is read

    if Path(path).is_dir():
        _require_data_files(Path(path))
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"no split {split!r}, it has {', '.join(data)}.{suggest(split, data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(path, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: not readable as a data set ({type(error).__name__}: {_brief(error)})") from None
    for number, values in enumerate(data):
        yield Row(f"{path}[{split}]:{number}", values)


def _require_data_files(folder: Path) -> None:
    """Before `datasets` looks: it walks the whole tree again for every naming scheme, which takes minutes in a home.

    Raises:
        ValueError: no data file is there, or too much to be the folder of one data set.
    """
    seen, found = 0, False
    for _, folders, files in os.walk(folder):  # hidden folders too: `datasets` goes through them as well
        seen += len(folders) + len(files)
        found = found or any(name.endswith(DATA_FILES) for name in files)
        if seen > MOST_ENTRIES:
            raise ValueError(
                f"{folder}: holds more than {MOST_ENTRIES} files; name one file, or a data set's own folder"
            )
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{folder}: not readable as a data set (no data in this folder, it holds {there}); name a file "
            f"({', '.join(SUFFIXES)}) or another folder"
        )


def _brief(error: Exception) -> str:
    """The first line of an error, without the data it may quote."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error).split("\n")[0][:200]
