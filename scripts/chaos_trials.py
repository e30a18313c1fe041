"""What `scripts/chaos.py` starts: every experiment in a small form that trains and writes all that the large one does.

@NAME@    the run directory of the trial NAME, undisturbed (made first)
@run@     the trial's own run directory
@data@    a folder with the trials' data, made from the tests' harmless placeholders
@api@     a server on this machine that answers as a chat model would
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import mm_safetybench, va_questions
from tests.pictures import drawn

EVERY_ROW = ["trainer.log_every_n_steps=1"]
SYNTHESIS = [
    "synthesis.harmful=4", "synthesis.harmless=4", "synthesis.slots=3", "synthesis.checkpoint_every_steps=5",
]  # fmt: skip
VARIANTS = [
    f"variants.{name}.{setting}"
    for name in ("text_sft", "text_dpo", "sea_sft", "sea_dpo")
    for setting in ("steps=5", "checkpoint_every_steps=2", "batch_size=6", "lora.dropout=0.1")
] + ["variants.sea_dpo.embedding_noise=0.1"]  # fmt: skip
ANSWERS = ["evaluate.limit=2", "evaluate.batch_size=3", "evaluate.max_new_tokens=8"]
SEA = [*EVERY_ROW, *SYNTHESIS, *VARIANTS, *ANSWERS]
PRETRAIN = [
    *EVERY_ROW, "pretrain.tower_steps=8", "pretrain.tower_batch_size=4", "pretrain.language_steps=6",
    "pretrain.language_pictures=2", "pretrain.robust_steps=6", "pretrain.robust_style_steps=2", "pretrain.draws=1",
    "pretrain.checkpoint_every_steps=2",
]  # fmt: skip
DETECTOR = [
    *EVERY_ROW, "detector.batch_size=16", "detector.checkpoint_every_steps=2", "detector.max_length=64",
    "detector.max_question=32",
]  # fmt: skip
HEADS = [
    *DETECTOR, "data=micro", "backbone=micro", "detector.layers=[1,2]", "detector.hidden=16", "detector.folds=2",
    "detector.epochs=0.5", "pairs.limit=100", "detector.score_batch_size=128",
]  # fmt: skip
DETOXIFIER = [
    *EVERY_ROW, "detoxifier.checkpoint_every_steps=2", "pairs.limit=100", "detoxifier.evaluate=6",
    "detoxifier.generate_batch_size=3", "detoxifier.detector=@harm_detector_micro@/train_detector/detector",
    "backbone.full_finetune=false", "detoxifier.lora.dropout=0.1",
]  # fmt: skip
BUILD = ["build.workers=1", "build.size=[64,48]", "build.fps=8", "build.word_seconds=0.5"]
ADAPTERS = "evaluate.adapters={sea_sft: @sea_image@/align/sea_sft/adapter}"


class Trial(NamedTuple):
    """An experiment and the keys that make it small. few: pretraining on a few phrases alone."""

    experiment: str
    words: Sequence[str]
    few: bool = False

    @property
    def needs(self) -> list[str]:
        """Names of the trials whose results it reads."""
        found = re.findall(r"@(\w+)@", " ".join(self.words))
        return [name for name in dict.fromkeys(found) if name not in ("run", "data", "api")]


TRIALS = {
    "sea_image": Trial(
        "sea_image", [*SEA, "stages=[synthesize,encode,align,evaluate]", "real.path=@data@/pictures/rows.jsonl",
                      "real.batch_size=2"]),
    "sea_video": Trial("sea_video", [*SEA, "evaluate.benchmarks=[micro]"]),
    "sea_audio": Trial("sea_audio", [*SEA, "evaluate.benchmarks=[micro]"]),
    "full_finetune": Trial(
        "sea_image", [*SEA, "align.variants=[sea_dpo]", "variants.sea_dpo.full_finetune=true",
                      "evaluate.variants=[sea_dpo]", "store.path=@sea_image@/synthesize/store",
                      "stages=[align,evaluate]"]),
    "protector": Trial(
        "protector", [*EVERY_ROW, *ANSWERS, "protector.source=@sea_image@", "protector.batch_size=5",
                      "protector.detector=@harm_detector_micro@/train_detector/detector",
                      "protector.detoxifier=@detoxifier_micro@/train_detoxifier/detoxifier",
                      "protector.max_new_tokens=16"]),
    "harm_detector": Trial("harm_detector", HEADS),
    "harm_detector_micro": Trial("harm_detector_micro", [*DETECTOR, "pairs.limit=100"]),
    "harm_detector_lora": Trial(
        "harm_detector_micro", [*DETECTOR, "pairs.limit=100", "backbone.full_finetune=false",
                                "detector.lora.dropout=0.1", "backbone.frozen_layers=1"]),
    "detoxifier": Trial("detoxifier", [*DETOXIFIER, "data=micro", "backbone=micro", "detoxifier=micro"]),
    "detoxifier_micro": Trial("detoxifier_micro", DETOXIFIER),
    "pretrain_micro": Trial("pretrain_micro", PRETRAIN, few=True),
    "pretrain_micro_video": Trial("pretrain_micro_video", PRETRAIN, few=True),
    "pretrain_micro_audio": Trial("pretrain_micro_audio", PRETRAIN, few=True),
    "utility": Trial("utility", [*ANSWERS, ADAPTERS]),
    "eval_figstep": Trial(
        "eval_figstep", ["evaluate.figstep=@build_figstep@/build_benchmark/data", "evaluate.batch_size=3",
                         "evaluate.max_new_tokens=8"]),
    "eval_mm_safetybench": Trial(
        "eval_mm_safetybench", ["evaluate.mm_safetybench=@data@/mm_images", "evaluate.scenarios=null",
                                "evaluate.batch_size=3", "evaluate.max_new_tokens=8", ADAPTERS]),
    "eval_va_safetybench_video": Trial(
        "eval_va_safetybench_video", ["evaluate.va_safetybench=@build_va_safetybench_video@/build_benchmark/data",
                                      "evaluate.tasks=[text_only,typo]", "evaluate.batch_size=3",
                                      "evaluate.max_new_tokens=8"]),
    "eval_va_safetybench_audio": Trial(
        "eval_va_safetybench_audio", ["evaluate.va_safetybench=@build_va_safetybench_audio@/build_benchmark/data",
                                      "evaluate.batch_size=3", "evaluate.max_new_tokens=8", "media.cut=true",
                                      "media.resample=true"]),
    "build_figstep": Trial("build_figstep", ["build.source=@data@/figstep", "build.workers=1"]),
    "build_mm_safetybench": Trial("build_mm_safetybench", [*BUILD, "build.letters=12", "build.source=@data@/mm"]),
    "build_va_safetybench_video": Trial("build_va_safetybench_video", [*BUILD, "build.source=@data@/va"]),
    "build_va_safetybench_audio": Trial("build_va_safetybench_audio", ["build.workers=1", "build.source=@data@/va"]),
    "export": Trial("export", ["export.adapter=@sea_image@/align/sea_sft/adapter"]),
    "generate_pairs": Trial(
        "generate_pairs", ["generator.scenarios=[fraud,malware]", "generator.questions=3",
                           "generator.questions_per_request=4", "generator.api.base_url=@api@",
                           "generator.api.key_env=", "generator.api.cache_dir=@run@/cache"]),
}  # fmt: skip
"""By name; several may be of one experiment, where it can train in several ways."""


def write_data(folder: Path) -> None:
    """The trials' `@data@`."""
    folder.mkdir(parents=True)
    drawn(folder / "pictures", 8)
    for kind in ("video", "audio"):
        va_questions.write_questions(folder / "va", kind)
    mm_safetybench.write_questions(folder / "mm", 3)
    mm_safetybench.write_images(mm_safetybench.write_questions(folder / "mm_images", 3), 3)
    figstep = folder / "figstep"
    figstep.mkdir()
    rows = [f"ForbidQI,{1 + i % 2},{1 + i // 2},Crafts,How?,Methods to fold {i} paper kites." for i in range(8)]
    names = "dataset,category_id,task_id,category_name,question,instruction"
    (figstep / "safebench.csv").write_text("\n".join([names, *rows]) + "\n")


def few_phrases() -> None:
    """Pretraining encodes every phrase once: a few of them show whether it resumes."""
    import datamodules.micro_lessons
    import stages.pretrain_language

    few = tuple(p for p in datamodules.micro_lessons.PHRASES if p.object in ("passport", "cake"))
    datamodules.micro_lessons.PHRASES = few  # type: ignore[misc]
    stages.pretrain_language.PHRASES = few  # type: ignore[misc]
