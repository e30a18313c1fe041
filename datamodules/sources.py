"""From the configuration to records: the closed world or any text safety data, then their concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Api, Concepts, Data
from datamodules import micro_world
from datamodules.concepts import Extraction, Extractor, GivenConcepts, extract_concepts
from datamodules.records import Record
from datamodules.text_safety import TextSafetyData
from mllm.smol import text_model_folder

if TYPE_CHECKING:  # the client of the endpoint takes a second to load
    from datamodules.chat_api import ChatAPI

MICRO_DEFAULT = 256
"""Harmful and harmless concepts of the micro world where no number is given."""


def safety_records(data: Data, seed: int, harmful: int | None = None, harmless: int | None = None) -> list[Record]:
    """Training records, harmful first; `harmful` and `harmless` bound their numbers, None takes all.

    Raises:
        ValueError: the data set is missing, malformed or empty; names file, line and column.
    """
    if data.format == "micro":
        counts = [MICRO_DEFAULT if n is None else n for n in (harmful, harmless)]
        if data.limit is not None:
            counts = [min(counts[0], (data.limit + 1) // 2), min(counts[1], data.limit // 2)]
        return micro_world.records("train", counts[0], counts[1], seed)
    records = text_safety_data(data, seed).records("train")
    chosen = [r for r in records if r.harmful][:harmful] + [r for r in records if not r.harmful][:harmless]
    if not chosen:
        raise ValueError(
            f"data.path={data.path}: no records left (data.limit, synthesis.harmful and synthesis.harmless bound them)"
        )
    return chosen


def text_safety_data(data: Data, seed: int) -> TextSafetyData:
    """The reader of the data set that a configuration names. Raises ValueError if it names none."""
    if data.path is None:
        raise ValueError(f"data.path: not set; data.format={data.format} reads a file, a folder or a hub id")
    return TextSafetyData(
        data.format,  # type: ignore[arg-type]
        data.path,
        columns=data.columns,
        harmless_path=data.harmless_path,
        harmless_columns=data.harmless_columns,
        subset=data.subset,
        split=data.split,
        revision=data.revision,
        limit=data.limit,
        harmless_limit=data.harmless_limit,
        holdout=data.holdout,
        seed=seed,
        bad_rows=data.bad_rows,  # type: ignore[arg-type]
    )


def with_concepts(
    records: Sequence[Record], settings: Concepts, advance: Callable[[int], None], device: str = "cpu"
) -> Extraction:
    """Records with their concepts; what yielded none is kept apart with the reason."""
    kind = settings.extractor
    if kind == "auto":
        kind = "given" if all(r.concept is not None for r in records) else "local"
    extractor: Extractor = GivenConcepts()
    if kind == "local":
        from datamodules.concept_extraction import LocalExtractor

        extractor = LocalExtractor(text_model_folder(settings.path), settings.cache_dir, device=device)
    elif kind == "api":
        from datamodules.api_extraction import APIExtractor

        extractor = APIExtractor(chat_api(settings.api, "concepts.api"))
    return extract_concepts(records, extractor, lambda done, total: advance(1))


def chat_api(settings: Api, group: str) -> ChatAPI:
    """The endpoint of a configuration, whose keys begin with `group`. Its secret is read from the environment when a
    request has to be sent."""
    from datamodules.chat_api import ChatAPI

    return ChatAPI(
        base_url=settings.base_url,
        model=settings.model,
        cache_dir=Path(settings.cache_dir).expanduser(),
        api_key_env=settings.key_env or None,
        env_setting=f"{group}.key_env",
        concurrency=settings.concurrency,
        max_retries=settings.retries,
        timeout=settings.timeout,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
    )
