"""The largest step that each stage will meet, from the data and the tokenizer alone: no model, no embedding store.

Which examples meet in a step is what the sampler draws. A text counts by its characters until the largest micro-batch
is found, and only that one is encoded. What is not there yet is stood in for: a concept that has to be extracted by the
question itself, an answer that is to be replayed by one of the allowed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from configs.schema import Config
from datamodules.alignment import AlignmentExample, MixtureSampler, encode, examples
from datamodules.control_samples import control_samples, synthesis_job
from datamodules.records import Concept, Record
from mllm.items import Item
from mllm.outline import Outline
from stages.benchmark_prompts import benchmark_prompts
from stages.memory_steps import AlignStep
from stages.synthesize import text_records

STEPS = 400
"""Steps looked at: with the usual lengths the largest of so many is as large as any."""


def records_of(cfg: Config) -> list[Record]:
    """Text records, each with a concept."""
    return [r if r.concept is not None else r.with_concept(_concept(r)) for r in text_records(cfg)]


def slots(outline: Outline, cfg: Config, records: Sequence[Record], n: int) -> list[Item]:
    """The n longest jobs side by side."""
    prompts, modality = cfg.model.prompts, cfg.model.modality

    def size(record: Record) -> int:
        assert record.concept is not None
        sample = control_samples(record.concept, record.id, prompts, modality, cfg.seed).content
        return len(sample.question + sample.answer)

    chosen = sorted(records, key=size, reverse=True)[:n]
    ids = sorted(outline.media_ids)
    return [synthesis_job(r, outline.prompts, prompts, ids, cfg.seed).item for r in chosen]


def align_step(outline: Outline, cfg: Config, name: str, records: Sequence[Record], world: int) -> AlignStep:
    """The largest micro-batches of rank 0, with and without media."""
    variant, prompts = cfg.variants[name], cfg.model.prompts
    pairs = variant.method == "dpo"
    usable = {r.id for r in records} if variant.data == "sea" else set()
    said = " ".join(["word"] * max(1, round(cfg.synthesis.verify_max_new_tokens * 0.75)))
    questions = [question.format(modality=cfg.model.modality) for question in prompts.replay]
    replays = {id: [(question, said) for question in questions] for id in usable} if variant.mixture.replay else None
    modality, refusal = cfg.model.modality, cfg.align.refusal
    data = examples(records, usable, variant.mixture, prompts, modality, refusal, cfg.seed, replays)
    sampler = MixtureSampler(data, variant.mixture, variant.batch_size, cfg.seed)
    sizes = [_size(e, pairs) for e in data]
    best: dict[bool, tuple[int, list[int]]] = {True: (0, []), False: (0, [])}
    parts = media = 0
    for step in range(min(variant.steps, STEPS)):
        drawn = sampler.step(step)[::world]
        now = 0
        for with_media in (True, False):
            chosen = [i for i in drawn if (data[i].embedding is not None) == with_media]
            media = max(media, len(chosen)) if with_media else media
            for at in range(0, len(chosen), variant.micro_batch_size):
                part = chosen[at : at + variant.micro_batch_size]
                now += 1
                cost = len(part) * (max(sizes[i] for i in part) + 4 * outline.media_tokens * with_media)
                if cost > best[with_media][0]:
                    best[with_media] = (cost, part)
        parts = max(parts, now)
    ids = sorted(outline.media_ids)
    items = {flag: [encode(data[i], outline.prompts, ids, pairs) for i in part] for flag, (_, part) in best.items()}
    return AlignStep(items[True], items[False], parts, media)


def prompt_length(outline: Outline, cfg: Config) -> tuple[int, int]:
    """(tokens of the longest prompt, number of prompts); a medium counts as the blank."""
    system = cfg.evaluate.system_prompt
    encoder = outline.prompts
    if system is not None:
        spec = replace(cfg.model, system_prompt=system)
        encoder = type(encoder)(encoder.processor, spec.modality, encoder.blank, encoder.end_ids, system)
    found = benchmark_prompts(cfg)
    longest = sorted(found, key=lambda p: (p.media is not None, len(p.text)), reverse=True)[:16]
    longest += sorted(found, key=lambda p: len(p.text), reverse=True)[:16]
    return max(len(encoder.prompt(p.text, p.media is not None)) for p in longest), len(found)


def _size(example: AlignmentExample, pairs: bool) -> int:
    """In characters; of a text four are about one token."""
    return len(example.question) + len(example.chosen) + (len(example.rejected or "") if pairs else 0)


def _concept(record: Record) -> Concept:
    """No shorter than what an extractor will find in the question."""
    return Concept(record.question, "activity", record.question, record.question)
