"""The synthesis says from its first steps on what it does, and how long it takes only when that can be known."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from callbacks import progress
from callbacks.synthesis_progress import SynthesisProgress, steps_left
from datamodules.synthesis_ticks import SynthesisDataModule
from lightning_modules.embedding_optimizer import EmbeddingOptimizer, Slot
from stages.trainers import quieten
from tests.micro import jobs, micro


def test_steps_and_loss_are_told_before_anything_is_finished(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "FIRST", 0.0)
    quieten()
    mllm = micro()
    module = EmbeddingOptimizer(mllm, jobs(mllm, 3), slots=4, max_steps=4, retries=0, margin=50.0)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SynthesisProgress("synthesize", before=2, total=5)],
    )  # fmt: skip
    trainer.fit(module, SynthesisDataModule(lambda: module.busy))
    lines = [line for line in caplog.messages if line.startswith("synthesize")]
    assert lines[0] == "synthesize: begins at 2/5 embeddings"
    assert re.fullmatch(r"synthesize: 2/5 embeddings, step=1 loss=\d+\.\d+", lines[1])
    assert lines[-1].startswith("synthesize: 5/5 embeddings in 0:0")


def state(finished: int, finished_steps: int, waiting: int, ages: list[int]) -> tuple[Any, Any]:
    table = [Slot(job=None) if age else None for age in ages]  # type: ignore[arg-type]
    module = SimpleNamespace(finished=finished, finished_steps=finished_steps, queue=[None] * waiting, table=table)
    return module, SimpleNamespace(ages=ages)


def test_the_end_is_foreseen_from_what_finished_embeddings_took() -> None:
    # Eight at a time; 10 waiting ones of 40 steps each, and 8 that have 30 of their 40 to go.
    assert steps_left(*state(8, 320, 10, [10] * 8)) == pytest.approx((10 * 40 + 8 * 30) / 8)


@pytest.mark.parametrize(("finished", "ages"), [(0, [5] * 8), (1, [5] * 8), (7, [5] * 8), (100, [90, 60, *[0] * 6])])
def test_no_end_is_foretold_from_the_quickest_alone_nor_for_the_slowest(finished: int, ages: list[int]) -> None:
    assert steps_left(*state(finished, 40 * finished, 0, ages)) is None
