"""Stage `pretrain_language`: projector and language model learn to answer about what the tower reads.

The frozen tower's features of every phrase in every style are computed once; then two phases of SFT on them with
everything but the tower trainable: ordinary, and robust (with attacks on the features, lightning_modules/aligner.py)
with a fresh optimiser, which begins with the style alone. Writes a complete checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from callbacks.interruption import checkpoints, last_checkpoint
from callbacks.progress import Progress
from callbacks.training_progress import TrainingProgress
from configs.schema import Config
from datamodules.alignment import AlignmentBatch
from datamodules.micro_lessons import BLANKS, Lessons, all_texts, lesson
from datamodules.micro_media import MicroMedium, micro_medium
from datamodules.micro_world import PHRASES, phrases
from evaluation.phrases import words_of as words_in
from lightning_modules.sft_aligner import SFTAligner
from mllm.generate import answer
from mllm.loading import MLLM, assemble, to_device
from mllm.media import media_arguments
from mllm.micro_blueprints import blueprint
from mllm.micro_tokenizer import words_of
from mllm.prompts import encode_text
from stages.runs import Run
from stages.trainers import device_of, trainer


class LessonsDataModule(L.LightningDataModule):
    def __init__(self, lessons: Lessons) -> None:
        super().__init__()
        self.lessons = lessons

    def train_dataloader(self) -> DataLoader[AlignmentBatch]:
        assert self.trainer is not None
        self.lessons.start = self.trainer.global_step
        return DataLoader(self.lessons, batch_size=None)


def run(cfg: Config, run: Run) -> None:
    """Writes `pretrain_language/model`, a folder for plain `from_pretrained`."""
    keys = [f"pretrain.language_{key}" for key in ("steps", "pictures", "lessons", "noise", "lr")]
    keys += [f"pretrain.robust_{key}" for key in ("steps", "lessons", "noise", "radius", "lr", "style_steps")]
    keys += ["pretrain.shared_noise", "trainer.precision", *(["model.plugin"] if cfg.model.plugin else [])]
    stage = run.stage(
        "pretrain_language", run.settings("seed", "model.prompts", "pretrain.draws", *keys), after=["pretrain_tower"]
    )
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    p = cfg.pretrain
    m = cfg.model
    made, medium = blueprint(m.modality, m.plugin), micro_medium(m.modality, m.plugin)
    processor = made.build_processor(words_of(all_texts(cfg.model.prompts, medium)))
    model: Any = made.build_model(processor)
    made.tower(model).load_state_dict(load_file(run.path / "pretrain_tower" / "tower.safetensors"))
    mllm = assemble(model.to(device_of(cfg)), processor, cfg.model)
    bank, blanks = features(mllm, medium, p.draws, cfg.seed)
    encoder = tuple(f"{name}." for name in mllm.anchor.encoder_modules)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(encoder))
    (path,) = cfg.model.projector
    media_ids = sorted(mllm.anchor.media_token_ids)

    def phase(name: str, module: SFTAligner, each: int, noise: float, style_alone: int = 0) -> None:
        lessons = Lessons(
            bank,
            blanks,
            path,
            mllm.prompts,
            media_ids,
            cfg.model.prompts,
            medium,
            p.language_pictures,
            module.steps,
            cfg.seed,
            each,
            noise,
            p.shared_noise,
            style_alone,
        )
        folder = stage.folder / "checkpoints" / name
        callbacks = [*checkpoints(folder, p.checkpoint_every_steps), TrainingProgress(name)]
        fitting = trainer(cfg, stage.folder, name, callbacks, part=name, max_steps=module.steps, max_epochs=-1)
        fitting.fit(module, LessonsDataModule(lessons), ckpt_path=last_checkpoint(folder), weights_only=True)

    common: dict[str, Any] = {"micro_batch_size": p.language_pictures * 6, "weight_decay": 0.01}
    reading = SFTAligner(
        mllm, model, steps=p.language_steps, lr=p.language_lr, warmup_steps=p.language_steps // 15, **common
    )
    phase("language", reading, p.language_lessons, p.language_noise)
    robust = SFTAligner(
        mllm,
        model,
        steps=p.robust_steps,
        lr=p.robust_lr,
        warmup_steps=p.robust_steps // 15,
        attack_radius=p.robust_radius,
        calm_steps=p.robust_style_steps,
        **common,
    )
    phase("robust", robust, p.robust_lessons, p.robust_noise, p.robust_style_steps)
    model.eval().save_pretrained(stage.folder / "model")
    processor.save_pretrained(stage.folder / "model")
    stage.finish({f"heldout_{kind}": share for kind, share in lesson_accuracy(mllm, medium, cfg.seed).items()})


@torch.no_grad()
def features(mllm: MLLM, medium: MicroMedium, draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """M's output for all phrases in all styles [draws, phrases, styles, *one item]; for blanks [BLANKS, *one item]."""
    rng, parts, size = random.Random(seed), [], 64
    asked = [(p.words, style) for _ in range(draws) for p in PHRASES for style in medium.styles]
    with Progress("encode media", len(asked), "media") as progress:
        for at in range(0, len(asked), size):
            part = encode(mllm, [medium.draw(words, style, rng, test=False) for words, style in asked[at : at + size]])
            parts.append(part.half())  # half the memory; noise is added to them anyhow
            progress.advance(len(part))
    bank = torch.cat(parts).view(draws, len(PHRASES), len(medium.styles), *parts[0].shape[1:])
    return bank, encode(mllm, medium.blanks(BLANKS))


def encode(mllm: MLLM, media: Sequence[Any]) -> torch.Tensor:
    """M's output for media of the blank's shape, [n, *shape of one item]."""
    texts = [mllm.prompts.text(".", media=True)] * len(media)
    inputs = encode_text(mllm.processor, texts, media_arguments(mllm.spec, mllm.processor, media))
    (E,) = mllm.anchor.observe(**to_device(inputs, mllm.model.device)).values()
    (shape,) = mllm.shapes.values()
    return E.cpu().view(len(media), *shape)


def lesson_accuracy(mllm: MLLM, medium: MicroMedium, seed: int) -> dict[str, float]:
    """Share of held-out phrases, under test conditions, answered word for word, by kind of lesson."""
    rng, shares = random.Random(seed), {}
    chosen = phrases("heldout")
    styles = [rng.choice(medium.styles) for _ in chosen]
    drawn = [medium.draw(p.words, style, rng, test=True) for p, style in zip(chosen, styles, strict=True)]
    for kind in ("describe", "style", "verify", "read", "plain", "prefixed", "text"):
        asked = [lesson(kind, p, style, 0, mllm.spec.prompts, medium) for p, style in zip(chosen, styles, strict=True)]
        hits = 0
        for at in range(0, len(asked), 56):
            part = asked[at : at + 56]
            media = drawn[at : at + 56] if part[0][2] else None
            answers = answer(mllm, [a[0] for a in part], media, 40)
            hits += sum(words_in(given) == words_in(a[1]) for given, a in zip(answers, part, strict=True))
        shares[kind] = hits / len(asked)
    return shares
