"""Rows of real media: what is read, what is refused and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.media_files import MediaRules, decode_medium
from datamodules.media_records import read_media_records

ROW: dict[str, Any] = {
    "id": "a",
    "media": "pics/a.png",
    "question": "How do I fold a kite?",
    "chosen": "Fold it twice.",
    "harmful": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "pics").mkdir(parents=True)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(root / "pics" / "a.png")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "outside.png")
    return root


def read(folder: Path, *rows: dict[str, Any] | str, limit: int | None = None):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return read_media_records(str(folder / "rows.jsonl"), limit)


def test_a_row_becomes_a_record_with_its_medium(folder: Path) -> None:
    concept = {"phrase": "fold a kite", "kind": "activity"}
    ((first, second), bad) = read(folder, ROW | concept, ROW | {"id": "b", "rejected": "No.", "scenario": "s"})
    assert not bad
    assert (first.media, first.path) == ("pics/a.png", folder / "pics" / "a.png")
    assert first.record.concept is not None
    assert first.record.concept.instruction == "How do I do this activity?"  # made by rule, as for text data
    assert first.record.source.endswith("rows.jsonl:1")
    assert (second.record.concept, second.record.rejected, second.record.scenario) == (None, "No.", "s")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"media": "pics/none.png"}, "pics/none.png: no such file"),
        ({"media": "../outside.png"}, "lies outside"),
        ({"media": "pics/link.png"}, "lies outside"),
        ({"media": "{outside}"}, "lies outside"),
        ({"media": 3}, "key 'media': got 3"),
        ({"media": "x" * 5000}, "cannot be looked up"),
        ({"media": "pics/circle.png"}, "circle.png"),
        ({"harmful": "no"}, "key 'harmful': got 'no'"),
        ({"question": " "}, "key 'question'"),
        ({"medium": "x"}, "key 'medium' is unknown"),
        ({"phrase": "fold a kite"}, "key 'kind': missing"),
    ],
)
def test_a_bad_row_is_kept_apart_with_its_line_and_reason(folder: Path, change: dict[str, Any], reason: str) -> None:
    outside = folder.parent / "outside.png"
    (folder / "pics" / "link.png").symlink_to(outside)
    (folder / "pics" / "circle.png").symlink_to("circle.png")
    change = {k: v.format(outside=outside) if isinstance(v, str) else v for k, v in change.items()}
    found, (bad,) = read(folder, ROW | {"id": "good"}, ROW | change)
    assert [m.record.id for m in found] == ["good"]
    assert bad.where.endswith("rows.jsonl:2")
    assert reason in bad.reason


def test_broken_lines_missing_keys_and_repeated_ids_are_bad_rows(folder: Path) -> None:
    lacking = {k: v for k, v in ROW.items() if k not in ("chosen", "harmful")}
    found, bad = read(folder, ROW, '{"id": ', lacking, ROW)
    assert len(found) == 1
    assert [b.where.rpartition(":")[2] for b in bad] == ["2", "3", "4"]
    assert "not a line of JSON" in bad[0].reason
    assert "key 'chosen', 'harmful' are missing" in bad[1].reason
    assert "occurs a second time" in bad[2].reason


def test_limit_takes_the_first_sound_rows(folder: Path) -> None:
    found, bad = read(folder, "x", ROW, ROW | {"id": "b"}, ROW | {"id": "c"}, "x", limit=2)
    assert ([m.record.id for m in found], len(bad)) == (["a", "b"], 1)


def test_a_file_without_rows_or_of_another_kind_is_named(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("\n")
    for name, reason in (("empty.jsonl", "no rows"), ("pics", "expected a .jsonl"), ("none.jsonl", "no such file")):
        with pytest.raises(ValueError, match=rf"{name}: {reason}"):
            read_media_records(str(folder / name))


def test_an_image_is_opened_upright_and_a_damaged_one_is_named(folder: Path) -> None:
    image = Image.new("RGBA", (6, 4), (1, 2, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    image.save(folder / "turned.png", exif=exif)
    data = (folder / "turned.png").read_bytes()
    opened = decode_medium(data, folder / "turned.png", MediaRules("image"))
    assert (opened.mode, opened.size) == ("RGB", (4, 6))
    header = data[:12] + b"JUNK" + data[16:]  # PIL has a ValueError for it
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    for damaged in (data[: len(data) // 2], data[:20], header, eps, b"", b"no image"):
        with pytest.raises(ValueError, match=r"turned\.png: cannot be read as an image"):
            decode_medium(damaged, folder / "turned.png", MediaRules("image"))
