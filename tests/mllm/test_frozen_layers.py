"""Beginning at layer n with remembered hidden states gives the whole model's output and gradients, and is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from mllm.frozen_layers import LowerLayers, freeze_lower, layers_of
from tests.micro_text import detector

TEXTS = [[5, 6, 7, 8, 9], [10, 11, 12], [9, 8, 7, 6, 5, 4, 3], [20, 21]]


def encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=3, num_labels=1, **sizes)).eval()


def decoder() -> PreTrainedModel:
    return detector().model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in TEXTS], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(t), dtype=torch.long) for t in TEXTS], batch_first=True)
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


@pytest.mark.parametrize("make", [encoder, decoder])
def test_the_upper_half_alone_gives_the_same_logits_and_gradients(make: object) -> None:
    model: PreTrainedModel = make()  # type: ignore[operator]
    freeze_lower(model, 2)
    whole = logits(model)
    whole.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    lower = LowerLayers(model, 2)
    features = lower.features(TEXTS, pad_id=0, batch_size=3)
    ran: list[int] = []
    owner, name = layers_of(model)
    hook = getattr(owner, name)[0].register_forward_hook(lambda *_: ran.append(1))
    with lower.replaced():
        lower.feed(features)
        found = logits(model)
        found.square().sum().backward()
    hook.remove()
    assert not ran
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    assert len(grads) == len(expected)
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for n, grad in expected.items():
        torch.testing.assert_close(by_name[n], grad, atol=1e-5, rtol=1e-4)
    assert [n for n, _ in model.named_parameters()] == names
    torch.testing.assert_close(logits(model), whole)


@pytest.mark.parametrize("make", [encoder, decoder])
def test_frozen_means_embeddings_and_the_first_layers_and_nothing_else(make: object) -> None:
    model: PreTrainedModel = make()  # type: ignore[operator]
    freeze_lower(model, 1)
    owner, name = layers_of(model)
    layers = getattr(owner, name)
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for layer in layers[1:] for p in layer.parameters())
    assert not model.get_input_embeddings().weight.requires_grad
    logits(model).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    freeze_lower(model, 0)
    assert all(p.requires_grad for p in model.parameters())


def test_a_forward_without_features_is_a_mistake_that_is_told() -> None:
    model = encoder()
    lower = LowerLayers(model, 1)
    with lower.replaced(), pytest.raises(AssertionError, match="feed"):
        logits(model)


def test_a_model_whose_lower_part_changed_is_refused() -> None:
    model = encoder().train()  # dropout: no two passes agree
    model.config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with pytest.raises(ValueError, match="cache_frozen=false"):
        LowerLayers(model, 2).features(TEXTS, pad_id=0)


def test_more_frozen_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="the model has 3 layers"):
        freeze_lower(encoder(), 3)
