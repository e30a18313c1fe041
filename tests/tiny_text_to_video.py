"""A random text-to-video pipeline of `diffusers` in a folder, of about 100 kB: the real classes, tiny sizes.

python -m tests.tiny_text_to_video FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def tiny_text_to_video(folder: Path) -> Path:
    """Saves the pipeline (safetensors) and returns its folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    pipeline = TextToVideoSDPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=400,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=188,
                eos_token_id=189,
            )
        ),
        tokenizer=CLIPTokenizer(*letters(folder), model_max_length=77),
        unet=UNet3DConditionModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def letters(folder: Path) -> tuple[str, str]:
    """A CLIP vocabulary of single letters, and no merges."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


if __name__ == "__main__":
    print(tiny_text_to_video(Path(sys.argv[1])))
