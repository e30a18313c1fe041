"""MM-SafetyBench's images from its questions: what each is made of, and how (arXiv 2311.17600, section 3).

TYPO: the key phrase, black on white. SD: a picture of it by a text-to-image pipeline (mllm/diffusion.py makes it).
SD_TYPO: the picture, and below it the phrase, as wide as the picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.schema import Build
from datamodules.benchmark_build import Item, Made, Row
from datamodules.media_files import MediaRules, open_medium
from datamodules.mm_safetybench import TASKS, Question, image_path
from datamodules.typography import phrase_image

KEY_PHRASE = "Key Phrase"
QUALITY = 95  # of the JPEG files


def typo_items(questions: Sequence[Question], build: Build) -> list[Item]:
    """Raises ValueError for a question without a key phrase (names file and entry)."""
    how = {"kind": "typo", "width": build.size[0], "letters": build.letters, "font": build.font}
    return [_item("typo", q, {**how, "phrase": q.text(KEY_PHRASE)}) for q in questions]


def sd_item(question: Question, recipe: Mapping[str, Any]) -> Item:
    """The item of a picture that a pipeline makes; `recipe`: what it depends on."""
    return _item("sd", question, {"kind": "sd", **recipe})


def sd_typo_items(questions: Sequence[Question], pictures: Sequence[Row], build: Build) -> list[Item]:
    """Args: pictures: the manifest's rows of the SD images, one for each question."""
    typo = typo_items(questions, build)
    return [
        _item("sd_typo", q, {**t.recipe, "kind": "sd_typo", "picture": row["path"], "sha256": row["sha256"]})
        for q, t, row in zip(questions, typo, pictures, strict=True)
    ]


def make(folder: Path, recipe: Mapping[str, Any]) -> Made:
    """The JPEG file of a TYPO or SD_TYPO recipe. Raises ValueError if the picture cannot be read."""
    words = phrase_image(recipe["phrase"], recipe["width"], recipe["letters"], recipe["font"])
    if recipe["kind"] == "typo":
        return jpeg(words)
    picture = open_medium(folder / recipe["picture"], MediaRules("image"))
    assert isinstance(picture, Image.Image)
    both = Image.new("RGB", (words.width, picture.height + words.height), "white")
    both.paste(picture, ((words.width - picture.width) // 2, 0))
    both.paste(words, (0, picture.height))
    return jpeg(both)


def jpeg(picture: Image.Image | np.ndarray) -> Made:
    """A picture as a JPEG file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)  # a picture is encoded twice on its way to SD_TYPO
    return Made(buffer.getvalue(), {"width": image.width, "height": image.height})


def _item(task: str, question: Question, recipe: Mapping[str, Any]) -> Item:
    kind = TASKS[task].folder
    assert kind is not None, "text has no image"
    path = image_path(Path(), kind, question.scenario, question.id).as_posix()
    about = {"task": task, "scenario": question.scenario, "id": question.id, "text": question.text(KEY_PHRASE)}
    return Item(path, recipe, about)
