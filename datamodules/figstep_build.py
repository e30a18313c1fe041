"""FigStep's typographic images (arXiv 2311.05608) from the instructions of its `safebench.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Build
from datamodules.benchmark_build import Item, Made
from datamodules.benchmark_prompts import csv_rows, integer
from datamodules.typography import figstep_image


def figstep_items(source: Path, build: Build) -> list[Item]:
    """The image of every row; `build.limit`: the first so many tasks of each topic. Raises ValueError for a bad row."""
    items = []
    columns = ("dataset", "category_id", "task_id", "category_name", "instruction")
    for where, row in csv_rows(source / "safebench.csv", columns):
        topic, number = (integer(row[key], f"{where}: {key}") for key in ("category_id", "task_id"))
        if build.limit is not None and number > build.limit:
            continue
        if not row["dataset"].isalnum():  # it becomes part of a file name
            raise ValueError(f"{where}: dataset is {row['dataset']!r}, expected letters and digits")
        recipe = {"kind": "figstep", "instruction": row["instruction"], "font": build.font}
        about = {"task": "image_typo", "scenario": row["category_name"].strip(), "id": f"{topic}-{number}"}
        path = f"images/query_{row['dataset']}_{topic}_{number}_6.png"
        items.append(Item(path, recipe, about | {"text": row["instruction"]}))
    return items


def questions_file(source: Path, build: Build) -> bytes:
    """`safebench.csv` with the rows that images are made of; all of it, byte for byte, without `build.limit`."""
    path = source / "safebench.csv"
    if build.limit is None:
        return path.read_bytes()
    rows = [row for _, row in csv_rows(path, ("task_id",)) if int(row["task_id"]) <= build.limit]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def make(folder: Path, recipe: Mapping[str, Any]) -> Made:
    """The PNG file of a recipe; `cut` in the manifest counts the lines that run out of the picture."""
    image, cut = figstep_image(recipe["instruction"], recipe["font"])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Made(buffer.getvalue(), {"width": image.width, "height": image.height, "cut": cut})
