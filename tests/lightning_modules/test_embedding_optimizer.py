"""The slot engine on the embedded model: what it freezes, when it stops, and that slots do not interact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.metrics_file import MetricsFile, read_rows
from datamodules.control_samples import SynthesisJob
from datamodules.synthesis_ticks import SynthesisDataModule
from evaluation.phrases import words_of
from lightning_modules.embedding_optimizer import EmbeddingOptimizer, Outcome, slot_losses
from lightning_modules.slots import SlotAdam
from mllm.branches import BranchLogits
from mllm.generate import answer_embedded
from mllm.loading import MLLM
from stages.trainers import quieten
from tests.micro import config, jobs, micro

SETTINGS = {"lr": config().synthesis.lr, "betas": config().synthesis.betas, "margin": config().synthesis.margin}


def run(
    mllm: MLLM, waiting: list[SynthesisJob], steps: int = -1, precision: Any = "32-true", **settings: object
) -> EmbeddingOptimizer:
    quieten()
    module = EmbeddingOptimizer(mllm, waiting, **{**SETTINGS, **settings})
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=steps,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, SynthesisDataModule(lambda: module.busy))
    return module


@pytest.fixture(scope="module")
def optimized() -> tuple[MLLM, list[Outcome], dict[str, torch.Tensor]]:
    mllm = micro()
    before = {k: v.clone() for k, v in mllm.model.state_dict().items()}
    module = run(mllm, jobs(mllm, 6), slots=4, max_steps=200)
    return mllm, module.outbox, before


def test_everything_but_E_is_frozen(optimized: tuple[MLLM, list[Outcome], dict[str, torch.Tensor]]) -> None:
    mllm, _, before = optimized
    assert all(p.grad is None for p in mllm.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in mllm.model.state_dict().items())


def test_a_finished_embedding_makes_the_model_say_both_answers(
    optimized: tuple[MLLM, list[Outcome], dict[str, torch.Tensor]],
) -> None:
    mllm, outcomes, _ = optimized
    finished = [o for o in outcomes if o.ok]
    assert len(outcomes) == 6
    assert len(finished) >= 5
    for outcome in finished:
        samples = outcome.job.samples
        for sample in (samples.content, samples.style):
            (said,) = answer_embedded(mllm, [sample.question], outcome.E, 32)
            assert words_of(said) == words_of(sample.answer)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_an_embedding_does_not_depend_on_its_neighbours(noise: float) -> None:
    mllm = micro()
    waiting = jobs(mllm, 4)
    settings = {"max_steps": 6, "retries": 0, "noise": noise, "init_noise": noise}
    together = {o.job.id: o for o in run(mllm, waiting, slots=4, **settings).outbox}
    for job in waiting[:2]:
        (alone,) = run(mllm, [job], slots=1, **settings).outbox
        for path, e in alone.E.items():
            torch.testing.assert_close(together[job.id].E[path], e, rtol=1e-3, atol=1e-3)


def test_shared_prefix_and_plain_rows_take_the_same_path() -> None:
    mllm = micro()
    waiting = jobs(mllm, 2)
    packed, plain = (
        run(mllm, waiting, slots=2, max_steps=5, retries=0, shared_prefix=shared).outbox for shared in (True, False)
    )
    for a, b in zip(packed, plain, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


def test_out_of_steps_is_failed_with_the_reason_after_the_retries() -> None:
    mllm = micro()
    module = run(mllm, jobs(mllm, 1), slots=1, max_steps=2, retries=1)
    (outcome,) = module.outbox
    assert not outcome.ok
    assert "2 steps" in outcome.reason
    assert outcome.steps == 4  # two attempts of two steps
    # The second begins at age 0 (the gradient of the first must not move it), and in another place.
    assert {age: n for age, (_, n) in module.loss_by_age.items()} == {0: 2, 1: 2, 2: 2}
    first = run(mllm, jobs(mllm, 1), slots=1, max_steps=2, retries=0)
    assert module.loss_by_age[0][0] != pytest.approx(2 * first.loss_by_age[0][0], rel=1e-6)


def test_a_loss_that_is_not_finite_fails_its_embedding_and_stays_out_of_the_curve() -> None:
    mllm = micro()
    with torch.no_grad():
        mllm.model.get_output_embeddings().weight.fill_(float("nan"))
    module = run(mllm, jobs(mllm, 2), slots=2, max_steps=3, retries=1)
    assert [(o.ok, o.reason) for o in module.outbox] == [(False, "loss is not finite")] * 2
    assert not module.loss_by_age


def test_slots_refill_and_every_job_leaves_once() -> None:
    mllm = micro()
    waiting = jobs(mllm, 7)
    module = run(mllm, waiting, slots=3, max_steps=3, retries=0)
    assert sorted(o.job.id for o in module.outbox) == sorted(j.id for j in waiting)
    assert not module.busy


def test_no_step_is_made_or_logged_when_nothing_is_left(tmp_path: Path) -> None:
    """The loader draws a tick ahead, so one more comes after the last embedding is finished."""
    quieten()
    mllm = micro()
    module = EmbeddingOptimizer(mllm, jobs(mllm, 2), slots=2, max_steps=4, retries=0, **SETTINGS)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=MetricsFile(tmp_path), log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, SynthesisDataModule(lambda: module.busy))
    _, rows = read_rows(tmp_path / "metrics" / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(max(o.steps for o in module.outbox) + 1)]
    assert float(rows[-1]["synthesis/finished"]) == 2
    assert len({row["synthesis/loss"] for row in rows}) == len(rows)


def test_an_interrupted_slot_continues_where_it_was() -> None:
    mllm = micro()
    (job,) = jobs(mllm, 1)
    (whole,) = run(mllm, [job], slots=1, max_steps=8, retries=0).outbox
    first = run(mllm, [job], steps=4, slots=1, max_steps=8, retries=0)
    adam = first.trainer.optimizers[0]
    assert isinstance(adam, SlotAdam)
    tensors, table = first.slot_state(adam)
    second = EmbeddingOptimizer(mllm, [job], slots=1, max_steps=8, retries=0, **SETTINGS)

    class Restore(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert second.restore_slots(trainer.optimizers[0], tensors, table) == 1  # type: ignore[arg-type]

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Restore()],
    )  # fmt: skip
    trainer.fit(second, SynthesisDataModule(lambda: second.busy))
    (resumed,) = second.outbox
    assert resumed.steps == whole.steps
    assert resumed.loss == whole.loss
    assert all(torch.equal(resumed.E[path], e) for path, e in whole.E.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_E_stays_float32_under_a_bfloat16_model(precision: str) -> None:
    mllm = micro(dtype=torch.bfloat16)
    module = run(mllm, jobs(mllm, 1), precision=precision, slots=1, max_steps=3, retries=0)
    assert {e.dtype for e in module.outbox[0].E.values()} == {torch.float32}
    assert module.tensors.values[0].dtype == torch.float32
    (adam,) = module.trainer.optimizers
    assert {value.dtype for state in adam.state.values() for value in state.values()} == {torch.float32}


def branch_logits(target_lead: list[float]) -> BranchLogits:
    """One item, content branch with two targets and style branch with one; each target leads by so much."""
    logits = torch.zeros(3, 5)
    labels = torch.tensor([1, 2, 3])
    logits[torch.arange(3), labels] = torch.tensor(target_lead)
    return BranchLogits(logits, labels, torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("leads", "finished"), [([1.0, 1.0, 1.0], True), ([1.0, 0.4, 1.0], False), ([1.0, 1.0, float("nan")], False)]
)
def test_finished_needs_every_target_to_lead_by_the_margin(leads: list[float], finished: bool) -> None:
    assert slot_losses(branch_logits(leads), 1, 1.0, margin=0.5).finished.tolist() == [finished]


def test_a_tie_is_not_finished_whatever_the_margin() -> None:
    assert slot_losses(branch_logits([1.0, 0.0, 1.0]), 1, 1.0, margin=0.0).finished.tolist() == [False]
    assert slot_losses(branch_logits([1.0, 1e-3, 1.0]), 1, 1.0, margin=0.0).finished.tolist() == [True]


def test_loss_is_the_sum_of_the_two_means() -> None:
    out = branch_logits([1.0, 0.0, 2.0])
    nll = -torch.log_softmax(out.logits, -1)[torch.arange(3), out.labels]
    expected = nll[:2].mean() + 0.5 * nll[2]
    assert slot_losses(out, 1, 0.5, 0.5).loss.item() == pytest.approx(expected.item(), rel=1e-6)
