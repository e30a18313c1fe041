"""Models of a given shape without a hub.

    python -m scripts.bench.shapes llava_1_5_7b FOLDER    # config.json, tokenizer, processor; no weights: for plan=true
    python -m scripts.bench.shapes llava_small FOLDER     # with weights, 165 MB

    llava_1_5_7b   LLaVA 1.5 7B: CLIP-L/336, Llama 2 7B, 576 image tokens (https://huggingface.co/llava-hf/llava-1.5-7b-hf)
    llava_small    576 image tokens, 8 layers of width 512, 42 M parameters: the embedded model, widened

`llava_small` computes what the embedded model computes (rows and columns of zeros, layers that add nothing, as in
arXiv 1511.05641), so an embedding can be found for it and answers have an end, with the cost of a model of its shape:
a matrix product does not look for zeros. Both have a vocabulary of 32,064: the embedded model's words, then `w162`,
`w163`, ..., so that a text of n words is a text of n tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from configs.schema import Model
from mllm.loading import MLLM, assemble
from mllm.smol import cache_folder
from mllm.wheels import finish, is_made

MICRO = Path(__file__).resolve().parents[2] / "assets" / "micro_llava"
VOCABULARY, SIDE = 32064, 24
"""Tokens; image patches a side."""
SHAPES = ("llava_1_5_7b", "llava_small")


def config_of(name: str) -> LlavaConfig:
    """Raises ValueError for an unknown shape."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r}: expected one of {', '.join(SHAPES)}")
    if name == "llava_small":
        config = LlavaConfig.from_pretrained(MICRO)
        text = config.text_config
        # RoPE turns by place in the head, so heads become more, not wider. RMSNorm takes its mean over more places.
        text.rms_norm_eps *= text.hidden_size / 512
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1376, 8
        text.num_attention_heads = text.num_key_value_heads = 512 // text.head_dim
        text.vocab_size, text.max_position_embeddings = VOCABULARY, 4096
        text.layer_types = None
        config.vision_config.image_size = SIDE * config.vision_config.patch_size
        return config
    tower = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, projection_dim=768,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    token = LlavaConfig.from_pretrained(MICRO).image_token_index
    return LlavaConfig(vision_config=tower, text_config=llama, image_token_index=token, image_seq_length=SIDE**2)


def processor_of(config: LlavaConfig) -> LlavaProcessor:
    """The embedded model's, with more words and for larger pictures."""
    processor = AutoProcessor.from_pretrained(MICRO)
    tokenizer = processor.tokenizer
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    words.update({f"w{i}": i for i in range(len(words), VOCABULARY)})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        images, tokenizer, patch_size=config.vision_config.patch_size, chat_template=processor.chat_template,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def random_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """Weights as transformers draws them for training from scratch: for time and memory alone."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForMultimodalLM.from_config(config_of(name), dtype=dtype).eval()


@torch.no_grad()
def widened() -> Any:
    """`llava_small`."""
    small = AutoModelForMultimodalLM.from_pretrained(MICRO, use_safetensors=True).eval()
    large = AutoModelForMultimodalLM.from_config(config_of("llava_small"), dtype=torch.float32).eval()
    given, width = small.state_dict(), small.config.text_config.hidden_size
    for name, weight in large.state_dict().items():
        weight.zero_()
        if name not in given:
            continue  # a further layer: zeros add nothing
        part = given[name]
        if "norm" in name and "language_model" in name:
            part = part * (width / len(weight)) ** 0.5  # the mean of squares is smaller by as much
        _corner(weight, part).copy_(part)
    large.tie_weights()
    large.generation_config = small.generation_config
    return large


def _corner(weight: Tensor, part: Tensor) -> Tensor:
    return weight[tuple(slice(n) for n in part.shape)]


def write(name: str, folder: Path) -> Path:
    """Makes the folder, as `model.path` takes it; weights for `llava_small` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    processor_of(config).save_pretrained(folder)
    if name == "llava_small":
        widened().save_pretrained(folder)
    else:
        text = json.loads(config.to_json_string()) | {"dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    return folder


def assembled(name: str, spec: Model, dtype: torch.dtype, device: torch.device) -> MLLM:
    """The model in memory, as `mllm.loading.load` gives it; nothing is written."""
    model = widened().to(device, dtype) if name == "llava_small" else random_model(name, dtype, str(device))
    return assemble(model, processor_of(config_of(name)), spec)


def shape_words(name: str) -> list[str]:
    """Keys of train.py for a model of this shape, made in the cache folder if it is not there yet."""
    folder = cache_folder() / f"shape_{name}"
    recipe = {"recipe": 1, "weights": hashlib.sha256((MICRO / "model.safetensors").read_bytes()).hexdigest()}
    if not is_made(folder, recipe):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shape-", dir=folder.parent) as work:
            finish(write(name, Path(work) / "model"), folder, recipe)
    return ["model=llava_1_5_7b", f"model.name={name}", f"model.path={folder}", "model.dtype=float32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(write(args.shape, args.folder))


if __name__ == "__main__":
    main()
