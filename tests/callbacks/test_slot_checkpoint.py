"""Unfinished embeddings survive an interruption, also where the next attempt has another number of ranks."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

from callbacks.slot_checkpoint import SlotCheckpoint, forget_slots, gather_slots
from datamodules.control_samples import SynthesisJob
from datamodules.synthesis_ticks import SynthesisDataModule
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from mllm.loading import MLLM
from stages.trainers import quieten
from tests.micro import jobs, micro


def fit(mllm: MLLM, waiting: list[SynthesisJob], folder: Path, steps: int = -1) -> EmbeddingOptimizer:
    """Up to 8 steps an embedding, `steps` in all, with a checkpoint every second one."""
    quieten()
    module = EmbeddingOptimizer(mllm, waiting, slots=4, max_steps=8, retries=0, margin=50.0)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[SlotCheckpoint(folder, 2)],
    )  # fmt: skip
    trainer.fit(module, SynthesisDataModule(lambda: module.busy))
    return module


def test_the_slots_of_two_ranks_are_continued_by_one(tmp_path: Path) -> None:
    mllm = micro()
    waiting = jobs(mllm, 4)
    (tmp_path / "whole").mkdir()
    whole = {o.job.id: o for o in fit(mllm, waiting, tmp_path / "whole").outbox}
    fit(mllm, waiting[1::2], tmp_path, steps=2)
    (tmp_path / "slots-0.safetensors").rename(tmp_path / "slots-1.safetensors")
    fit(mllm, waiting[0::2], tmp_path, steps=6)
    gather_slots(tmp_path, [job.id for job in waiting])
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["slots.safetensors"]
    module = fit(mllm, waiting, tmp_path)
    # The younger two have had two of their eight updates; one more forward finds them out of steps.
    assert module.trainer.global_step == 7
    for outcome in module.outbox:
        assert outcome.steps == 8
        assert outcome.loss == pytest.approx(whole[outcome.job.id].loss, rel=1e-3)


def test_of_two_states_of_an_embedding_the_older_is_kept_and_finished_ones_are_dropped(tmp_path: Path) -> None:
    mllm = micro()
    waiting = jobs(mllm, 2)
    fit(mllm, waiting, tmp_path, steps=2)
    gather_slots(tmp_path, [job.id for job in waiting])
    fit(mllm, waiting, tmp_path, steps=4)  # goes on from there: six steps each
    gather_slots(tmp_path, [waiting[0].id])
    module = fit(mllm, waiting[:1], tmp_path)
    assert module.trainer.global_step == 3  # two more, and the forward that ends it
    gather_slots(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named_and_the_end_of_the_stage_forgets_all(tmp_path: Path) -> None:
    mllm = micro()
    fit(mllm, jobs(mllm, 2), tmp_path, steps=2)
    path = tmp_path / "slots-0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"slots-0\.safetensors: damaged .*delete it"):
        gather_slots(tmp_path, ["x"])
    forget_slots(tmp_path)
    assert not path.exists()
