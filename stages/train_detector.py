"""Stage `train_detector`: trains the harm detector, calibrates it on validation questions, measures it on others.

Writes `train_detector/detector`: weights (a PEFT adapter, or all), tokenizer and detector.json. Scores for calibration
and test come from that folder through `mllm.detector.Detector`, the code that users run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from callbacks.progress import Progress
from callbacks.report_logger import log_values
from callbacks.wandb_artifacts import log_artifact
from configs.schema import Config
from datamodules.qa_batches import QuestionBatches, QuestionTexts, StepDataModule, encode_questions
from datamodules.qa_pairs import Part, QAPair
from evaluation.detector_metrics import DetectorMetrics, calibrate
from evaluation.objective import detector_objective
from lightning_modules.at_work import AtWork
from lightning_modules.detector_losses import DetectorLoss
from lightning_modules.harm_detector import HarmDetector
from mllm.backbones import backbone_folder, load_classifier, load_headless, load_tokenizer
from mllm.detector import HEAD, Detector, DetectorSpec
from mllm.frozen_layers import LowerLayers
from mllm.qa_text import QATemplate
from mllm.recomputing import recompute_activations
from mllm.sections import SectionClassifier
from mllm.sharding import whole_weights
from stages.runs import Run, Stage
from stages.section_training import logits, train_head
from stages.text_training import adapted, export, fit, harmful_weight, question_parts, steps_of, versions
from stages.trainers import device_of

log = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = ("auroc", "pair_accuracy", "ece", "recall_at_1_percent_fpr", "recall_at_5_percent_fpr")


class Parts(NamedTuple):
    """Encoded questions by part."""

    train: list[QuestionTexts]
    val: list[QuestionTexts]
    test: list[QuestionTexts]


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for data or a backbone that is missing or does not fit."""
    settings = run.settings("seed", "data", "pairs", "backbone", "detector", "trainer.precision")
    stage = run.stage("train_detector", settings)
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    d, b = cfg.detector, cfg.backbone
    source = backbone_folder(b.path)
    tokenizer = load_tokenizer(source, b.revision)
    pairs = question_parts(cfg)
    template = QATemplate(d.template, tokenizer, d.max_length, d.max_question)
    parts = encoded(pairs, template)
    dtype = getattr(torch, b.dtype)
    if d.layers:
        backbone = load_headless(source, dtype, b.revision).to(device_of(cfg))
        found = train_head(cfg, stage, backbone, parts.train + parts.val, parts.test, tokenizer.pad_token_id)
    else:
        model = load_classifier(source, tokenizer, dtype, b.revision).to(device_of(cfg))
        module = train_classifier(cfg, stage, model, parts.train, tokenizer.pad_token_id)
        weights = whole_weights(module.model)  # by every rank: weights in shards are fetched by all together
    result: dict[str, Any] = {}
    if run.leader:
        folder = stage.folder / "detector"
        if d.layers:
            export_head(found.head, tokenizer, folder)
            detector = written(cfg, folder, facts(cfg, pairs, template))
            unseen = found.questions, found.unseen_N
            test = parts.test, head_logits(detector, parts.test, found.means_M)
        else:
            export(module.model, tokenizer, folder, b.path, b.full_finetune, weights)
            detector = written(cfg, folder, facts(cfg, pairs, template))
            unseen = parts.val, logits_of(detector, parts.val, d.score_batch_size)
            test = parts.test, logits_of(detector, parts.test, d.score_batch_size)
        result = calibrated(cfg, folder, detector, unseen, test)
        result |= {"cuts": asdict(template.cuts), "questions": [len(part) for part in parts]}
        told = ", ".join(f"{name} {result['test'][name]:.3f}" for name in SHOWN if name in result["test"])
        log.info("test questions: %s", told)
        values = {f"eval/detector/{part}/{name}": v for part in ("val", "test") for name, v in result[part].items()}
        values["objective/detector"] = detector_objective(result["val"])  # the test questions are not tuned on
        log_values(cfg, run.path, stage.folder, values)
        log_artifact(cfg, run.path, "detector", folder, {"test": result["test"]})
    stage.finish(result)


def encoded(pairs: dict[Part, list[QAPair]], template: QATemplate) -> Parts:
    """Token ids of all parts; says what truncation did."""
    parts = Parts(*(encode_questions(pairs[name], template.encode) for name in ("train", "val", "test")))
    cuts = template.cuts
    log.info(
        "%d texts of %d questions; cut to max_length: the question of %d, the answer of %d",
        len({tuple(ids) for part in parts for q in part for ids in q.ids}),
        len({q.group for part in parts for q in part}),
        cuts.questions,
        cuts.answers,
    )
    return parts


def train_classifier(
    cfg: Config, stage: Stage, model: PreTrainedModel, train: Sequence[QuestionTexts], pad_id: int
) -> HarmDetector:
    """LoRA, or all weights above the frozen layers."""
    d = cfg.detector
    module = detector_module(cfg, model, train, pad_id)
    batches = StepDataModule(QuestionBatches(train, d.batch_size, module.steps, cfg.seed, pad_id))
    module.at_work = AtWork(stage.name, {"detector.batch_size": d.batch_size})
    with nullcontext() if module.lower is None else module.lower.replaced():
        fit(cfg, stage, module, batches, module.steps, d.checkpoint_every_steps, d.grad_clip)
    return module


def detector_module(cfg: Config, model: PreTrainedModel, train: Sequence[QuestionTexts], pad_id: int) -> HarmDetector:
    """The module to be trained; where lower layers are frozen, with their output for every training text."""
    d, b = cfg.detector, cfg.backbone
    net = adapted(model, cfg, d.lora, "SEQ_CLS")
    head = head_of(net)
    for p in head:  # few, fresh, and learnt by small steps: in full precision whatever the rest is
        p.data = p.data.float()
    lower = features = None
    if b.frozen_layers and d.cache_frozen:
        texts = [list(ids) for q in train for ids in q.ids]
        lower = LowerLayers(model.eval(), b.frozen_layers)
        with Progress("frozen layers", len(texts), "texts") as progress:
            features = lower.features(texts, pad_id, d.score_batch_size)
            progress.advance(len(texts))
    net.train()
    if cfg.trainer.activation_checkpointing:
        recompute_activations(net)
    steps = steps_of(d.epochs, len(train), d.batch_size)
    return HarmDetector(
        net,
        cast(DetectorLoss, d.loss),  # configs/check.py has checked it
        steps,
        d.lr,
        head,
        d.head_lr_factor,
        warmup_steps=round(d.warmup * steps),
        weight_decay=d.weight_decay,
        harmful_weight=harmful_weight(train) if d.harmful_weight is None else d.harmful_weight,
        lower=lower,
        features=features,
    )


def export_head(head: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The head in float32, and the tokenizer; the backbone is loaded from where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.float().cpu().contiguous() for name, weight in head.state_dict().items()}, folder / HEAD)
    tokenizer.save_pretrained(folder)


def head_of(net: nn.Module) -> list[nn.Parameter]:
    """The trained weights of the layer of one output."""
    return [p for name, p in net.named_parameters() if p.requires_grad and ("score" in name or "classifier" in name)]


def written(cfg: Config, folder: Path, spec: DetectorSpec) -> Detector:
    """detector.json before calibration, and what is then loaded from the folder: the code that users run."""
    spec.save(folder)
    return Detector.load(folder, device_of(cfg), getattr(torch, cfg.backbone.dtype))


Scored = tuple[Sequence[QuestionTexts], Tensor]
"""Questions, and the logit of each of their texts, [N]."""


def calibrated(cfg: Config, folder: Path, detector: Detector, val: Scored, test: Scored) -> dict[str, Any]:
    """Calibration and threshold by questions that the detector did not learn from; metrics; all of it in detector.json.

    `val` decides, `test` is measured on.
    """
    rate = cfg.detector.false_positive_rate
    fitted = calibrate(*labelled(val[1], val[0]), false_positive_rate=rate)
    spec = replace(detector.spec, **fitted._asdict(), false_positive_rate=rate)
    detector = Detector(detector.model, detector.tokenizer, spec)
    metrics = {
        name: measured(detector.calibrated(logits), questions, spec.threshold)
        for name, (questions, logits) in (("val", val), ("test", test))
    }
    replace(spec, metrics=metrics).save(folder)
    return {**metrics, **fitted._asdict()}


def facts(cfg: Config, pairs: dict[Part, list[QAPair]], template: QATemplate) -> DetectorSpec:
    """detector.json before calibration."""
    b = cfg.backbone
    trained_on = {
        "data": cfg.data.name,
        "seed": cfg.seed,
        "pairs": {part: len(members) for part, members in pairs.items()},
        "backbone": b.name,
    }
    adapter = bool(cfg.detector.layers) or not b.full_finetune  # of what lies in the folder
    return DetectorSpec(
        template=template.text,
        max_length=template.max_length,
        max_question=template.max_question,
        base=b.path if adapter else None,
        base_revision=b.revision if adapter else None,
        loss=cfg.detector.loss,
        layers=tuple(sorted(cfg.detector.layers)),
        hidden=cfg.detector.hidden if cfg.detector.layers else 0,
        versions=versions(),
        trained_on=trained_on,
    )


def logits_of(detector: Detector, questions: Sequence[QuestionTexts], batch_size: int) -> Tensor:
    """The model's output for every text of these questions, in order, [N]."""
    texts = [ids for q in questions for ids in q.ids]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.zeros(len(texts))
    with Progress("score", len(texts), "texts") as progress:
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            out[part] = detector.logits([texts[i] for i in part])
            progress.advance(len(part))
    return out


def head_logits(detector: Detector, questions: Sequence[QuestionTexts], means_N: Tensor) -> Tensor:
    """As `logits_of`, by means that are at hand; the first texts are read too, to prove that the means are theirs."""
    assert isinstance(detector.model, SectionClassifier)
    out = logits(detector.model.head, means_N)
    first = [ids for q in questions for ids in q.ids][:16]
    apart = float((detector.logits(first) - out[: len(first)]).abs().max())
    assert apart < 0.05 * max(1.0, float(out.std())), f"logits by kept means are {apart:.2g} apart"
    return out


def labelled(values: Tensor, questions: Sequence[QuestionTexts]) -> tuple[Tensor, Tensor]:
    """(value, label) of each labelled answer, [L] each; a text in two pairs comes twice."""
    index, label, at = [], [], 0
    for q in questions:
        index += [at + text for text, _ in q.labels]
        label += [int(harmless) for _, harmless in q.labels]
        at += len(q.ids)
    return values[index], torch.tensor(label)


def measured(scores: Tensor, questions: Sequence[QuestionTexts], threshold: float) -> dict[str, float]:
    """All metrics of one part, where a pair that comes again counts again, as in training; ranking also over distinct
    pairs, which is harder: those that come again are those on which annotators agree."""
    found = _measured(scores, questions, threshold)
    once = [replace(q, labels=unique(q.labels), pairs=unique(q.pairs)) for q in questions]
    distinct = _measured(scores, once, threshold)
    return found | {f"{name}_distinct": distinct[name] for name in ("auroc", "pair_accuracy") if name in distinct}


def unique(items: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))


def _measured(scores: Tensor, questions: Sequence[QuestionTexts], threshold: float) -> dict[str, float]:
    metrics = DetectorMetrics(threshold, sync_on_compute=False)
    metrics.update(*labelled(scores, questions))
    better, worse, at = [], [], 0
    for q in questions:
        better += [at + i for i, _ in q.pairs]
        worse += [at + j for _, j in q.pairs]
        at += len(q.ids)
    metrics.update_pairs(scores[better], scores[worse])
    return metrics.compute()
