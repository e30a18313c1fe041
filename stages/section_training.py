"""Trains the head on section means (mllm/sections.py) with cross-fitting: no question is lost to validation.

The questions of the training and the validation part are dealt into `detector.folds` folds. For each fold a head
learns from all other folds and scores the fold's texts, so calibration and threshold rest on scores of *every* one of
these questions by a head that did not know it. The head that is kept learns from all of them. (Cross-fitted
calibration as in scikit-learn's CalibratedClassifierCV with ensemble=False.)
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Config
from datamodules.qa_batches import QuestionBatches, QuestionTexts, StepDataModule
from lightning_modules.at_work import AtWork
from lightning_modules.detector_losses import DetectorLoss
from lightning_modules.harm_detector import HarmDetector
from mllm.sections import SectionClassifier, SectionHead
from stages.runs import Stage
from stages.section_bank import section_means
from stages.text_training import fit, harmful_weight, steps_of


class Trained(NamedTuple):
    """head: of all questions that are not for the test, which are `questions`. unseen_N: logit of each of their texts
    by a head that did not learn from its question. means_M: what the head is given for the texts of the test part."""

    head: SectionHead
    questions: list[QuestionTexts]
    unseen_N: Tensor
    means_M: Tensor


def train_head(
    cfg: Config,
    stage: Stage,
    backbone: PreTrainedModel,
    questions: list[QuestionTexts],
    test: Sequence[QuestionTexts],
    pad_id: int,
) -> Trained:
    """Reads all texts (or takes their means from the cache), then trains one head for each fold and the one to keep.

    Raises:
        ValueError: detector.layers names a layer that is not there, or there are fewer questions than folds.
    """
    d = cfg.detector
    width = 2 * len(d.layers) * backbone.config.get_text_config().hidden_size
    try:
        model = SectionClassifier(backbone.eval().requires_grad_(False), d.layers, SectionHead(width, 1))
    except ValueError as error:
        raise ValueError(f"detector.{error}; name some of these, or take detector=default") from None
    texts = [ids for part in (questions, test) for q in part for ids in q.ids]
    n = sum(len(q.ids) for q in questions)
    means_N, means_M = section_means(model, texts, pad_id, d.score_batch_size).split([n, len(texts) - n])
    unseen_N = torch.zeros(n)
    for number, fold in enumerate(folds(questions, d.folds, cfg.seed)):
        rest = sorted(set(range(len(questions))) - set(fold))
        head = trained(cfg, stage, f"fold {number + 1} of {d.folds}", questions, rest, means_N)
        rows = rows_of(questions, fold)
        unseen_N[rows] = logits(head, means_N[rows])
    head = trained(cfg, stage, "", questions, list(range(len(questions))), means_N)
    return Trained(head, questions, unseen_N, means_M)


def folds(questions: Sequence[QuestionTexts], n: int, seed: int) -> list[list[int]]:
    """Indices of the questions of each fold; what belongs to one question is in one fold."""
    groups = sorted({q.group for q in questions})
    if len(groups) < n:
        raise ValueError(f"detector.folds={n}: there are {len(groups)} questions for training; set a smaller number")
    random.Random(f"{seed}/folds").shuffle(groups)
    number = {group: i % n for i, group in enumerate(groups)}
    return [[i for i, q in enumerate(questions) if number[q.group] == k] for k in range(n)]


def rows_of(questions: Sequence[QuestionTexts], chosen: Sequence[int]) -> list[int]:
    """Where the texts of these questions stand among the texts of all."""
    starts, at = [], 0
    for q in questions:
        starts.append(at)
        at += len(q.ids)
    return [starts[i] + k for i in chosen for k in range(len(questions[i].ids))]


def trained(
    cfg: Config, stage: Stage, name: str, questions: Sequence[QuestionTexts], chosen: Sequence[int], means_N: Tensor
) -> SectionHead:
    """A head that learned from the chosen questions; from its file if an interrupted attempt got that far."""
    d = cfg.detector
    pooled = means_N[rows_of(questions, chosen)]
    torch.manual_seed(cfg.seed)
    head = SectionHead(pooled.shape[1], d.hidden, d.dropout)
    part = [questions[i] for i in chosen]
    # By what it learns from: data that grew between two attempts must not meet a head that knows the wrong questions.
    learned = [(q.group, q.labels, q.pairs) for q in part]
    digest = hashlib.sha256(pooled.numpy().tobytes() + repr(learned).encode()).hexdigest()[:12]
    file = stage.folder / "folds" / f"{name.replace(' ', '_') or 'all'}-{digest}.safetensors"
    if file.exists():
        head.load_state_dict(load_file(file))
        return head.eval()
    head.standardise(pooled)
    steps = steps_of(d.epochs, len(part), d.batch_size)
    module = HarmDetector(
        head.train(),
        cast(DetectorLoss, d.loss),
        steps,
        d.lr,
        warmup_steps=round(d.warmup * steps),
        weight_decay=d.weight_decay,
        harmful_weight=harmful_weight(part) if d.harmful_weight is None else d.harmful_weight,
        pooled=pooled,
    )
    module.at_work = AtWork(stage.name, {"detector.batch_size": d.batch_size})
    batches = StepDataModule(QuestionBatches(part, d.batch_size, steps, cfg.seed, pad_id=0))
    fit(cfg, stage, module, batches, steps, d.checkpoint_every_steps, d.grad_clip, name, digest)
    file.parent.mkdir(exist_ok=True)
    part_file = file.with_suffix(f".{os.getpid()}")  # a kill leaves no half file under the name
    save_file({key: weight.float().cpu().contiguous() for key, weight in head.state_dict().items()}, part_file)
    part_file.replace(file)
    return head.eval()


@torch.no_grad()
def logits(head: SectionHead, means_N: Tensor) -> Tensor:
    """float32 [N] on the CPU."""
    device = head.mean.device
    return head(means_N.to(device))[:, 0].float().cpu()
