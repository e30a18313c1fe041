"""Stage `pretrain_tower`: the embedded model's tower learns to read or to hear (lightning_modules/micro_tower.py)."""

from __future__ import annotations

import random

import lightning as L
import torch
from safetensors.torch import save_file

from callbacks.interruption import checkpoints, last_checkpoint
from callbacks.training_progress import TrainingProgress
from configs.schema import Config
from datamodules.micro_lessons import all_texts
from datamodules.micro_media import MicroMedium, caption_sizes, micro_medium
from datamodules.micro_stream import StreamDataModule
from datamodules.micro_world import FIRST_WORDS, OBJECTS, phrases
from lightning_modules.micro_tower import MicroTower
from mllm.micro_blueprints import Blueprint, blueprint
from mllm.micro_tokenizer import words_of
from stages.runs import Run
from stages.trainers import trainer


def run(cfg: Config, run: Run) -> None:
    """Writes `pretrain_tower/tower.safetensors`."""
    keys = [f"pretrain.tower_{key}" for key in ("steps", "batch_size", "lr")]
    keys += ["model.plugin"] if cfg.model.plugin else []  # none: a run from before there were plugins can be resumed
    stage = run.stage("pretrain_tower", run.settings("seed", "trainer.precision", "model.modality", *keys))
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    m = cfg.model
    made, medium = blueprint(m.modality, m.plugin), micro_medium(m.modality, m.plugin)
    model = made.build_model(made.build_processor(words_of(all_texts(cfg.model.prompts, medium))))
    tower, p = made.tower(model), cfg.pretrain
    module = MicroTower(
        tower,
        made.states,
        width(made, tower, medium),
        medium.local,
        caption_sizes(medium),
        total_steps=p.tower_steps,
        lr=p.tower_lr,
    )
    data = StreamDataModule(medium.tower_stream(p.tower_batch_size, p.tower_steps, cfg.seed), p.num_workers)
    folder = stage.folder / "checkpoints"
    callbacks = [*checkpoints(folder, p.checkpoint_every_steps), TrainingProgress("tower")]
    fitting = trainer(
        cfg,
        stage.folder,
        "pretrain_tower",
        callbacks,
        max_steps=p.tower_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
    )
    fitting.fit(module, data, ckpt_path=last_checkpoint(folder), weights_only=True)
    accuracy = heldout_accuracy(module, medium)
    save_file({k: v.contiguous() for k, v in module.tower.state_dict().items()}, stage.folder / "tower.safetensors")
    stage.finish({"heldout_named": accuracy})


@torch.no_grad()
def width(made: Blueprint, tower: torch.nn.Module, medium: MicroMedium) -> int:
    """Of the tower's states; what a configuration calls it differs from family to family."""
    return made.states(tower, medium.tower_inputs(medium.blanks(1)))[0].shape[-1]


@torch.no_grad()
def heldout_accuracy(module: MicroTower, medium: MicroMedium) -> float:
    """Share of media whose positions name both words: held-out phrases, test conditions."""
    module.eval()
    rng = random.Random(0)
    chosen = phrases("heldout")
    inputs = medium.tower_inputs([medium.draw(p.words, rng.choice(medium.styles), rng, test=True) for p in chosen])
    first = torch.tensor([FIRST_WORDS.index(p.first) for p in chosen])
    thing = torch.tensor([OBJECTS.index(p.object) for p in chosen])
    return float(module.named(inputs, first, thing).float().mean())
