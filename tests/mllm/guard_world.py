"""A small real detector and detoxifier for the guard's tests, which know one marker word.

The world has a hundred words; an answer that holds `MARKER` is "harmful". Nothing here is about real harm.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mllm.detector import Detector, DetectorSpec
from mllm.detoxifier import Detoxifier, DetoxifierSpec
from mllm.sections import SectionClassifier, SectionHead

MARKER = "xyzzy"
WORDS = [f"w{n}" for n in range(90)]
SAFE = "this is fine ."
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def words(n: int, seed: int = 0, marker_at: int | None = None) -> str:
    """n words in sentences of eight; the marker at that place."""
    rng = random.Random(seed)
    chosen = rng.choices(WORDS, k=n)
    if marker_at is not None:
        chosen[marker_at] = MARKER
    return " ".join(w + ("." if (i + 1) % 8 == 0 else "") for i, w in enumerate(chosen))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<unk>", "<eos>", *WORDS, MARKER, *"this is fine . ? : Question Answer Original".split()]
    vocabulary += ["response", "Harmless", "\n"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=4096
    )


@functools.lru_cache(maxsize=1)
def detector_folder() -> Path:
    """A causal detector that flags the marker, its weights set by hand: nothing to train, nothing to go wrong.

    Attention looks at all tokens alike, so its value is the marker's share of the text; that goes, a thousandfold, into
    dimension 2. Dimension 0 is 1 for every token. The head weighs one against the other.
    """
    tok = tokenizer()
    config = LlamaConfig(vocab_size=len(tok), num_labels=1, pad_token_id=0, max_position_embeddings=1024, **SHAPE)
    model = LlamaForSequenceClassification(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.zero_()
    embedding, attention = model.get_input_embeddings().weight, model.model.layers[0].self_attn
    embedding[:, 0] = 1.0
    embedding[tok.convert_tokens_to_ids(MARKER), 1] = 1.0
    attention.v_proj.weight[0, 1] = 1000.0
    attention.o_proj.weight[2, 0] = 1.0
    model.score.weight[0, 0], model.score.weight[0, 2] = 1.0, -1.0
    folder = Path(tempfile.mkdtemp(prefix="guard-detector-"))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    spec().save(folder)
    return folder


def spec(**changes: Any) -> DetectorSpec:
    return DetectorSpec(**{"max_length": 128, "max_question": 32, "threshold": 0.5, **changes})


def detector() -> Detector:
    """A fresh one, which a test may damage."""
    return Detector.load(detector_folder())


def random_detector(config: PreTrainedConfig | None = None) -> Detector:
    """A decoder of random weights, so large that a wrong mask or position shows. It flags nothing."""
    torch.manual_seed(0)
    tok = tokenizer()
    config = config or LlamaConfig(max_position_embeddings=1024, **SHAPE)
    config.vocab_size, config.pad_token_id, config.num_labels = len(tok), 0, 1
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return Detector(model, tok, spec(threshold=0.0))


def section_detector(config: PreTrainedConfig | None = None) -> Detector:
    """A random head on section means of a backbone of random weights."""
    torch.manual_seed(0)
    tok = tokenizer()
    config = config or LlamaConfig(max_position_embeddings=1024, **{**SHAPE, "num_hidden_layers": 3})
    config.vocab_size, config.pad_token_id = len(tok), 0
    backbone = AutoModel.from_config(config)
    for parameter in backbone.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    head = SectionHead(4 * SHAPE["hidden_size"], 16)
    return Detector(SectionClassifier(backbone, [1, 2], head), tok, spec(threshold=0.0, layers=(1, 2), hidden=16))


def encoder_detector() -> Detector:
    """An untrained bidirectional one: its scores mean nothing, but they are exact."""
    torch.manual_seed(1)
    tok = tokenizer()
    config = BertConfig(vocab_size=len(tok), num_labels=1, pad_token_id=0, max_position_embeddings=256, **SHAPE)
    return Detector(BertForSequenceClassification(config), tok, spec(threshold=0.0))


def detoxifier(target: str = SAFE) -> Detoxifier:
    """One that rewrites everything to `target`."""
    return Detoxifier.load(detoxifier_folder(target))


@functools.lru_cache(maxsize=2)
def detoxifier_folder(target: str = SAFE) -> Path:
    torch.manual_seed(0)
    tok = tokenizer()
    config = LlamaConfig(vocab_size=len(tok), pad_token_id=0, eos_token_id=2, max_position_embeddings=1024, **SHAPE)
    model = LlamaForCausalLM(config)
    s = DetoxifierSpec(max_length=128, max_question=32)
    template = Detoxifier(model, tok, s).template
    model.train().requires_grad_(True)
    wanted = [*tok(target)["input_ids"], 2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        prompt = template.encode("w1 ?", words(1 + step % 30, step, 0))
        ids = torch.tensor([prompt + wanted])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits, torch.tensor(wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder := Path(tempfile.mkdtemp(prefix="guard-detoxifier-")))
    tok.save_pretrained(folder)
    s.save(folder)
    return folder
