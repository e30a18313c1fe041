"""What the unaligned model answers about each embedding: lessons that keep an aligner from drifting.

The leader asks once and writes `align/<variant>/replays.jsonl`, a line for each answer, so that a resumed run trains on
the same lessons; the other ranks wait for the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from callbacks.progress import Progress
from configs.schema import Config
from datamodules.alignment import Replays
from datamodules.durable import read_lines, write_durably
from datamodules.embedding_store import EmbeddingStore
from mllm.generate import answer_embedded
from mllm.loading import MLLM
from stages.ranks import wait_for
from stages.runs import Run, Stage

FILE = "replays.jsonl"


def replayed(cfg: Config, run: Run, stage: Stage, mllm: MLLM, store: EmbeddingStore, ids: Sequence[str]) -> Replays:
    """(question, answer) pairs for each embedding, in the order of `model.prompts.replay`; empty answers left out."""
    path = stage.folder / FILE
    if not run.leader:
        return wait_for(lambda: read_replays(path), "the answers to replay")
    if (known := read_replays(path)) is not None:
        return known
    found: dict[str, list[tuple[str, str]]] = {id: [] for id in ids}
    questions = [q.format(modality=cfg.model.modality) for q in cfg.model.prompts.replay]
    size = cfg.evaluate.batch_size
    with Progress("replay", len(ids) * len(questions), "answers") as progress:
        for question in questions:
            for at in range(0, len(ids), size):
                part = ids[at : at + size]
                E = {at_path: e.flatten(0, 1).to(mllm.model.device) for at_path, e in store.batch(part).items()}
                said = answer_embedded(mllm, [question] * len(part), E, cfg.synthesis.verify_max_new_tokens)
                for id, answer in zip(part, said, strict=True):
                    if answer.strip():
                        found[id].append((question, answer))
                progress.advance(len(part))
    lines = [{"id": id, "question": q, "answer": a} for id, pairs in found.items() for q, a in pairs]
    write_durably(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return found


def read_replays(path: Path) -> Replays | None:
    """The written answers by embedding; None where the file is not there (it appears whole or not at all)."""
    if not path.is_file():
        return None
    found: dict[str, list[tuple[str, str]]] = {}
    for _, row, _ in read_lines(path):
        found.setdefault(row["id"], []).append((row["question"], row["answer"]))
    return found
