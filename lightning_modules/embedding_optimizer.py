"""SEA's embedding optimiser (arXiv 2502.12562, section 3): everything is frozen but E.

    E* = argmin_E  -log p(content answer | E, content question) - w log p(style answer | E, style question)

E lives in the output space of the modality encoder M, starts from M's output for a blank, and is put where M's output
would be (mllm/anchor.py). Each term is the mean over its answer's tokens. An embedding is *finished* when every answer
token of both samples is the model's greedy choice and leads the runner-up by `margin` logits: then greedy decoding
reproduces both answers. It has *failed* when `max_steps` (and its retries) are used up.

Symbols: S slots, T target tokens of all active slots, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch

from datamodules.control_samples import SynthesisJob
from lightning_modules.at_work import AtWork, of_items
from lightning_modules.losses import token_logps
from lightning_modules.slots import SecondMoment, SlotAdam, SlotTensors, schedule
from mllm.branches import BranchForward, BranchLogits, Plan
from mllm.loading import MLLM


@dataclass(frozen=True)
class Outcome:
    """What left a slot: the embedding (projector path -> one item, on the CPU) and how it went."""

    job: SynthesisJob
    E: dict[str, torch.Tensor]
    ok: bool
    reason: str
    loss: float
    steps: int
    seconds: float


@dataclass
class Slot:
    """One embedding under way. `attempt` counts fresh starts."""

    job: SynthesisJob
    attempt: int = 0
    started: float = 0.0
    steps_before: int = 0


@dataclass(frozen=True)
class SlotState:
    """Per active slot, after one forward: loss [S] (differentiable), whether it is finished [S]."""

    loss: torch.Tensor
    finished: torch.Tensor


def slot_losses(out: BranchLogits, n: int, style_weight: float, margin: float) -> SlotState:
    """Loss and stopping rule of `n` slots from logits at the targets.

    Branch 0 is the content sample, branch 1 the style sample; NaN logits never count as finished.
    """
    logits = out.logits.float()
    nll = -token_logps(logits, out.labels)  # [T]
    sample = out.item * 2 + out.branch
    zero = nll.new_zeros(2 * n)
    per_sample = zero.index_add(0, sample, nll) / zero.index_add(0, sample, torch.ones_like(nll)).clamp(min=1)
    content, style = per_sample.view(n, 2).unbind(1)
    with torch.no_grad():
        top = logits.topk(2, dim=-1)
        target = logits.gather(-1, out.labels[:, None])[:, 0]
        runner_up = torch.where(top.indices[:, 0] == out.labels, top.values[:, 1], top.values[:, 0])
        # With margin 0 a tie would pass, which greedy decoding may settle for the other token (bfloat16 has many).
        lacking = ~((target > runner_up) & (target - runner_up >= margin))
        finished = zero[:n].index_add(0, out.item, lacking.to(nll.dtype)) == 0
    return SlotState(content + style_weight * style, finished)


class EmbeddingOptimizer(L.LightningModule):
    """Holds S slots and refills them from `queue` until it is empty.

    Args:
        queue: jobs that wait; the module takes from the left.
        lr: learning rate in units of the root mean square of the blank's embedding.
        noise: Gaussian noise on E in every forward, in units of the same RMS. An embedding that holds under noise
            lies in a wide basin and answers other questions as well (docs/LOG.md); 0 is the paper's.
        margin: lead over the runner-up, in logits, that every target token must have.
        second_moment, common: of the optimiser, `SlotAdam`'s.
        retries: fresh starts from a noisy blank after `max_steps`.
        shared_prefix: compute the prefix of the two samples once (False: two plain rows, the oracle).
        width: exactly so many slots, for `restore_launch`; None: `slots`, or fewer where the queue is shorter.
    """

    def __init__(
        self,
        mllm: MLLM,
        queue: Iterable[SynthesisJob] = (),
        slots: int = 64,
        lr: float = 0.1,
        betas: Sequence[float] = (0.9, 0.999),
        max_steps: int = 200,
        warmup_steps: int = 0,
        lr_schedule: str = "constant",
        margin: float = 0.5,
        style_weight: float = 1.0,
        init_noise: float = 0.0,
        noise: float = 0.0,
        retries: int = 1,
        second_moment: SecondMoment = "element",
        common: float = 0.0,
        shared_prefix: bool = True,
        seed: int = 0,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.at_work = AtWork()
        self._mllm = [mllm]  # in a list: the frozen model is no submodule, so it is neither saved nor wrapped
        self.queue = deque(queue)
        self.total = len(self.queue)
        self.outbox: list[
            Outcome
        ] = []  # what left its slot; emptied by whoever keeps it (callbacks/store_embeddings.py)
        self.lr, self.betas, self.max_steps, self.margin = lr, (betas[0], betas[1]), max_steps, margin
        self.style_weight, self.init_noise, self.noise = style_weight, init_noise, noise
        self.retries, self.seed = retries, seed
        self.shared_prefix, self.second_moment, self.common = shared_prefix, second_moment, common
        self.factor = schedule(lr_schedule, warmup_steps, max_steps)
        self.tensors = SlotTensors(mllm.anchor.E0_by_path, width or max(1, min(slots, self.total)))
        self.table: list[Slot | None] = [None] * len(self.tensors.values[0])
        self.forward_branches = BranchForward(mllm.model, mllm.anchor, mode="auto" if shared_prefix else "plain")
        self.plan: Plan | None = None
        self.finished, self.succeeded, self.finished_steps = 0, 0, 0
        self.mean_loss = math.nan  # of the running slots, in the last step
        self.loss_by_age: dict[int, list[float]] = {}  # age -> [sum, count], for the loss curve

    @property
    def mllm(self) -> MLLM:
        return self._mllm[0]

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.queue) or any(self.table)

    def configure_optimizers(self) -> SlotAdam:
        return SlotAdam(
            list(self.tensors.values),
            self.tensors.scales,
            self.lr,
            self.betas,
            1e-8,
            self.factor,
            self.second_moment,
            self.common,
        )

    def on_train_batch_start(self, batch: object, batch_idx: int) -> int | None:
        """Ends the fit at a tick that the loader drew before the last embedding was finished: it is no step, and what
        is logged with it would be the last step's metrics again."""
        return None if self.busy else -1

    def training_step(self, batch: object, batch_idx: int) -> None:
        """One step of all slots: refill, forward, release what is finished, update the rest."""
        optimizer = self.optimizers()
        inner = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(inner, SlotAdam)
        self.refill(inner)
        slots = [s for s, entry in enumerate(self.table) if entry is not None]
        if not slots:
            return
        items = [self.table[s].job.item for s in slots]  # type: ignore[union-attr]
        self.at_work.on(self.global_step, partial(of_items, items))
        if self.plan is None:
            self.plan = self.forward_branches.plan(items, shared=self.shared_prefix)
        out = self.forward_branches(
            self.plan, self.tensors.rows(slots, self.noise, self.noise_generators(inner, slots))
        )
        state = slot_losses(out, len(slots), self.style_weight, self.margin)
        # The slots' losses do not interact: their sum gives each E its own gradient.
        inner.zero_grad(set_to_none=True)
        self.manual_backward(state.loss.sum())
        # The one host synchronisation of a step.
        loss, finished = torch.stack([state.loss.detach(), state.finished.to(state.loss.dtype)]).tolist()
        stay = self.release(inner, slots, loss, finished)
        inner.active = stay
        optimizer.step()  # type: ignore[union-attr]
        self.mean_loss = sum(loss) / len(loss)
        self.log("synthesis/loss", self.mean_loss, batch_size=len(slots))
        self.log("synthesis/active_slots", float(len(slots)), batch_size=len(slots))
        self.log("synthesis/finished", float(self.finished), prog_bar=True, batch_size=len(slots))

    def noise_generators(self, optimizer: SlotAdam, slots: Sequence[int]) -> list[torch.Generator]:
        """A generator a slot, a function of the embedding and its age: neighbours and resuming change nothing."""
        out = []
        for slot in slots if self.noise else ():
            entry = self.table[slot]
            assert entry is not None
            seed = hash_seed(self.seed, entry.job.id, entry.attempt, optimizer.ages[slot])
            out.append(torch.Generator(self.device).manual_seed(seed))
        return out

    def refill(self, optimizer: SlotAdam) -> None:
        """Starts waiting jobs in the free slots."""
        for slot, entry in enumerate(self.table):
            if entry is None and self.queue:
                self.start(slot, Slot(self.queue.popleft(), started=time.perf_counter()), optimizer)

    def start(self, slot: int, entry: Slot, optimizer: SlotAdam) -> None:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, entry.job.id, entry.attempt))
        # A second attempt from the same place would fail in the same way.
        self.tensors.restart(slot, self.init_noise if entry.attempt == 0 else max(self.init_noise, 0.1), generator)
        optimizer.reset(slot)
        self.table[slot], self.plan = entry, None

    def release(self, optimizer: SlotAdam, slots: list[int], loss: list[float], finished: list[float]) -> list[int]:
        """Hands over what is finished or out of steps; returns the slots to update."""
        stay = []
        for slot, value, done in zip(slots, loss, finished, strict=True):
            entry, age = self.table[slot], optimizer.ages[slot]
            assert entry is not None
            sane = math.isfinite(value)
            if sane:  # one NaN would spoil the curve, and no JSON file takes it
                total = self.loss_by_age.setdefault(age, [0.0, 0.0])
                total[0], total[1] = total[0] + value, total[1] + 1
            if sane and not done and age < self.max_steps:
                stay.append(slot)
                continue
            if not (done and sane) and entry.attempt < self.retries:
                retry = Slot(entry.job, entry.attempt + 1, entry.started, entry.steps_before + age)
                self.start(slot, retry, optimizer)
                continue
            ok = bool(done) and sane
            reason = "" if ok else ("loss is not finite" if not sane else f"no greedy match in {self.max_steps} steps")
            seconds = time.perf_counter() - entry.started
            steps = entry.steps_before + age
            self.finished, self.succeeded = self.finished + 1, self.succeeded + ok
            self.finished_steps += steps
            self.table[slot], self.plan = None, None
            self.outbox.append(Outcome(entry.job, self.tensors.item(slot), ok, reason, value, steps, seconds))
        return stay

    # ------------------------------------------------------------------------------------------------ interruption
    def slot_state(self, optimizer: SlotAdam) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
        """Tensors and table of the slots under way, enough to go on where they are."""
        tensors: dict[str, torch.Tensor] = {}
        busy = [s for s, entry in enumerate(self.table) if entry is not None]
        for path, p in zip(self.tensors.paths, self.tensors.values, strict=True):
            tensors[f"{path}/E"] = p.detach()[busy].contiguous()
            for name, moment in optimizer.state[p].items():
                tensors[f"{path}/{name}"] = moment[busy].contiguous()
        table = [
            {"id": e.job.id, "attempt": e.attempt, "steps_before": e.steps_before, "age": optimizer.ages[s], "slot": s}
            for s in busy
            if (e := self.table[s]) is not None
        ]
        return tensors, table

    @torch.no_grad()
    def restore_slots(
        self, optimizer: SlotAdam, tensors: Mapping[str, torch.Tensor], table: Sequence[Mapping[str, Any]]
    ) -> int:
        """Takes up saved slots whose job still waits in the queue, side by side; returns how many."""
        waiting = {job.id: job for job in self.queue}
        taken = 0
        for row, saved in enumerate(table):
            job = waiting.pop(str(saved["id"]), None)
            if job is None or taken == len(self.table):
                continue
            self._take_up(taken, job, optimizer, tensors, row, saved)
            taken += 1
        self._leave_queue()
        return taken

    def launch_state(self) -> dict[str, Any]:
        """What `restore_launch` needs beside the slots: how many there are, who waits, and the counters."""
        return {
            "slots": len(self.table),
            "queue": [job.id for job in self.queue],
            "finished": self.finished,
            "succeeded": self.succeeded,
            "finished_steps": self.finished_steps,
            "loss_by_age": self.loss_by_age,
        }

    @torch.no_grad()
    def restore_launch(
        self,
        optimizer: SlotAdam,
        tensors: Mapping[str, torch.Tensor],
        table: Sequence[Mapping[str, Any]],
        launch: Mapping[str, Any],
    ) -> None:
        """Everything as it was: each embedding in the slot it had, the others waiting in the same order. The module was
        made with the jobs of both in its queue, and with the same `width`."""
        waiting = {job.id: job for job in self.queue}
        for row, saved in enumerate(table):
            self._take_up(saved["slot"], waiting[saved["id"]], optimizer, tensors, row, saved)
        self.queue = deque(waiting[id] for id in launch["queue"])
        self.finished, self.succeeded = launch["finished"], launch["succeeded"]
        self.finished_steps = launch["finished_steps"]
        # JSON's keys are texts.
        self.loss_by_age = {int(age): list(sums) for age, sums in launch["loss_by_age"].items()}

    def _take_up(
        self,
        slot: int,
        job: SynthesisJob,
        optimizer: SlotAdam,
        tensors: Mapping[str, torch.Tensor],
        row: int,
        saved: Mapping[str, Any],
    ) -> None:
        entry = Slot(job, int(saved["attempt"]), time.perf_counter(), int(saved["steps_before"]))
        self.start(slot, entry, optimizer)
        optimizer.ages[slot] = int(saved["age"])
        for path, p in zip(self.tensors.paths, self.tensors.values, strict=True):
            p[slot] = tensors[f"{path}/E"][row].to(p.device)
            for name, moment in optimizer.state[p].items():
                moment[slot] = tensors[f"{path}/{name}"][row].to(p.device)

    def _leave_queue(self) -> None:
        resumed = {entry.job.id for entry in self.table if entry is not None}
        self.queue = deque(job for job in self.queue if job.id not in resumed)


def hash_seed(*parts: object) -> int:
    """A seed for one embedding's noise, the same whichever slot it lands in."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")
