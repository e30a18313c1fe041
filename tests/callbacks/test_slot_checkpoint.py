"""Unfinished embeddings survive an interruption, also where the next attempt has another number of ranks."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from callbacks.slot_checkpoint import SlotCheckpoint, Slots, exact_slots, forget_slots, gather_slots
from datamodules.control_samples import SynthesisJob
from datamodules.synthesis_ticks import SynthesisDataModule
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from mllm.loading import MLLM
from stages.trainers import quieten
from tests.micro import jobs, micro


def fit(
    mllm: MLLM,
    waiting: list[SynthesisJob],
    folder: Path,
    steps: int = -1,
    max_steps: int = 8,
    exact: Slots | None = None,
) -> EmbeddingOptimizer:
    """Up to `max_steps` an embedding, `steps` in all, with a checkpoint every second one."""
    quieten()
    width = None if exact is None else exact.width
    module = EmbeddingOptimizer(mllm, waiting, slots=4, max_steps=max_steps, retries=0, margin=50.0, width=width)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[SlotCheckpoint(folder, 2, exact)],
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


def test_one_process_goes_on_to_the_bit_also_beside_embeddings_that_are_stored_by_now(tmp_path: Path) -> None:
    mllm = micro()
    waiting = jobs(mllm, 8)  # in four slots
    (tmp_path / "whole").mkdir()
    whole = fit(mllm, waiting, tmp_path / "whole", max_steps=5)
    broken = fit(mllm, waiting, tmp_path, steps=9, max_steps=5)  # the last checkpoint is of step 8
    stored = {o.job.id for o in broken.outbox}
    assert len(stored) == 4
    missing = [job.id for job in waiting if job.id not in stored]
    gather_slots(tmp_path, missing)
    exact = exact_slots(tmp_path, missing, {job.id for job in waiting})
    assert exact is not None
    assert exact.finished == 4
    assert exact.ids == missing
    resumed = fit(mllm, [job for job in waiting if job.id in exact.ids], tmp_path, max_steps=5, exact=exact)
    assert resumed.loss_by_age == whole.loss_by_age
    assert resumed.finished == 8
    mine, theirs = ({o.job.id: o for o in m.outbox} for m in (resumed, whole))
    assert set(mine) == set(missing)
    for id, outcome in mine.items():
        assert (outcome.loss, outcome.steps) == (theirs[id].loss, theirs[id].steps)
        assert all(torch.equal(outcome.E[path], theirs[id].E[path]) for path in outcome.E)


def test_what_several_left_or_other_embeddings_are_missing_is_not_gone_on_with_to_the_bit(tmp_path: Path) -> None:
    mllm = micro()
    waiting = jobs(mllm, 3)
    fit(mllm, waiting[:2], tmp_path, steps=2)
    ids = [job.id for job in waiting]
    gather_slots(tmp_path, ids[:2])
    assert exact_slots(tmp_path, ids[:2], ids) is not None
    assert exact_slots(tmp_path, ids, ids) is None  # one that was not in its queue
    assert exact_slots(tmp_path, ids[:1], ids[:1]) is None  # one that nobody knows any more
    (tmp_path / "slots.safetensors").rename(tmp_path / "slots-1.safetensors")
    gather_slots(tmp_path, ids[:2])
    assert exact_slots(tmp_path, ids[:2], ids) is None  # of several ranks


def test_a_damaged_file_is_named_and_the_end_of_the_stage_forgets_all(tmp_path: Path) -> None:
    mllm = micro()
    fit(mllm, jobs(mllm, 2), tmp_path, steps=2)
    path = tmp_path / "slots-0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"slots-0\.safetensors: damaged .*delete it"):
        gather_slots(tmp_path, ["x"])
    forget_slots(tmp_path)
    assert not path.exists()
