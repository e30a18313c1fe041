"""Prints one record of a finished run at every stage of its way.

python scripts/show_sample.py runs/sea_image/NAME [--id micro-...]    # one record, as far as the run has come
python scripts/show_sample.py runs/sea_image/NAME --answers           # what the model says about every embedding
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from configs.schema import Config
from datamodules.alignment import examples
from datamodules.control_samples import control_samples
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import Record, read_records
from stages.replays import FILE, read_replays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--id", help="record id; default the first harmful one")
    parser.add_argument("--variant", default="sea_sft", help="aligned variant whose examples and answers are shown")
    parser.add_argument("--answers", action="store_true", help="one line for each embedding: phrase, steps, answer")
    args = parser.parse_args()
    try:
        cfg, records = opened(args.run)
        if args.answers:
            show_answers(cfg, args.run, records)
        else:
            show_record(cfg, args.run, records, args.id, args.variant)
    except ValueError as error:
        sys.exit(f"error: {error}")


def opened(run: Path) -> tuple[Config, list[Record]]:
    """Configuration and records of a run.

    Raises:
        ValueError: it is no run, or no concepts were made yet.
    """
    concepts = run / "synthesize" / "concepts.jsonl"
    for path in (run / "config.yaml", concepts):
        if not path.is_file():
            raise ValueError(f"{path} is not there; expected the directory of a run with the stage `synthesize`")
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run / "config.yaml")))
    return cast(Config, cfg), read_records(concepts)


def store_of(cfg: Config, run: Path) -> EmbeddingStore:
    return EmbeddingStore.open(Path(cfg.store.path or run / "synthesize" / "store"))


def show_answers(cfg: Config, run: Path, records: Sequence[Record]) -> None:
    with store_of(cfg, run) as store:
        done = {id: store.meta(id) for id in store.ids()}
    for record in records:
        assert record.concept is not None
        if (meta := done.get(record.id)) is None:
            print(f"{record.concept.phrase}\n  no embedding")
        else:
            seen = {True: "verified", False: "not verified", None: "not asked"}[meta.verified]
            print(f"{record.concept.phrase}\n  {meta.status}, {meta.steps} steps, {seen}: {meta.answer}")


def show(title: str, value: object) -> None:
    print(f"\n{title}\n  " + (json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value))


def show_record(cfg: Config, run: Path, records: Sequence[Record], id: str | None, variant: str) -> None:
    record = next((r for r in records if (r.id == id if id else r.harmful)), None)
    if record is None or record.concept is None:
        raise ValueError(f"--id {id}: no such record in {run / 'synthesize' / 'concepts.jsonl'}")
    if variant not in cfg.variants:
        raise ValueError(f"--variant {variant}: expected one of {', '.join(cfg.variants)}")
    prompts, modality = cfg.model.prompts, cfg.model.modality
    whole = asdict(record)
    show("record", {k: whole[k] for k in ("id", "question", "chosen", "rejected", "harmful", "scenario")})
    show("concept", whole["concept"])
    samples = control_samples(record.concept, record.id, prompts, modality, cfg.seed)
    show("control sample, content", asdict(samples.content))
    show("control sample, style", asdict(samples.style))
    with store_of(cfg, run) as store:
        if record.id not in store:
            show("embedding store", "not made yet")
            return
        stored = store.get(record.id)
    meta = stored.meta
    shapes = {path: list(e.shape) for path, e in (stored.E or {}).items()}
    loss = round(meta.loss or 0.0, 4)
    made = {"E": shapes, "status": meta.status, "steps": meta.steps, "loss": loss, "style": meta.style}
    show("embedding store", made)
    asked = prompts.verify_activity if record.concept.kind == "activity" else prompts.verify_product
    show("verification", {"asked": asked.format(modality=modality), "answer": meta.answer, "verified": meta.verified})
    mixture = cfg.variants[variant].mixture
    replays = read_replays(run / "align" / variant / FILE)
    if replays is None:
        mixture = replace(mixture, replay=0.0)  # what the model answered is known once the variant was trained
    for e in examples([record], {record.id}, mixture, prompts, modality, cfg.align.refusal, cfg.seed, replays):
        lesson = {"question": e.question, "chosen": e.chosen, "rejected": e.rejected, "E": e.embedding}
        show(f"alignment example, {e.part}", lesson)
    for answered_by in ("base", variant):
        show_answer(run, record.scenario, answered_by)


def show_answer(run: Path, scenario: str, variant: str) -> None:
    """What a variant answers to the scenario's first held-out harmful image; nothing where it was not evaluated."""
    path = run / "evaluate" / "generations" / f"{variant}.jsonl"
    if not path.is_file():
        return
    wanted = {"scenario": scenario, "task": "image_prefixed", "request": "harmful"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next((r for r in rows if wanted.items() <= r.items()), None)
    if row is None:
        return
    judged = [json.loads(line) for line in (run / "evaluate" / "judgements.jsonl").read_text().splitlines()]
    hash = answer_hash(row["answer"])
    verdict = next((j["verdict"] for j in judged if j["id"] == row["id"] and j["answer_hash"] == hash), None)
    told = {"prompt": row["prompt"], "answer": row["answer"], "verdict": verdict}
    show(f"held-out image of the same scenario, {variant}", told)


def answer_hash(answer: str) -> str:
    from evaluation.rows import GenerationRow

    return GenerationRow("", "", "", "", "harmful", "", answer, None, "").answer_hash


if __name__ == "__main__":
    main()
