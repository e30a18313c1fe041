"""What one stage takes on one rank: the stage's largest step, run on a model without weights (mllm/rehearsal.py).

Everything is of one process: weights, what the optimiser keeps (gradients and moments), and the rest of the peak: what
autograd keeps, logits, results in between. Under FSDP2 the frozen weights are divided, and what a rank fetches comes
on top: the weights outside of the layers, which stay until the backward pass has ended, and about three layers (the
one at work, the next one on its way, and the buffer that it comes in).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from configs.schema import AlignVariant, Config
from lightning_modules.aligner import made_trainable
from lightning_modules.embedding_optimizer import slot_losses
from lightning_modules.losses import dpo_loss, sequence_logps, sft_loss, token_logps
from lightning_modules.slots import SlotAdam
from mllm.items import Item
from mllm.live_bytes import LiveBytes, bytes_of
from mllm.outline import Outline, faked
from mllm.recomputing import recompute_activations
from mllm.rehearsal import generated, logits_of

FEW = (3, 5)
ADAM = 2
"""Moments that AdamW keeps of each trained weight."""


@dataclass(frozen=True)
class Need:
    """Bytes of one rank. kept: gradients and moments. rest: what the largest step takes beside both.

    batch: that step, in words. lower: the setting that makes it smaller, and its value (1 or none: nothing does).
    """

    stage: str
    parameters: int
    trained: int
    weights: int
    kept: int
    rest: int
    batch: str
    lower: tuple[str, int] | None = None

    @property
    def peak(self) -> int:
        return self.weights + self.kept + self.rest


@dataclass(frozen=True)
class AlignStep:
    """The largest micro-batch with media and the largest without, of one rank's share of a step; either may be
    empty. parts: micro-batches in a step. media: examples with media in a step, whose E is in memory on the CPU."""

    with_media: list[Item]
    text: list[Item]
    parts: int
    media: int


def synthesis(outline: Outline, cfg: Config, items: Sequence[Item]) -> Need:
    """One step of all slots."""
    s, S = cfg.synthesis, len(items)
    second: Any = s.second_moment

    def step() -> int:
        with rehearsing(outline, outline.model, cfg.trainer.precision) as live:
            values = {
                path: nn.Parameter(torch.empty(S, *shape, dtype=torch.float32))
                for path, shape in outline.shapes.items()
            }
            optimizer = SlotAdam(
                list(values.values()),
                [1.0] * len(values),
                s.lr,
                (s.betas[0], s.betas[1]),
                second_moment=second,
                common=s.common,
            )
            live.reset()
            for _ in range(2):  # the second step has the state of the first
                rows = {}
                for path, p in values.items():
                    noise = s.noise * torch.stack([torch.empty_like(p[0]) for _ in range(S)]) if s.noise else None
                    rows[path] = (p if noise is None else p + noise).flatten(0, 1)
                optimizer.zero_grad(set_to_none=True)
                out = logits_of(outline, items, "packed" if s.shared_prefix else "plain", rows)
                state = slot_losses(out, S, s.style_weight, s.margin)
                state.loss.sum().backward()
                del out, state, rows
                optimizer.step()
            return live.peak

    peak = over_layers(outline, step)
    trained = S * sum(math.prod(shape) for shape in outline.shapes.values())
    weights, kept = outline.weight_bytes(), 3 * 4 * trained  # gradient and moments in float32
    batch = f"{S} slots of {_longest(items)} tokens"
    rest = peak - weights - kept
    return Need("synthesize", outline.parameters(), trained, weights, kept, rest, batch, ("synthesis.slots", S))


def alignment(outline: Outline, cfg: Config, name: str, step: AlignStep) -> Need:
    """One optimiser step of a variant."""
    variant = cfg.variants[name]
    parameters = outline.parameters()
    model = made_trainable(outline.model, outline.spec, outline.encoder, variant)
    model.train()
    if cfg.trainer.activation_checkpointing:
        recompute_activations(model)
    if cfg.trainer.precision == "bf16-true":
        model.to(torch.bfloat16)

    def run() -> int:
        with rehearsing(outline, model, cfg.trainer.precision) as live:
            trained = [p for p in model.parameters() if p.requires_grad]
            moments = [torch.zeros_like(p) for p in trained for _ in range(ADAM)]
            live.reset()
            stored = {p: _media(shape, 2 * step.media) for p, shape in outline.shapes.items()}  # and the next batch's
            for items in (step.with_media, step.text):
                for _ in range(min(2, step.parts) if items else 0):  # from the second on there are gradients
                    _micro_batch(outline, model, variant, items, items is step.with_media, cfg)
            _optimiser_step(trained, moments)
            del stored
            return live.peak

    try:
        peak = over_layers(outline, run)
        weights = bytes_of([*model.parameters(), *model.buffers()])
        trained = [p for p in model.parameters() if p.requires_grad]
        grads, count = sum(p.numel() * p.element_size() for p in trained), sum(p.numel() for p in trained)
    finally:
        if isinstance(model, PeftModel):
            model.unload()
        if cfg.trainer.activation_checkpointing:
            outline.model.activation_checkpointing_disable()
        outline.model.eval().requires_grad_(False)
        if cfg.trainer.precision == "bf16-true":  # the next row begins with the model as it is
            outline.model.to(getattr(torch, outline.spec.dtype))
    kept = grads + ADAM * grads
    largest = max((step.with_media, step.text), key=lambda items: len(items) * _longest(items))
    batch = f"{len(largest)} examples of {_longest(largest)} tokens"
    lower = (f"variants.{name}.micro_batch_size", variant.micro_batch_size)
    return Need(f"align/{name}", parameters, count, weights, kept, peak - weights - kept, batch, lower)


def evaluation(outline: Outline, cfg: Config, prompt: int, batch: int) -> Need:
    """Answers to one batch of prompts; the encoder's own work is not in it."""
    new = cfg.evaluate.max_new_tokens

    def run() -> int:
        with rehearsing(outline, outline.model, "32-true") as live:
            live.reset()
            generated(outline, batch, prompt, new)
            return live.peak

    peak = over_layers(outline, run)
    weights = outline.weight_bytes()
    words = f"{batch} prompts of {prompt} + {new} tokens"
    return Need("evaluate", outline.parameters(), 0, weights, 0, peak - weights, words, ("evaluate.batch_size", batch))


def sharded(need: Need, outline: Outline, ranks: int, full: bool) -> Need:
    """The same under FSDP2 (mllm/sharding.py)."""
    inside = [p for layer in outline.model.get_decoder().layers for p in layer.parameters()]
    encoder = [p for path in outline.encoder for p in outline.model.get_submodule(path).parameters()]
    apart = {id(p) for p in [*inside, *encoder]}
    outside = [p for p in outline.model.parameters() if id(p) not in apart]
    layer = bytes_of(outline.model.get_decoder().layers[0].parameters())
    cut = bytes_of(inside) + bytes_of(outside)
    fetched = bytes_of(outside) + 3 * layer
    kept = need.kept // ranks if full else need.kept
    gradients = (bytes_of(outside) + 2 * layer) if full else 0
    return replace(need, weights=need.weights - cut + cut // ranks, kept=kept, rest=need.rest + fetched + gradients)


def over_layers(outline: Outline, run: Callable[[], int]) -> int:
    """The peak with all layers of the decoder: of many, from runs with `FEW` of them, for every further layer adds the
    same weights and keeps the same for the backward pass."""
    decoder = outline.model.get_decoder()
    layers, (few, more) = decoder.layers, FEW
    if len(layers) <= more + 1:
        return run()
    found = []
    for n in FEW:
        decoder.layers = layers[:n]
        try:
            found.append(run())
        finally:
            decoder.layers = layers
    return found[1] + (found[1] - found[0]) * (len(layers) - more) // (more - few)


@contextlib.contextmanager
def rehearsing(outline: Outline, model: nn.Module, precision: str) -> Iterator[LiveBytes]:
    """Inside, tensors are fake and counted, beginning with the model's weights; autocast as Lightning sets it."""
    live = LiveBytes()
    with faked(model, outline.mode), outline.mode, live:
        live.count(*model.parameters(), *model.buffers())
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        with torch.autocast("cpu", kinds[precision]) if precision in kinds else contextlib.nullcontext():
            yield live


def _micro_batch(
    outline: Outline, model: nn.Module, variant: AlignVariant, items: list[Item], media: bool, cfg: Config
) -> None:
    """As `Aligner.micro_backward`."""
    if not media:
        _loss(outline, model, variant, items, None, cfg).backward()
        return
    E = {path: _media(shape, len(items)) for path, shape in outline.shapes.items()}
    if not variant.attack_radius:
        _loss(outline, model, variant, items, E, cfg).backward()
        return
    E = {path: e.requires_grad_() for path, e in E.items()}
    (_loss(outline, model, variant, items, E, cfg) / 2).backward()
    moved = {path: e.detach() + variant.attack_radius * (e.grad / 1.0) for path, e in E.items() if e.grad is not None}
    (_loss(outline, model, variant, items, moved, cfg) / 2).backward()


def _loss(
    outline: Outline,
    model: nn.Module,
    variant: AlignVariant,
    items: list[Item],
    E: Mapping[str, Tensor] | None,
    cfg: Config,
) -> Tensor:
    """As `micro_step` of the two aligners."""
    if variant.method == "sft":
        shared = any(len(item.branches) > 1 for item in items)
        out = logits_of(outline, items, "packed" if shared else "plain", E)
        logp = token_logps(out.logits, out.labels)
        (out.logits.detach().argmax(-1) == out.labels).sum()
        return sft_loss(logp, 1.0)
    policy, lengths = _pairs(outline, items, E)
    if cfg.align.precompute_reference:
        reference = torch.zeros_like(policy.detach())
    else:
        assert isinstance(model, PeftModel)
        with torch.no_grad(), model.disable_adapter():
            reference = _pairs(outline, items, E)[0]
    pairs = (policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], lengths[:, 0], lengths[:, 1])
    loss = dpo_loss(*pairs, beta=variant.beta).loss - variant.sft_weight * policy[:, 0] / lengths[:, 0]
    return loss.sum()


def _pairs(outline: Outline, items: list[Item], E: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """As `DPOAligner.pair_logps`."""
    out = logits_of(outline, items, "packed", E)
    logp = token_logps(out.logits, out.labels)
    sequence = out.item * 2 + out.branch
    n = len(items)
    lengths = sequence_logps(torch.ones_like(logp), sequence, 2 * n)
    return sequence_logps(logp, sequence, 2 * n).view(-1, 2), lengths.view(-1, 2)


def _optimiser_step(trained: Sequence[Tensor], moments: list[Tensor]) -> None:
    """What AdamW makes in between: on CUDA of all weights at once, elsewhere of the largest; the larger is counted."""
    made = [p.grad.sqrt() for p in trained if p.grad is not None]
    del made, moments


def _media(shape: Sequence[int], items: int) -> Tensor:
    return torch.empty(items * shape[0], *shape[1:], dtype=torch.float32)


def _longest(items: Sequence[Item]) -> int:
    """Tokens of the longest, its continuations included."""
    return max((len(i.prefix) + sum(len(b.ids) for b in i.branches) for i in items), default=0)
