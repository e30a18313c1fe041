"""The text backbones: the micro model is the embedded model's own, decoders are told from encoders by trying."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from mllm.backbones import backbone_folder, is_decoder, load_causal, load_tokenizer, micro_folder
from tests.micro import micro
from tests.micro_text import backbone, detector


def test_the_micro_backbone_computes_what_the_embedded_model_does_on_text() -> None:
    mllm = micro()
    ids = mllm.prompts.prompt("List steps to bake the cake.", False).unsqueeze(0)
    with torch.no_grad():
        expected = mllm.model(input_ids=ids).logits
        found = load_causal(str(backbone()), torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert load_tokenizer(str(backbone())).get_vocab() == mllm.processor.tokenizer.get_vocab()


def test_the_micro_backbone_is_made_once_and_anew_for_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path))
    first = micro_folder()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert backbone_folder("micro") == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_decoders_are_told_from_encoders() -> None:
    assert is_decoder(detector().model)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    assert not is_decoder(BertForSequenceClassification(config).eval())


def test_a_missing_backbone_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path))
    for name, command in (("smollm2", "make smol"), ("minilm", "make minilm")):
        with pytest.raises(ValueError, match=command):
            backbone_folder(name)
    with pytest.raises(ValueError, match="no such folder"):
        backbone_folder("runs/none")
