"""Stage `pretrain_tower`: the embedded model's tower learns to read (lightning_modules/micro_tower.py)."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from callbacks.training_progress import TrainingProgress
from configs.schema import Config
from datamodules.micro_images import draw
from datamodules.micro_lessons import all_texts
from datamodules.micro_pages import LETTERS, PagesDataModule, to_pixels
from datamodules.micro_world import FIRST_WORDS, OBJECTS, STYLES, WORDS, phrases
from lightning_modules.micro_tower import MicroTower
from mllm.micro_llava import build_model, build_processor, words_of
from stages.runs import Run
from stages.trainers import trainer


def run(cfg: Config, run: Run) -> None:
    """Writes `pretrain_tower/tower.safetensors`."""
    keys = [f"pretrain.tower_{key}" for key in ("steps", "batch_size", "lr")]
    stage = run.stage("pretrain_tower", run.settings("seed", "trainer.precision", *keys))
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    model = build_model(build_processor(words_of(all_texts(cfg.model.prompts))))
    p = cfg.pretrain
    module = MicroTower(
        model.model.vision_tower,
        len(WORDS) + 1,
        len(LETTERS),
        len(FIRST_WORDS) + 1,
        len(OBJECTS) + 1,
        len(STYLES) + 1,
        total_steps=p.tower_steps,
        lr=p.tower_lr,
    )
    data = PagesDataModule(p.tower_batch_size, p.tower_steps, cfg.seed, p.num_workers)
    folder = stage.folder / "checkpoints"
    checkpoint = ModelCheckpoint(folder, filename="last", every_n_train_steps=100, enable_version_counter=False)
    callbacks = [checkpoint, TrainingProgress("tower")]
    fitting = trainer(
        cfg, stage.folder, "pretrain_tower", callbacks, max_steps=p.tower_steps, max_epochs=-1, gradient_clip_val=1.0
    )
    last = folder / "last.ckpt"
    fitting.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    accuracy = heldout_accuracy(module)
    save_file({k: v.contiguous() for k, v in module.tower.state_dict().items()}, stage.folder / "tower.safetensors")
    stage.finish({"heldout_named_by_patches": accuracy})


@torch.no_grad()
def heldout_accuracy(module: MicroTower) -> float:
    """Mean share of patches that name both words of their picture: held-out phrases, held-out positions and sizes."""
    module.eval()
    rng = random.Random(0)
    chosen = phrases("heldout")
    pixels = to_pixels([np.asarray(draw(p.words, rng.choice(list(STYLES)), rng, test=True)) for p in chosen])
    first = torch.tensor([FIRST_WORDS.index(p.first) for p in chosen])
    thing = torch.tensor([OBJECTS.index(p.object) for p in chosen])
    return float(module.named_by_patches(pixels, first, thing).mean())
