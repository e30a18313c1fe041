"""Memory of the stages that train a text model: the harm detector and the detoxifier. As in alignment, the largest
batch is one that the sampler draws from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.schema import Config
from datamodules.qa_batches import Buckets, QuestionTexts, encode_questions
from datamodules.rewriting import encode_rewriting, rewritings
from lightning_modules.losses import sft_loss, token_logps
from mllm.backbones import backbone_folder, load_tokenizer
from mllm.live_bytes import LiveBytes, bytes_of
from mllm.outline import faked
from mllm.qa_text import QATemplate
from stages.memory_steps import ADAM, Need
from stages.plan_batches import STEPS
from stages.text_training import adapted, question_parts, steps_of

Step = Callable[[Any], None]


def text_model_needs(cfg: Config, world: int) -> Iterator[tuple[int, int, Callable[[int], Need]]]:
    """(present size of a batch, the smallest possible, what a batch of another size takes) of each such stage. Under
    FSDP2 as under DDP: whole weights on each rank.

    Raises:
        ValueError: the data, the backbone's config.json or its tokenizer are not at hand.
    """
    d, x = cfg.detector, cfg.detoxifier
    if "train_detector" in cfg.stages:
        tokenizer = load_tokenizer(backbone_folder(cfg.backbone.path), cfg.backbone.revision)
        template = QATemplate(d.template, tokenizer, d.max_length, d.max_question)
        parts = {part: encode_questions(pairs, template.encode) for part, pairs in question_parts(cfg).items()}
        longest = max(q.length for part in parts.values() for q in part)
        if d.layers:
            yield d.score_batch_size, 1, lambda n: _read(cfg, n, longest)
        else:
            yield d.batch_size, world, lambda n: _detector(cfg, n, parts["train"], world)
            yield d.score_batch_size, 1, lambda n: _scoring(cfg, n, longest)
    if "train_detoxifier" in cfg.stages:
        tokenizer = load_tokenizer(backbone_folder(cfg.backbone.path), cfg.backbone.revision)
        template = QATemplate(x.template, tokenizer, x.max_length, x.max_question)
        pairs = question_parts(cfg)["train"]
        examples = [encode_rewriting(e, template, tokenizer, x.max_answer) for e in rewritings(pairs, x.refusal)]
        yield x.batch_size, world, lambda n: _detoxifier(cfg, n, examples, world)


def _read(cfg: Config, n: int, longest: int) -> Need:
    """The backbone reads, and learns nothing; the head on top is small."""
    model, mode = _fake(cfg, AutoModel)

    def step(model: Any) -> None:
        with torch.no_grad():
            model(**_padded(n, longest), output_hidden_states=True)

    return _need(
        model, mode, model, step, "train_detector", f"{n} texts of {longest} tokens", ("detector.score_batch_size", n)
    )


def _scoring(cfg: Config, n: int, longest: int) -> Need:
    """What the finished detector makes of n of the longest texts."""
    model, mode = _fake(cfg, AutoModelForSequenceClassification, num_labels=1)

    def step(model: Any) -> None:
        with torch.no_grad():
            model(**_padded(n, longest))

    batch = f"{n} texts of {longest} tokens"
    lower = ("detector.score_batch_size", n)
    return _need(model.eval(), mode, model, step, "train_detector, scores", batch, lower)


def _detector(cfg: Config, n: int, train: Sequence[QuestionTexts], world: int) -> Need:
    """A training step."""
    d = cfg.detector
    model, mode = _fake(cfg, AutoModelForSequenceClassification, num_labels=1)
    net = adapted(model, cfg, d.lora, "SEQ_CLS")
    net.train()
    steps = steps_of(d.epochs, len(train), n)
    drawn = _drawn(Buckets([q.length for q in train], n, cfg.seed), steps, world)
    shapes = [(sum(len(train[i].ids) for i in part), max(train[i].length for i in part)) for part in drawn]
    rows, length = max(shapes, key=lambda shape: shape[0] * shape[1])

    def step(net: Any) -> None:
        net(**_padded(rows, length)).logits.sum().backward()

    batch = f"{n} questions, {rows} texts of {length} tokens"
    return _need(model, mode, net, step, "train_detector", batch, ("detector.batch_size", n))


def _detoxifier(cfg: Config, n: int, examples: Sequence[tuple[list[int], list[int]]], world: int) -> Need:
    d = cfg.detoxifier
    model, mode = _fake(cfg, AutoModelForCausalLM)
    net = adapted(model, cfg, d.lora, "CAUSAL_LM")
    net.train()
    lengths = [len(prompt) + len(target) for prompt, target in examples]
    drawn = _drawn(Buckets(lengths, n, cfg.seed), steps_of(d.epochs, len(examples), n), world)
    vocabulary = model.config.get_text_config().vocab_size / model.config.get_text_config().hidden_size

    def cost(part: Sequence[int]) -> float:
        return len(part) * max(lengths[i] for i in part) + vocabulary * sum(len(examples[i][1]) for i in part)

    largest = max(drawn, key=cost)
    rows, length = len(largest), max(lengths[i] for i in largest)
    targets = sum(len(examples[i][1]) for i in largest)

    def step(net: Any) -> None:
        hidden = model.base_model(**_padded(rows, length), use_cache=False)[0]
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[torch.zeros(targets, dtype=torch.long)])
        sft_loss(token_logps(logits, torch.zeros(targets, dtype=torch.long)), 1).backward()

    batch = f"{rows} pairs of {length} tokens, {targets} targets"
    return _need(model, mode, net, step, "train_detoxifier", batch, ("detoxifier.batch_size", n))


def _drawn(buckets: Buckets, steps: int, world: int) -> list[list[int]]:
    """The ranks' shares of the steps looked at, one pass at least: batches are of like lengths. A later pass may draw a
    somewhat larger one."""
    looked_at = range(min(steps, max(STEPS, buckets.per_epoch)))
    return [part for step in looked_at for rank in range(world) if (part := buckets(step)[rank::world])]


def _padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    """The mask is given as the attention takes it: to find out that there is padding one would look at values."""
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    return {"input_ids": torch.zeros(rows, length, dtype=torch.long), "attention_mask": mask}


def _fake(cfg: Config, kind: Any, **settings: Any) -> tuple[Any, FakeTensorMode]:
    b = cfg.backbone
    source = backbone_folder(b.path)
    try:
        config = AutoConfig.from_pretrained(source, revision=b.revision, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone.path={b.path}: {str(error).splitlines()[0]}; a plan needs its config.json"
        ) from error
    config.get_text_config().pad_token_id = None if kind is AutoModel else 0
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=getattr(torch, b.dtype))
    return model, FakeTensorMode(allow_non_fake_inputs=True)


def _need(
    model: Any, mode: FakeTensorMode, net: nn.Module, step: Step, stage: str, batch: str, lower: tuple[str, int]
) -> Need:
    with faked(net, mode), mode, LiveBytes() as live:
        trained = [p for p in net.parameters() if p.requires_grad] if net.training else []
        grads = sum(p.numel() * p.element_size() for p in trained)
        live.count(*net.parameters(), *net.buffers())
        moments = [torch.zeros_like(p) for p in trained for _ in range(ADAM)]
        live.reset()
        step(net)
        if trained:  # the second step has gradients
            step(net)
        peak = live.peak
        del moments
    weights, kept = bytes_of([*net.parameters(), *net.buffers()]), (1 + ADAM) * grads
    parameters, count = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    return Need(stage, parameters, count, weights, kept, peak - weights - kept, batch, lower)
