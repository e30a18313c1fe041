"""Memory of the stages that train a text model: the harm detector and the detoxifier. An upper bound: every text as
long as is allowed, two answers to each question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.schema import Config
from lightning_modules.losses import sft_loss, token_logps
from mllm.backbones import backbone_folder
from mllm.live_bytes import LiveBytes, bytes_of
from mllm.outline import faked
from stages.memory_steps import ADAM, Need
from stages.text_training import adapted

Step = Callable[[Any], None]


def text_model_needs(cfg: Config) -> Iterator[tuple[int, Callable[[int], Need]]]:
    """(present size of a batch, what a batch of another size takes) of each such stage in the run."""
    d, x = cfg.detector, cfg.detoxifier
    if "train_detector" in cfg.stages:
        if d.layers:
            yield d.score_batch_size, lambda n: _read(cfg, n)
        else:
            yield d.batch_size, lambda n: _detector(cfg, n)
    if "train_detoxifier" in cfg.stages:
        yield x.batch_size, lambda n: _detoxifier(cfg, n)


def _read(cfg: Config, n: int) -> Need:
    """The backbone reads, and learns nothing; the head on top is small."""
    d = cfg.detector
    model, mode = _fake(cfg, AutoModel)

    def step(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=torch.zeros(n, d.max_length, dtype=torch.long), output_hidden_states=True)

    batch = f"{n} texts of {d.max_length} tokens"
    return _need(model, mode, model, step, "train_detector", batch, ("detector.score_batch_size", n))


def _detector(cfg: Config, n: int) -> Need:
    d = cfg.detector
    model, mode = _fake(cfg, AutoModelForSequenceClassification, num_labels=1)
    net = adapted(model, cfg, d.lora, "SEQ_CLS")
    net.train()

    def step(net: Any) -> None:
        net(input_ids=torch.zeros(2 * n, d.max_length, dtype=torch.long)).logits.sum().backward()

    batch = f"{n} questions, {2 * n} texts of {d.max_length} tokens"
    return _need(model, mode, net, step, "train_detector", batch, ("detector.batch_size", n))


def _detoxifier(cfg: Config, n: int) -> Need:
    d = cfg.detoxifier
    length, answer = d.max_length + d.max_answer, d.max_answer
    model, mode = _fake(cfg, AutoModelForCausalLM)
    net = adapted(model, cfg, d.lora, "CAUSAL_LM")
    net.train()

    def step(net: Any) -> None:
        hidden = model.base_model(input_ids=torch.zeros(n, length, dtype=torch.long), use_cache=False)[0]
        logits = model.get_output_embeddings()(hidden[:, -answer:].flatten(0, 1))
        sft_loss(token_logps(logits, torch.zeros(n * answer, dtype=torch.long)), 1).backward()

    batch = f"{n} pairs of {length} tokens"
    return _need(model, mode, net, step, "train_detoxifier", batch, ("detoxifier.batch_size", n))


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
        if trained:
            step(net)
        peak = live.peak
        del moments
    weights, kept = bytes_of([*net.parameters(), *net.buffers()]), (1 + ADAM) * grads
    parameters, count = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    return Need(stage, parameters, count, weights, kept, peak - weights - kept, batch, lower)
