"""Words as pictures: what is drawn, and that FigStep's layout is the published one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.typography import figstep_image, font_file, word_frame

FREE_MONO = Path("/usr/share/fonts/truetype/freefont/FreeMonoBold.ttf")


def ink(frame: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is brighter than grey."""
    rows, columns = np.where(frame.max(axis=2) > 128)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("size", [(640, 384), (64, 48)])
@pytest.mark.parametrize("text", ["kite", "a", "internationalisation", "fold a rather large paper kite in the park"])
def test_words_are_white_on_black_in_the_middle_and_inside(text: str, size: tuple[int, int]) -> None:
    if len(text) >= 20 and size[0] == 64:
        with pytest.raises(
            ValueError, match=rf"{len(text.split())} words \({len(text)} letters\) do not fit into 64 x 48"
        ):
            word_frame(text, size)
        return
    frame = word_frame(text, size)
    assert (frame.shape, frame.dtype) == ((size[1], size[0], 3), np.uint8)
    assert tuple(frame[0, 0]) == (0, 0, 0)
    assert frame.max() == 255
    left, top, right, bottom = ink(frame)
    assert abs((left + right) - (size[0] - 1)) <= 4
    assert abs((top + bottom) - (size[1] - 1)) <= 4
    assert left >= 0.07 * size[0]
    assert top >= 0.07 * size[1]


def test_other_words_are_other_pictures_and_a_longer_one_is_smaller() -> None:
    short, long = word_frame("kite", (640, 384)), word_frame("internationalisation", (640, 384))
    assert not np.array_equal(short, word_frame("cake", (640, 384)))
    assert np.array_equal(short, word_frame("kite", (640, 384)))
    height = {name: ink(f)[3] - ink(f)[1] for name, f in (("short", short), ("long", long))}
    assert height["short"] > height["long"]


def test_a_font_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"no font")
    for path in (tmp_path / "x.ttf", tmp_path / "none.ttf"):
        with pytest.raises(ValueError, match=rf"build.font={path}: cannot be opened as a TrueType font"):
            font_file(str(path))


def test_figstep_draws_the_instruction_and_an_empty_list() -> None:
    image, cut = figstep_image("Methods to fold a paper kite.")
    assert (image.size, image.mode, cut) == ((760, 760), "RGB", 0)
    dark = np.asarray(image).max(axis=2) < 128
    starts = [number for number in range(10) if dark[20 + 75 * number : 74 + 75 * number].any()]
    assert starts == [0, 1, 2, 3, 4]  # "Methods to fold", "a paper kite.", "1.", "2.", "3."
    assert not np.asarray(image)[20 + 75 * 5 + 20 :].min() < 255
    _, cut = figstep_image("Methods to " + "fold very large kites " * 8)
    assert cut > 0


def published(shared_data: Path) -> list[tuple[str, np.ndarray]]:
    """(instruction, pixels) of the published images."""
    with (shared_data / "figstep" / "safebench.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = {(r["category_id"], r["task_id"]): r["instruction"] for r in csv.DictReader(file)}
    found = []
    for path in sorted((shared_data / "figstep" / "images").glob("query_ForbidQI_*_6.png")):
        _, _, topic, number, _ = path.stem.split("_")
        found.append((rows[topic, number], np.asarray(Image.open(path).convert("RGB")).astype(int)))
    return found


@pytest.mark.skipif(not FREE_MONO.is_file(), reason="needs FreeMono Bold (Debian: fonts-freefont-ttf)")
def test_with_freemono_the_published_images_come_out(shared_data: Path) -> None:
    differences = [
        np.abs(np.asarray(figstep_image(text, str(FREE_MONO))[0]).astype(int) - pixels).mean()
        for text, pixels in published(shared_data)
    ]
    assert len(differences) == 50
    assert max(differences) < 0.001  # of 255: another rasteriser's grey in a few pixels
    assert sum(d == 0 for d in differences) >= 40


def test_with_the_default_font_the_same_words_stand_at_the_same_places(shared_data: Path) -> None:
    for text, pixels in published(shared_data)[:12]:
        ours = np.asarray(figstep_image(text)[0]).astype(int)
        for number in range(9):
            band = slice(24 + 75 * number, 74 + 75 * number)
            mine, theirs = ((image[band].min(axis=2) < 128).any(axis=0) for image in (ours, pixels))
            assert mine.any() == theirs.any(), number
            if mine.any():
                assert abs(int(np.flatnonzero(mine)[-1]) - int(np.flatnonzero(theirs)[-1])) <= 24  # half a letter
