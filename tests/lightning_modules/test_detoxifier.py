"""Logits at the answer's tokens only give the loss of the plain forward with labels, with and without an adapter."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from datamodules.rewriting import RewriteBatches
from lightning_modules.detoxifier import target_logps
from mllm.backbones import load_causal
from tests.micro_text import backbone

EXAMPLES = [([1, 20, 21, 22], [30, 31, 2]), ([1, 25], [40, 41, 42, 43, 2])]


def test_the_loss_is_that_of_transformers_with_every_other_label_ignored() -> None:
    batch = RewriteBatches(EXAMPLES, 2, 1, seed=0, pad_id=0).collate([0, 1])
    labels = batch.ids.masked_fill(~batch.target, -100)
    model = load_causal(str(backbone()), torch.float32)
    net = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    for adapted in (False, True):
        if adapted:
            for name, weight in net.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1)
        expected = net(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        logps = target_logps(model, batch)
        assert logps.shape == (8,)
        torch.testing.assert_close(-logps.mean(), expected)
    assert net.active_adapters == ["default"]
