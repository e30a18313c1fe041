"""The builder: nothing is made twice, nothing is lost by kill -9, and what is damaged is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from datamodules import va_media
from datamodules.benchmark_build import BenchmarkFolder, Item, Made, check_row, read_manifest, totals
from tests.conftest import ROOT

TYPO = {"kind": "typo", "size": [64, 48], "fps": 8, "word_seconds": 0.5, "font": None}
SPEECH = {
    "kind": "speech", "engine": "espeak", "voice": "en-us", "speed": 160, "pitch": 50, "sample_rate": 16000,
}  # fmt: skip


def items(n: int, phrase: str = "a kite") -> list[Item]:
    about = {"task": "typo", "scenario": "s"}
    return [Item(f"Video/{i}.mp4", {**TYPO, "phrase": f"{phrase} {i}"}, {**about, "id": str(i)}) for i in range(n)]


def sleepy(folder: Path, recipe: Mapping[str, Any]) -> Made:
    time.sleep(0.05)
    return Made(b"made", {})


def test_every_file_is_in_the_manifest_and_decodes_to_what_it_says(tmp_path: Path) -> None:
    folder = BenchmarkFolder(tmp_path)
    rows = folder.make(items(3), va_media.make)
    assert [r["path"] for r in rows] == ["Video/0.mp4", "Video/1.mp4", "Video/2.mp4"]
    assert {(r["frames"], r["seconds"], r["width"], r["height"]) for r in rows} == {(12, 1.5, 64, 48)}
    assert rows[0]["bytes"] == (tmp_path / "Video/0.mp4").stat().st_size
    assert folder.check() == []
    assert read_manifest(tmp_path) == folder.rows
    assert totals(rows) == {"typo": {"files": 3, "bytes": sum(r["bytes"] for r in rows), "seconds": 4.5}}


@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".flac", ".ogg"])
def test_speech_of_every_kind_of_file_is_as_long_as_the_manifest_says(tmp_path: Path, suffix: str) -> None:
    noise = {"noise_seconds": 1.0, "noise_level": 0.1, "seed": 3}
    recipes = [{**SPEECH, "suffix": suffix, "text": "fold a kite"} | extra for extra in ({}, noise)]
    made = [Item(f"{i}{suffix}", r, {"task": "kpt", "scenario": "s", "id": str(i)}) for i, r in enumerate(recipes)]
    folder = BenchmarkFolder(tmp_path)
    plain, noisy = folder.make(made, va_media.make)
    assert noisy["seconds"] == pytest.approx(plain["seconds"] + 1)
    assert 0.4 < plain["seconds"] < 2
    assert folder.check() == []


def test_two_processes_make_the_same_bytes_as_one(tmp_path: Path) -> None:
    one = BenchmarkFolder(tmp_path / "one").make(items(5), va_media.make)
    two = BenchmarkFolder(tmp_path / "two", workers=2).make(items(5), va_media.make)
    assert one == two
    assert BenchmarkFolder(tmp_path / "two", workers=2).check() == []


def test_what_is_there_is_not_made_again_and_what_changed_is(tmp_path: Path) -> None:
    BenchmarkFolder(tmp_path).make(items(4), va_media.make)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "Video").iterdir()}
    (tmp_path / "Video/1.mp4").unlink()
    (tmp_path / "Video/2.mp4").write_bytes(b"cut")
    changed = [*items(3), items(4, "another")[3]]
    BenchmarkFolder(tmp_path).make(changed, va_media.make)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "Video").iterdir()}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["1.mp4", "2.mp4", "3.mp4"]
    assert BenchmarkFolder(tmp_path).check() == []


def test_a_failure_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    folder, wrong = BenchmarkFolder(tmp_path, workers=2), items(3)
    wrong[1] = Item("Video/1.mp4", {**TYPO, "phrase": "x" * 300}, wrong[1].about)
    with pytest.raises(
        ValueError, match=r"1 of 3 files could not be made, the first: Video/1\.mp4: 1 words .*do not fit"
    ):
        folder.make(wrong, va_media.make)
    assert sorted(read_manifest(tmp_path)) == ["Video/0.mp4", "Video/2.mp4"]
    assert len(BenchmarkFolder(tmp_path).make(items(3), va_media.make)) == 3


def test_a_path_never_leaves_the_folder(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leaves the folder"):
        BenchmarkFolder(tmp_path / "a").make([Item("../x.mp4", {}, {})], va_media.make)


def test_damage_is_found(tmp_path: Path) -> None:
    folder = BenchmarkFolder(tmp_path)
    rows = folder.make(items(4), va_media.make)
    data = bytearray((tmp_path / "Video/0.mp4").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "Video/0.mp4").write_bytes(data)
    (tmp_path / "Video/1.mp4").unlink()
    wrong = folder.check()
    assert len(wrong) == 2
    assert "0.mp4: is not what was made" in wrong[0]
    assert "1.mp4: No such file" in wrong[1]
    assert "frames is 12, the manifest says 13" in str(check_row(tmp_path, rows[2] | {"frames": 13}))
    assert "seconds is 1.5, the manifest says 1.6" in str(check_row(tmp_path, rows[3] | {"seconds": 1.6}))


PROGRAM = """
from pathlib import Path
from datamodules.benchmark_build import BenchmarkFolder, Item
from tests.datamodules.test_benchmark_build import sleepy
if __name__ == "__main__":
    items = [Item(f"{i}.bin", {"i": i}, {}) for i in range(400)]
    BenchmarkFolder(Path(__import__("sys").argv[1]), workers=2).make(items, sleepy)
"""


def test_after_kill_9_nothing_is_made_twice_and_no_process_is_left(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(program), str(out)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    manifest, end = out / "manifest.jsonl", time.monotonic() + 120
    while not (manifest.is_file() and manifest.read_text().count("\n") >= 5):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    done = read_manifest(out)
    assert 5 <= len(done) < 400
    rows = BenchmarkFolder(out).make([Item(f"{i}.bin", {"i": i}, {}) for i in range(len(done) + 3)], sleepy)
    assert len(rows) == len(done) + 3
    lines = [json.loads(line)["path"] for line in manifest.read_text().splitlines()]
    assert len(lines) == len(set(lines))
