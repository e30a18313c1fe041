"""The text models that detectors and detoxifiers are made from, by name: loading them, and merging adapters into them.

    smollm2    SmolLM2-135M-Instruct, a decoder (`make smol`)
    minilm     all-MiniLM-L6-v2, an encoder of 22 M parameters (`make minilm`)
    micro      the language model inside assets/micro_llava, taken out as a plain causal model

Anything else is a folder or hub id of transformers. Only safetensors are read and remote code is never run. A trained
adapter is merged at loading: no adapter arithmetic at each scored answer.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from mllm.kv_cache import kept
from mllm.loading import ROOT, checkpoint
from mllm.minilm import minilm_folder
from mllm.smol import cache_folder, smollm2_folder

MICRO = ROOT / "assets" / "micro_llava"


def backbone_folder(name: str) -> str:
    """The folder or hub id behind a name; `micro` is made on first use.

    Raises:
        ValueError: it has to be made first (says how), or looks like a folder that is not there.
    """
    if name == "smollm2":
        return str(smollm2_folder())
    if name == "minilm":
        return str(minilm_folder())
    if name == "micro":
        return str(micro_folder())
    return checkpoint(name)


def micro_folder(source: Path = MICRO) -> Path:
    """The embedded model's language model with its tokenizer, in the cache; named by the weights it came from."""
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()[:16]
    target = cache_folder() / f"micro_lm-{digest}"
    if target.is_dir():
        return target
    whole = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    config = whole.config.get_text_config()
    text = AutoModelForCausalLM.from_config(config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.generation_config = whole.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".micro-", dir=target.parent) as work:
        made = Path(work) / "made"
        text.save_pretrained(made)
        AutoTokenizer.from_pretrained(source).save_pretrained(made)
        try:
            made.replace(target)
        except OSError:  # another process was faster: what it made is the same
            shutil.rmtree(made)
    return target


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """A fast tokenizer that can pad.

    Raises:
        ValueError: none is there, or it is a slow one (it gives no character offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no tokenizer ({str(error).splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{source}: its tokenizer is a slow one; a fast one (tokenizer.json) is needed")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_classifier(source: str, tokenizer: Any, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """A sequence classifier of ONE output; a backbone without a head gets a fresh one (seed torch before)."""
    model = _load(AutoModelForSequenceClassification, source, dtype, revision, num_labels=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # decoders pool at the last token that is none
    return model


def load_headless(source: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """The backbone alone."""
    return _load(AutoModel, source, dtype, revision)


def load_causal(source: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """A causal language model."""
    return _load(AutoModelForCausalLM, source, dtype, revision)


def merge_adapter(model: PreTrainedModel, adapter: str, revision: str | None = None) -> PreTrainedModel:
    """The model with the adapter's weights added to its own.

    Raises:
        ValueError: no adapter in safetensors is there, or it does not fit.
    """
    try:
        return PeftModel.from_pretrained(model, adapter, revision=revision).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{adapter}: the adapter cannot be loaded ({str(error).splitlines()[0]})") from error


@torch.no_grad()
def is_decoder(model: Any) -> bool:
    """Whether a token sees only what stands before it and a key-value cache is kept. Tried out, not read off a name."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    out = model.base_model(input_ids=ids, use_cache=True)
    first, other = out.last_hidden_state[:, 0]
    return bool((first - other).abs().max() < 1e-3) and kept(out) is not None


def _load(auto: Any, source: str, dtype: torch.dtype, revision: str | None, **settings: Any) -> PreTrainedModel:
    disable_progress_bar()
    try:
        return auto.from_pretrained(
            source, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False, **settings
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be loaded ({str(error).splitlines()[0]})") from error
