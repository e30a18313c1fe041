"""Models of a given shape without a hub: config.json, a tokenizer and a processor, and weights only where asked for.

    python -m scripts.bench.shapes llava_1_5_7b FOLDER                # no weights: enough for plan=true
    python -m scripts.bench.shapes llava_small FOLDER --weights       # random ones

    llava_1_5_7b   LLaVA 1.5 7B: CLIP-L/336, Llama 2 7B, 576 image tokens (https://huggingface.co/llava-hf/llava-1.5-7b-hf)
    llava_small    the same picture (576 tokens) before a language model that two CPU cores can train: 42 M parameters

The vocabulary has 32,064 entries in both: the words `w0`, `w1`, ... and those of this project's prompts, so that a text
of n words is a text of n tokens. Random weights say nothing about quality, and all about time and memory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForMultimodalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.schema import Prompts
from datamodules.micro_world import records

SIDE, PATCH, VOCABULARY = 336, 14, 32064
TOWER_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWER_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
SHAPES = {"llava_1_5_7b": (TOWER_LARGE, LLAMA_7B, False), "llava_small": (TOWER_SMALL, LLAMA_SMALL, True)}
"""Tower, language model, and whether the token embeddings are also the output layer."""
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def config_of(name: str) -> LlavaConfig:
    """Raises KeyError for an unknown shape."""
    tower, llama, tied = SHAPES[name]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=768, **tower),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            tie_word_embeddings=tied, **llama,
        ),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=tied,
    )  # fmt: skip


def processor_of() -> LlavaProcessor:
    """Its tokenizer splits at white space and punctuation and knows every word of the micro world."""
    prompts = " ".join(str(value) for value in vars(Prompts()).values())
    texts = [prompts, *(f"{r.question} {r.chosen} {r.rejected} {r.concept}" for r in records("train", 400, 400))]
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(texts).lower())))
    known = [*SPECIAL, *words]
    known += [f"w{i}" for i in range(VOCABULARY - len(known))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False, lstrip=True) for word in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=4096,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def random_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """Weights as transformers draws them for training from scratch."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForMultimodalLM.from_config(config_of(name), dtype=dtype).eval()


def write(name: str, folder: Path, weights: bool) -> Path:
    """Makes the folder, as `from_pretrained` and `model.path` take it."""
    folder.mkdir(parents=True, exist_ok=True)
    processor_of().save_pretrained(folder)
    if weights:
        random_model(name).save_pretrained(folder)
    else:
        text = config_of(name).to_json_string()
        (folder / "config.json").write_text(json.dumps(json.loads(text) | {"dtype": "float32"}, indent=1) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true", help="random ones, from seed 0")
    args = parser.parse_args()
    print(write(args.shape, args.folder, args.weights))


if __name__ == "__main__":
    main()
