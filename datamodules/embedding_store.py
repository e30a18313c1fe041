"""The embedding store: every finished E on disk at once, with what is known about it.

    store/
      store.json                          format, model, shape of one embedding for each projector path, dtype
      index-<writer>.jsonl                what this writer stored, merged and marked (embedding_index.py)
      shard-<writer>-<number>.safetensors the embeddings (embedding_shards.py)

`append` writes a shard, then its journal lines, each flushed to the disk, and only then returns. So kill -9 at any
moment loses nothing that `append` has returned for; a shard without a journal line is swept away when its writer comes
back. Each process writes under a name of its own and readers read all journals: array jobs and ranks share one store.
Small shards are merged, `merge_every` of like size at a time: n appends leave about merge_every * log(n) files, and
each embedding is rewritten about log(n) times (log to the base merge_every). Opening reads the journals, never a shard.
Not for several threads at once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.durable import CorruptFileError, write_durably
from datamodules.embedding_index import HARMFUL, OK, REAL, EmbeddingIndex
from datamodules.embedding_records import EmbeddingMeta, Source, Status, StoredEmbedding, checked_values, from_line
from datamodules.embedding_shards import Shard, ShardReader, load_shard
from datamodules.embedding_writer import EmbeddingWriter

__all__ = ["EmbeddingMeta", "EmbeddingStore", "StoreMismatchError", "StoreSummary", "StoredEmbedding"]

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class StoreMismatchError(ValueError):
    """The store belongs to another model, shape or dtype than the one asked for."""


@dataclass(frozen=True)
class StoreSummary:
    """What `EmbeddingStore.verify` found. `unused_rows` are of embeddings that were replaced."""

    embeddings: int
    ok: int
    failed: int
    verified: int
    real: int
    duplicates: int
    unused_rows: int
    shards: int
    bytes: int
    writers: int


class EmbeddingStore:
    """A folder of embeddings of one model. `create_or_open` opens it for writing, `open` for reading.

    Attributes:
        model_key: model and revision that the embeddings belong to.
        shapes: of one embedding, for each projector path.
        dtype: on disk and as read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.model_key: str = header["model_key"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in header["shapes"].items()}
        self.dtype = DTYPES[header["dtype"]]
        self._index = EmbeddingIndex(path)
        self._reader = ShardReader(path)
        self._writer: EmbeddingWriter | None = None
        self._index.refresh()

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        model_key: str,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype | str = torch.float32,
        writer: str | None = None,
        merge_every: int = 64,
        shard_bytes: int = 256 << 20,
    ) -> EmbeddingStore:
        """Open for writing; the store is made if there is none.

        Args:
            path: the store's folder.
            model_key: model and revision in one string.
            shapes: of one embedding, for each projector path (= those of the blank's E0).
            dtype: on disk: float32, float16 or bfloat16.
            writer: this process's name among those that write (letters, digits, `_`, `.`), best the same again after a
                restart; None takes the first free number.
            merge_every: how many shards of like size are merged into one.
            shard_bytes: merging stops at this size.

        Raises:
            StoreMismatchError: the store is another model's, or has other shapes or another dtype.
            BusyError: another process writes under that name.
            CorruptFileError: a journal is damaged or missing.
        """
        path, dtype = Path(path), str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"store dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if not shapes:
            raise ValueError("store shapes are empty: expected the shape of one embedding for each projector path")
        if writer is not None and not re.fullmatch(r"[A-Za-z0-9_.]+", writer):
            raise ValueError(f"store writer {writer!r}: expected letters, digits, '_' and '.' only")
        shapes = {name: list(shape) for name, shape in shapes.items()}
        header = {"format": FORMAT, "model_key": model_key, "shapes": shapes, "dtype": dtype}
        path.mkdir(parents=True, exist_ok=True)
        # Looked for first: whoever makes the store at this moment writes store.json before its journal.
        journals = next(path.glob("index-*.jsonl"), None)
        if not (path / "store.json").exists():
            if journals:
                raise CorruptFileError(f"{path / 'store.json'} is missing beside the journals of a store; restore it")
            write_durably(path / "store.json", json.dumps(header, indent=1).encode())
        store = cls(path, _read_header(path, header))
        store._writer = EmbeddingWriter(
            path, store.shapes, store.dtype, store._index, store._reader, writer, merge_every, shard_bytes
        )
        return store

    @classmethod
    def open(cls, path: str | Path, model_key: str | None = None) -> EmbeddingStore:
        """Open for reading; nothing changes on disk. With `model_key`, it must be the store's (StoreMismatchError)."""
        return cls(Path(path), _read_header(Path(path), {} if model_key is None else {"model_key": model_key}))

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the writer's name and the open shards."""
        if self._writer is not None:
            self._writer.close()
        self._reader.close()

    # ---------------------------------------------------------------------------------------------- writing
    def append(self, entries: Sequence[StoredEmbedding]) -> None:
        """Store finished embeddings; they are on the disk when this returns. Only a failed one may be stored again.

        Raises:
            ValueError: an id is stored already, a shape is wrong, a value is not finite (also after the cast to dtype).
            DiskFullError: no room; names the file and the bytes needed, and nothing stored before is lost.
        """
        writer = self._writing()
        known: set[str] = set()
        for entry in entries:
            if entry.id in known or self._index.is_ok(entry.id):
                raise ValueError(f"{self.path}: embedding {entry.id!r} is stored already; ask `id in store` first")
            known.add(entry.id)
        writer.append(entries, [checked_values(entry, self.shapes, self.dtype) for entry in entries])

    def mark(self, id: str, *, verified: bool | None = None, answer: str | None = None, judge: str = "") -> None:
        """Note the outcome of a verification; the latest mark counts."""
        if id not in self:
            raise ValueError(f"{self.path}: no embedding {id!r} to mark")
        mark = {"op": "mark", "id": id, "time": time.time(), "verified": verified, "answer": answer, "judge": judge}
        self._writing().note([mark])

    def compact(self) -> None:
        """Merge the small shards of all writers and sweep up what crashes left; nobody else may write meanwhile.

        Raises:
            BusyError: another process writes.
        """
        self._writing().compact()

    # ---------------------------------------------------------------------------------------------- reading
    def __len__(self) -> int:
        return len(self._index.rows)

    def __contains__(self, id: object) -> bool:
        return id in self._index.rows

    def ids(
        self,
        status: Status | None = None,
        source: Source | None = None,
        harmful: bool | None = None,
        verified: bool | None = None,
    ) -> list[str]:
        """Ids in alphabetical order, whatever the number of writers. None does not filter."""
        mask = OK * (status is not None) | REAL * (source is not None) | HARMFUL * (harmful is not None)
        want = OK * (status == "ok") | REAL * (source == "real") | HARMFUL * bool(harmful)
        found = sorted(id for id, row in self._index.rows.items() if row[4] & mask == want)
        marks = self._index.marks
        return found if verified is None else [id for id in found if id in marks and marks[id].verified is verified]

    def meta(self, id: str) -> EmbeddingMeta:
        """What is known about one embedding, without its values."""
        if id not in self:
            raise ValueError(f"{self.path}: no embedding {id!r}")
        return from_line(self._index.line(id))

    def get(self, id: str) -> StoredEmbedding:
        """One embedding with everything known about it."""
        meta = self.meta(id)
        if self._index.locate(id) is None:
            return StoredEmbedding(id, None, meta)
        return StoredEmbedding(id, {path: value[0] for path, value in self.batch([id]).items()}, meta)

    def batch(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings as {path: [n, *shape]} in the store's dtype; `.flatten(0, 1)` makes of it items joined on dim 0.

        Only these rows are read, from memory-mapped files.

        Raises:
            ValueError: an id is unknown, or has no E.
            CorruptFileError: a shard is missing, truncated, or holds NaN; names it.
        """
        out = {path: torch.empty(len(ids), *shape, dtype=self.dtype) for path, shape in self.shapes.items()}
        for i, id in enumerate(ids):
            shard, file, row = self._opened(id)
            for path, values in out.items():
                values[i] = file.get_slice(path)[row : row + 1][0]
                if not torch.isfinite(values[i]).all():
                    raise CorruptFileError(
                        f"{self.path / shard.file}: embedding {id!r} holds NaN or infinity; restore the file"
                    )
        return out

    def verify(self) -> StoreSummary:
        """Check every shard: size, hash, header, ids, shapes, dtype, finite values.

        Raises:
            CorruptFileError: names the first damaged file and what is wrong with it.
        """
        index = self._index
        index.refresh()
        expected: dict[str, dict[int, str]] = {}
        for id in index.rows:
            if place := index.locate(id):
                expected.setdefault(place[0].file, {})[place[1]] = id
        live = index.live.values()
        for shard in live:
            ids, _ = load_shard(self.path, shard, self.shapes, self.dtype)
            for row, id in expected.get(shard.file, {}).items():
                if row >= len(ids) or ids[row] != id:
                    raise CorruptFileError(
                        f"{self.path / shard.file}: row {row} is not {id!r}; restore shard and journals"
                    )
        flags = [row[4] for row in index.rows.values()]
        ok = sum(flag & OK for flag in flags)
        return StoreSummary(
            embeddings=len(flags),
            ok=ok,
            failed=len(flags) - ok,
            verified=sum(mark.verified is True for mark in index.marks.values()),
            real=sum(bool(flag & REAL) for flag in flags),
            duplicates=len(index.duplicates),
            unused_rows=sum(shard.rows for shard in live) - sum(map(len, expected.values())),
            shards=len(live),
            bytes=sum(shard.bytes for shard in live),
            writers=len(index.journals),
        )

    def refresh(self) -> None:
        """Take in what other processes have stored since."""
        self._index.refresh()

    # ---------------------------------------------------------------------------------------------- helpers
    def _writing(self) -> EmbeddingWriter:
        if self._writer is None:
            raise ValueError(f"{self.path}: opened for reading; use EmbeddingStore.create_or_open to write")
        return self._writer

    def _opened(self, id: str) -> tuple[Shard, Any, int]:
        """Shard, open file and row of an embedding; follows its writer's merges."""
        for attempt in (1, 2):
            if id not in self:
                raise ValueError(f"{self.path}: no embedding {id!r}")
            place = self._index.locate(id)
            if place is None:
                raise ValueError(f"{self.path}: embedding {id!r} has no E, it failed: {self.meta(id).reason}")
            shard, row = place
            try:
                return shard, self._reader.open(shard), row
            except FileNotFoundError:
                if attempt == 2:
                    break
                self.refresh()
        raise CorruptFileError(f"{self.path / shard.file}: the shard of embedding {id!r} is missing; restore it")


def _read_header(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    file = path / "store.json"
    try:
        header = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no embedding store here; run the stage that makes it, or correct the path") from None
    except ValueError as error:
        raise CorruptFileError(f"{file}: not JSON ({error}); restore it") from error
    if missing := {"format", "model_key", "shapes", "dtype"} - header.keys():
        raise CorruptFileError(f"{file}: lacks {sorted(missing)}; restore it")
    for key, value in {"format": FORMAT, **wanted}.items():
        if header[key] != value:
            raise StoreMismatchError(
                f"{file}: {key} is {header[key]!r}, but {value!r} is asked for; E of one model means nothing to "
                "another: take another folder, or the model and settings that this store was made with"
            )
    return header
