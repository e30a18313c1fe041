"""Stage `encode`: real media -> the model's own encoder M -> the same store, so that synthetic and real data mix.

Rows come from the JSONL file `real.path` (datamodules/media_records.py). An embedding's id in the store is the row's id
and a hash of the file and of how it was encoded: so a changed medium is encoded anew, and nothing is encoded twice.
Every batch is in the store before the next is encoded: an interrupted stage goes on with what is missing. `align` then
trains on both kinds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.progress import Progress
from configs.schema import Config
from datamodules.embedding_store import EmbeddingMeta, EmbeddingStore, StoredEmbedding
from datamodules.media_files import MediaRules, Medium, decode_medium, described, model_input
from datamodules.media_records import BadRow, MediaRecord, read_media_records
from datamodules.records import Record, write_records
from mllm.encode import MediaEncoder
from mllm.loading import MLLM, load
from mllm.plugins import source_hash
from stages.media import media_keys, media_rules
from stages.runs import Run, Stage, write_json
from stages.synthesize import open_store, saved_concepts
from stages.trainers import device_of

log = logging.getLogger(__name__)

RECORDS = "encode/records.jsonl"
"""Below the run directory: the records whose media are in the store, under their ids there."""


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for a row or a medium that cannot be used (names file and line) unless they are skipped."""
    if cfg.real.path is None:
        raise ValueError("real.path is not set; the stage encode reads a JSONL file of real media: real.path=FILE")
    rows_hash = hashlib.sha256(Path(cfg.real.path).read_bytes()).hexdigest()[:16]
    made_from = {
        **run.settings("model", "concepts", "store", "real", *media_keys(cfg)),
        "real.path's content": rows_hash,
    }
    made_from.pop("model.lora_targets")
    # In a run without synthetic embeddings the stage makes the store.
    mixed = cfg.store.path is None and (run.path / "synthesize" / "stage.json").is_file()
    stage = run.stage("encode", made_from, after=["synthesize"] if mixed else [])
    if stage.done:
        return
    if not run.leader:  # one forward of M for each item: splitting it would not pay
        stage.finish()
        return
    rows, bad = sound_rows(cfg, stage)
    mllm = load(cfg.model, device_of(cfg))
    with open_store(cfg, run.path, mllm) as store:
        before = len(store)
        encoded, unreadable = encode(cfg, mllm, rows, store)
        bad += unreadable
        write_json(stage.folder / "skipped.json", [dataclasses.asdict(row) for row in bad])
        if not encoded:
            raise ValueError(
                f"{cfg.real.path}: none of {len(rows) + len(bad)} rows could be encoded, see {stage.folder}"
            )
        write_records(stage.folder / "records.jsonl", encoded)
        store.verify()
        counts = {source: len(store.ids(source=source)) for source in ("synthetic", "real")}  # type: ignore[arg-type]
        log.info("the store holds %d synthetic and %d real embeddings", counts["synthetic"], counts["real"])
        stage.finish({"encoded": len(encoded), "new": len(store) - before, "skipped": len(bad), "store": counts})


def sound_rows(cfg: Config, stage: Stage) -> tuple[list[MediaRecord], list[BadRow]]:
    """The rows with their concepts; those that lack one get it from the extractor, as text records do."""
    assert cfg.real.path is not None
    rows, bad = read_media_records(cfg.real.path, cfg.real.limit)
    for row in bad:
        stop_or_warn(cfg, row)
    lacking = [row.record for row in rows if row.record.concept is None]
    if lacking:
        found = {r.id: r for r in saved_concepts(cfg, stage.folder, lambda: lacking, cfg.real.path)}
        without = [r for r in lacking if r.id not in found]
        bad += [BadRow(r.source, "no concept: give phrase and kind, or see concepts_failed.json") for r in without]
        rows = [dataclasses.replace(row, record=found.get(row.record.id, row.record)) for row in rows]
    return [row for row in rows if row.record.concept is not None], bad


def encode(
    cfg: Config, mllm: MLLM, rows: Sequence[MediaRecord], store: EmbeddingStore
) -> tuple[list[Record], list[BadRow]]:
    """Puts what is missing into the store; returns the records that are in it now and the rows that cannot be used."""
    encoder, stored, bad = MediaEncoder(mllm), [], []
    rules = media_rules(cfg, mllm, fit=cfg.real.resize)
    with Progress("encode", len(rows), "media") as progress:
        for at in range(0, len(rows), cfg.real.batch_size):
            part, began = rows[at : at + cfg.real.batch_size], time.perf_counter()
            fresh: list[tuple[MediaRecord, str, dict[str, torch.Tensor]]] = []
            for row in part:
                try:
                    data = row.path.read_bytes()
                    id = f"{row.record.id}@{content_hash(cfg, mllm, rules, data)}"
                    if id not in store:
                        fresh.append((row, id, prepare(encoder, decode_medium(data, row.path, rules), row.path)))
                    stored.append(dataclasses.replace(row.record, id=id))
                except (ValueError, OSError) as error:
                    bad.append(BadRow(row.record.source, str(error)))
                    stop_or_warn(cfg, bad[-1])
            if fresh:
                E = encoder.encode([inputs for _, _, inputs in fresh])
                seconds = (time.perf_counter() - began) / len(fresh)
                store.append(list(entries(cfg, [(row, id) for row, id, _ in fresh], E, seconds)))
            progress.advance(len(part))
    return stored, bad


def prepare(encoder: MediaEncoder, medium: Medium, path: Path) -> dict[str, torch.Tensor]:
    """The processor's tensors of one medium; raises ValueError that says how to bring it to the store's shape."""
    try:
        return encoder.prepare(model_input(medium))
    except ValueError as error:
        raise ValueError(
            f"{path} ({described(medium)}): {error}. Its embedding would not have the shape of those in the store: "
            f"{HINTS.get(encoder.mllm.spec.modality, OTHER_HINT)}"
        ) from error


HINTS = {
    "image": "set real.resize=true (every picture becomes as large as model.blank_size), or keep the processor from "
    "cutting tiles, for instance model.processor={do_image_splitting: false}",
    "video": "set real.resize=true (every frame becomes as large as the blank's), and leave media.frames and media.fps "
    "alone, so that as many frames are taken as the blank has",
    "audio": "set real.resize=true (silence is added up to the length of the blank)",
}
OTHER_HINT = "bring the array to model.blank_shape before it is saved (what its axes mean is not known here)"


def entries(
    cfg: Config, rows: Sequence[tuple[MediaRecord, str]], E: dict[str, torch.Tensor], seconds: float
) -> Iterator[StoredEmbedding]:
    """What goes into the store: row i, its id there, and E[path][i]."""
    for i, (row, id) in enumerate(rows):
        meta = EmbeddingMeta(
            harmful=row.record.harmful,
            concept=row.record.concept,
            scenario=row.record.scenario,
            model=cfg.model.path,
            revision=cfg.model.revision,
            settings_hash=id.rpartition("@")[2],
            seconds=seconds,
            source="real",
            media=row.media,
        )
        yield StoredEmbedding(id, {path: e[i] for path, e in E.items()}, meta)


def content_hash(cfg: Config, mllm: MLLM, rules: MediaRules, data: bytes) -> str:
    """Names what an embedding was made from: the file's bytes, the model, and how the file was prepared."""
    how: list[Any] = [mllm.key, cfg.model.processor, cfg.model.dtype, rules.size or False]
    if rules.modality != "image":  # a picture's hash stays what it was before there were other media
        how += [rules.frames, rules.fps, rules.sample_rate, rules.samples]
    if rules.cut_seconds is not None or cfg.model.pad_seconds is not None:
        how.append([rules.cut_seconds, cfg.model.pad_seconds])
    if cfg.model.plugin:  # it may hold the processor and the encoder
        how.append(source_hash(cfg.model.plugin))
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode() + data).hexdigest()[:16]


def stop_or_warn(cfg: Config, row: BadRow) -> None:
    """Raises ValueError for a bad row if the setting says so."""
    if cfg.real.bad_rows == "stop":
        raise ValueError(f"{row.where}: {row.reason} (real.bad_rows=skip counts such rows and goes on)")
    log.warning("%s: skipped: %s", row.where, row.reason)
