"""Words as pictures, drawn with Pillow: VA-SafetyBench's TYPO frames, FigStep's lists, MM-SafetyBench's phrases.

The font is DejaVu, which comes with matplotlib, or a file of your own. FigStep (arXiv 2311.05608, src/
generate_prompts.py) draws with FreeMono Bold of 80 px at (20, 10), 15 letters a line, black on 760 x 760 px of white;
DejaVu Sans Mono Bold has the same letter width, so on the same base lines the same words stand at the same places.
"""

from __future__ import annotations

import functools
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SANS, MONO = "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf"
MARGIN = 0.08
"""Of the picture's width and height, on each side of words in a frame."""

FIGSTEP_SIZE, FIGSTEP_FONT, FIGSTEP_LETTERS = (760, 760), 80, 15
FIGSTEP_AT, FIGSTEP_PITCH = (20, 74), 75
"""Where the first base line begins, and from one to the next (px): what FreeMono's heights come to in Pillow."""


def word_frame(text: str, size: tuple[int, int], font: str | None = None) -> np.ndarray:
    """White words on black, in the middle, as large as they fit: uint8 [H, W, 3].

    Args:
        text: a word, or a phrase, which is broken into lines between its words.
        size: width and height (px).
        font: a TrueType file; None: DejaVu Sans Bold.
    """
    image = Image.new("RGB", size, "black")
    draw = ImageDraw.Draw(image)
    lines, chosen = _fitted(draw, text, size, font_file(font, SANS))
    left, top, right, bottom = draw.multiline_textbbox((0, 0), lines, font=chosen, align="center")
    at = ((size[0] - right - left) / 2, (size[1] - bottom - top) / 2)
    draw.multiline_text(at, lines, font=chosen, fill="white", align="center")
    return np.asarray(image)


def figstep_image(instruction: str, font: str | None = None) -> tuple[Image.Image, int]:
    """FigStep's typographic image of an instruction and an empty list of three; and how many lines run out of it.

    Most instructions leave room for the list. 14 of the 500 do not: the published images cut them off, and so does
    this one.
    """
    lines = textwrap.fill(instruction.removesuffix("\n"), width=FIGSTEP_LETTERS).split("\n")
    lines += [f"{number}. " for number in (1, 2, 3)]
    image = Image.new("RGB", FIGSTEP_SIZE, "white")
    draw = ImageDraw.Draw(image)
    letters = _font(font_file(font, MONO), FIGSTEP_FONT)
    for number, line in enumerate(lines):
        draw.text(
            (FIGSTEP_AT[0], FIGSTEP_AT[1] + number * FIGSTEP_PITCH), line, font=letters, fill="black", anchor="ls"
        )
    room = (FIGSTEP_SIZE[1] - FIGSTEP_AT[1]) // FIGSTEP_PITCH + 1
    return image, max(0, len(lines) - room)


def phrase_image(phrase: str, width: int, letters: int, font: str | None = None) -> Image.Image:
    """MM-SafetyBench's typographic image: the phrase in black on white, `width` px wide, as high as its lines.

    Args:
        letters: size of the letters (px); a word that is too wide for the picture gets smaller ones.
        font: a TrueType file; None: DejaVu Sans Bold.
    """
    file, room = font_file(font, SANS), width * (1 - 2 * MARGIN)
    words = phrase.split()
    if not words:
        raise ValueError("a phrase without words has no picture")
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    while letters > 8 and max(measure.textlength(word, font=_font(file, letters)) for word in words) > room:
        letters -= 2
    chosen = _font(file, letters)
    text = _wrapped(measure, words, chosen, room)
    left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font=chosen, align="center")
    border = round(width * MARGIN / 2)
    image = Image.new("RGB", (width, round(bottom - top) + 2 * border), "white")
    at = ((width - right - left) / 2, border - top)
    ImageDraw.Draw(image).multiline_text(at, text, font=chosen, fill="black", align="center")
    return image


def font_file(font: str | None, default: str = SANS) -> str:
    """The font's file; None: `default` out of matplotlib's data. Raises ValueError if it is not there or no font."""
    if font is None:
        spec = importlib.util.find_spec("matplotlib")  # found, not imported: that takes a second
        assert spec is not None, "matplotlib is a requirement of this package"
        assert spec.submodule_search_locations, "matplotlib is a package"
        font = str(Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / default)
    try:
        _font(font, 10)
    except OSError as error:
        raise ValueError(f"build.font={font}: cannot be opened as a TrueType font ({error})") from error
    return font


@functools.lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: the same pixels whether or not Pillow was built with Raqm.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, size: tuple[int, int], font: str
) -> tuple[str, ImageFont.FreeTypeFont]:
    """The words in lines, and the font in the largest of some sizes in which they fit."""
    width, height = (side * (1 - 2 * MARGIN) for side in size)
    words = text.split()
    for pixels in range(int(size[1] / 4), 7, -2):
        chosen = _font(font, pixels)
        joined = _wrapped(draw, words, chosen, width)
        box = draw.multiline_textbbox((0, 0), joined, font=chosen)
        if box[2] - box[0] <= width and box[3] - box[1] <= height:
            return joined, chosen
    raise ValueError(f"{len(words)} words ({len(text)} letters) do not fit into {size[0]} x {size[1]} px")


def _wrapped(draw: ImageDraw.ImageDraw, words: Sequence[str], font: ImageFont.FreeTypeFont, room: float) -> str:
    """The words in lines, as many in each as `room` (px) holds, one at least."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
