"""An aligned model as one plain folder: the adapter merged into the weights, the processor beside them.

`transformers` alone loads it (`AutoModelForMultimodalLM.from_pretrained(folder)`), so any harness that takes a
checkpoint of the family takes it: vLLM, lmms-eval, VLMEvalKit.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from mllm.loading import MLLM, to_device


@torch.inference_mode()
def export_merged(mllm: MLLM, adapter: str | Path, folder: str | Path) -> float:
    """Writes the merged model and its processor into `folder` (safetensors), loads it again and compares.

    `mllm` is used up: its weights are the merged ones afterwards.

    Returns: the largest difference of a logit between the model under its adapter and the folder's, on a prompt with
        the blank medium. It is rounding: about 1e-6 in float32, 1e-1 in bfloat16.

    Raises:
        ValueError: the adapter does not fit the model; names both.
    """
    path = mllm.spec.path
    try:
        adapted = PeftModel.from_pretrained(mllm.model, adapter).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"{adapter}: the adapter does not fit {path} ({told})") from error
    question = mllm.spec.prompts.style.format(modality=mllm.spec.modality)
    inputs = dict(to_device(mllm.prompts.blank_inputs(question), mllm.model.device))
    for key, value in inputs.items():  # pixels come as float32 whatever the weights are
        if torch.is_tensor(value) and value.is_floating_point():
            inputs[key] = value.to(mllm.model.dtype)
    before = adapted(**copy.copy(inputs)).logits.float().cpu()
    adapted.merge_and_unload().save_pretrained(folder)
    mllm.processor.save_pretrained(folder)
    again = AutoModelForMultimodalLM.from_pretrained(
        folder, dtype=mllm.model.dtype, use_safetensors=True, trust_remote_code=False
    )
    after = again.to(mllm.model.device).eval()(**inputs).logits.float().cpu()
    return float((after - before).abs().max())
