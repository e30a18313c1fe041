"""A benchmark's media, made file by file: over several processes, resumable, with a manifest of what was made.

    folder = BenchmarkFolder(Path("out"), workers=2)
    folder.make([Item("Video/1/TYPO/0.mp4", {"kind": "typo", ...}, {"task": "typo", ...}), ...], maker)
    folder.check()                            # decodes every file again

`out/manifest.jsonl` has a row for each file: path, SHA-256, bytes, what it was made from (a hash), how long and large
it is. A file counts once its row is on the disk. What stands there already and was made from the same is not made
again, so the same command goes on after kill -9, and a changed setting makes anew only what it changes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datamodules.audio_files import AudioClip
from datamodules.durable import Journal, read_lines, write_durably
from datamodules.media_files import MediaRules, Medium, decode_medium
from datamodules.text_cache import content_key
from datamodules.video_files import VideoClip, measure_video

MANIFEST = "manifest.jsonl"
MODALITIES = {".mp4": "video", ".png": "image", ".jpg": "image", ".mp3": "audio", ".wav": "audio", ".flac": "audio"}
MODALITIES[".ogg"] = "audio"
TOLERANCE = 0.15
"""Seconds by which a decoded recording may differ from what was written: MP3 has blocks of 26 to 72 ms."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One file: where it goes (relative), what it is made from (JSON values), and what the manifest says about it."""

    path: str
    recipe: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def made_from(self) -> str:
        return content_key(self.recipe)[:16]


@dataclass(frozen=True)
class Made:
    """The bytes of a file and its measures, for the manifest."""

    data: bytes
    measures: Mapping[str, Any]


Maker = Callable[[Path, Mapping[str, Any]], Made]
"""(the folder, a recipe) -> the file. A function at the top of a module: processes find it by its name."""


class Advances(Protocol):
    def advance(self, n: int = 1) -> None: ...


Tell = Callable[[str, int, int], AbstractContextManager[Advances]]
"""(title, total, done before) -> a progress display."""


@dataclass
class BenchmarkFolder:
    """The folder that a benchmark is built in.

    Args:
        workers: processes; 1 makes everything in this one.
    """

    path: Path
    workers: int = 1
    tell: Tell | None = None
    rows: dict[str, Row] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.rows = read_manifest(self.path)

    def holds(self, item: Item) -> bool:
        """Made before, from the same, and still of the size that the manifest says."""
        row = self.rows.get(item.path)
        file = self.path / item.path
        return row is not None and row["made_from"] == item.made_from and _size(file) == row["bytes"]

    def make(self, items: Sequence[Item], maker: Maker, title: str = "build", here: bool = False) -> list[Row]:
        """Makes what is missing; returns the rows of all items, in their order.

        Args:
            here: in this process, one after another: for a maker that holds a model.

        Raises:
            ValueError: some files could not be made (all others are); tells how many, and the first with its reason.
        """
        todo = [item for item in items if not self.holds(item)]
        for item in todo:
            target = (self.path / item.path).resolve()
            assert target.is_relative_to(self.path.resolve()), f"{item.path} leaves the folder"
            target.parent.mkdir(parents=True, exist_ok=True)
        failed = []
        with self._progress(title, len(items), len(items) - len(todo)) as progress, self._journal() as journal:
            for item, outcome in self._each(partial(_make, self.path, maker), todo, 1 if here else self.workers):
                if isinstance(outcome, str):
                    failed.append(f"{item.path}: {outcome}")
                else:
                    journal.append([outcome])
                    self.rows[item.path] = outcome
                progress.advance()
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(items)} files could not be made, the first: {failed[0]}. The others are in "
                f"{self.path}; the same command makes the missing ones only"
            )
        return [self.rows[item.path] for item in items]

    def check(self, title: str = "check") -> list[str]:
        """Decodes every file of the manifest and compares hash, size and length; returns what is wrong."""
        rows = list(self.rows.values())
        wrong = []
        with self._progress(title, len(rows), 0) as progress:
            for _, outcome in self._each(partial(check_row, self.path), rows, self.workers):
                wrong += [outcome] if outcome else []
                progress.advance()
        return sorted(wrong)

    def _each(self, work: Callable[[Any], Any], things: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
        if workers <= 1 or len(things) < 2:
            for thing in things:
                yield thing, work(thing)
            return
        with _pool(min(workers, len(things))) as pool:
            running: dict[Future[Any], Any] = {pool.submit(work, thing): thing for thing in things}
            for future in as_completed(running):
                yield running[future], future.result()

    def _progress(self, title: str, total: int, done: int) -> AbstractContextManager[Advances]:
        return self.tell(title, total, done) if self.tell else nullcontext(_Silent())

    @contextmanager
    def _journal(self) -> Iterator[Journal]:
        journal = Journal(self.path / MANIFEST)
        try:
            yield journal
        finally:
            journal.close()


def read_manifest(folder: Path) -> dict[str, Row]:
    """Path -> the last row about it. Raises CorruptFileError naming the byte for a damaged file."""
    path = folder / MANIFEST
    return {row["path"]: row for _, row, _ in read_lines(path)} if path.is_file() else {}


def check_row(folder: Path, row: Row) -> str | None:
    """What is wrong with the file of a manifest's row, None if nothing is."""
    path = folder / row["path"]
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != row["sha256"] or len(data) != row["bytes"]:
        return f"{path}: is not what was made (its SHA-256 differs); delete it and build again"
    modality = MODALITIES[path.suffix]
    rules = MediaRules(modality, max_seconds=3600)
    try:
        found = measure_video(data, path, rules) if modality == "video" else measures(decode_medium(data, path, rules))
    except ValueError as error:
        return str(error)
    for key, value in found.items():
        tolerance = TOLERANCE if (key, modality) == ("seconds", "audio") else 1e-5
        if abs(value - row[key]) > tolerance:
            return f"{path}: {key} is {value}, the manifest says {row[key]}"
    return None


def measures(medium: Medium) -> dict[str, Any]:
    """What a manifest says about a medium: sizes in px, seconds, rates."""
    if isinstance(medium, VideoClip):
        frames, height, width, _ = medium.frames.shape
        return {"seconds": round(medium.seconds, 6), "frames": frames, "width": width, "height": height}
    if isinstance(medium, AudioClip):
        return {"seconds": round(medium.seconds, 6), "sample_rate": medium.sample_rate}
    if isinstance(medium, np.ndarray):
        return {"shape": list(medium.shape)}
    return {"width": medium.width, "height": medium.height}


class _Silent:
    def advance(self, n: int = 1) -> None:
        return


def _make(folder: Path, maker: Maker, item: Item) -> Row | str:
    """Makes one file; its row, or why there is none."""
    try:
        made = maker(folder, item.recipe)
    except ValueError as error:
        return str(error)
    write_durably(folder / item.path, made.data)
    about = {"path": item.path, **item.about, **made.measures, "bytes": len(made.data)}
    return {**about, "sha256": hashlib.sha256(made.data).hexdigest(), "made_from": item.made_from}


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Fresh processes (a forked one would inherit locks of torch's threads); at an error what has not begun is
    dropped."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and nobody outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def totals(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Task -> files, bytes and seconds."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        of = found.setdefault(row["task"], {"files": 0, "bytes": 0, "seconds": 0.0})
        of["files"] += 1
        of["bytes"] += row["bytes"]
        of["seconds"] = round(of["seconds"] + row.get("seconds", 0.0), 3)
    return json.loads(json.dumps(found))
