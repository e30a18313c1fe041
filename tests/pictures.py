"""Real media for tests: PNG files of the micro world's phrases, and the JSONL file that names them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules import micro_world
from datamodules.micro_images import draw


def row(phrase: micro_world.Phrase, media: str) -> dict[str, Any]:
    """A row of the file: the phrase's record under an id of its own."""
    record = micro_world.record(phrase).to_json()
    return {k: v for k, v in record.items() if k != "source"} | {"id": f"real-{phrase.id}", "media": media}


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def drawn(folder: Path, n: int) -> Path:
    """`n` pictures in folder/pictures, harmful and harmless alternating, and folder/rows.jsonl."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    pools = [micro_world.phrases("train", flag) for flag in (True, False)]
    for i in range(n):
        phrase = pools[i % 2][-1 - i // 2]
        draw(phrase.words, "bright", rng, test=False).save(folder / "pictures" / f"{i}.png")
        rows.append(row(phrase, f"pictures/{i}.png"))
    return write_rows(folder, rows)
