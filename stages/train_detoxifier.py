"""Stage `train_detoxifier`: trains the detoxifier, then lets it rewrite harmful answers to questions never seen.

Writes `train_detoxifier/detoxifier`: weights (a PEFT adapter, or all), tokenizer and detoxifier.json, and
`rewritten.jsonl`, one row for each rewritten test answer. What is measured comes from that folder through
`mllm.detoxifier.Detoxifier`, the code that users run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.progress import Progress
from callbacks.report_logger import log_values
from callbacks.wandb_artifacts import log_artifact
from configs.schema import Config
from datamodules.durable import write_durably
from datamodules.qa_batches import StepDataModule
from datamodules.qa_pairs import Part, QAPair
from datamodules.rewriting import RewriteBatches, Rewriting, encode_rewriting, rewritings
from evaluation.objective import detoxifier_objective
from evaluation.rewriting_metrics import numbers, rewriting_metrics
from evaluation.similarity import SentenceSimilarity
from lightning_modules.at_work import AtWork
from lightning_modules.detoxifier import DetoxifierTuner
from mllm.backbones import backbone_folder, load_causal, load_tokenizer
from mllm.detector import Detector
from mllm.detoxifier import Detoxifier, DetoxifierSpec
from mllm.guard import Guard, Guarded
from mllm.qa_text import QATemplate
from mllm.recomputing import recompute_activations
from mllm.sharding import whole_weights
from stages.runs import Run, Stage, write_json
from stages.text_training import adapted, export, fit, question_parts, steps_of, versions
from stages.trainers import device_of

log = logging.getLogger(__name__)

DAY = 86400.0  # seconds: nobody waits for an answer here
Encoded = list[tuple[list[int], list[int]]]


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError for data, backbone or detector that is missing or does not fit."""
    train_and_export(cfg, run)
    if run.leader:
        evaluate(cfg, run)


def train_and_export(cfg: Config, run: Run) -> None:
    """The sub-stage that trains."""
    measured_only = ("detector", "evaluate", "max_new_tokens", "attempts")
    settings = run.settings("seed", "data", "pairs", "backbone", "detoxifier", "trainer.precision")
    settings = {k: v for k, v in settings.items() if k not in {f"detoxifier.{name}" for name in measured_only}}
    stage = run.stage("train_detoxifier", settings)
    if stage.done:
        return
    L.seed_everything(cfg.seed, verbose=False)
    d, b = cfg.detoxifier, cfg.backbone
    source = backbone_folder(b.path)
    tokenizer = load_tokenizer(source, b.revision)
    template = QATemplate(d.template, tokenizer, d.max_length, d.max_question)
    examples = {part: rewritings(pairs, d.refusal) for part, pairs in question_parts(cfg).items()}
    items: dict[Part, Encoded] = {
        part: [encode_rewriting(e, template, tokenizer, d.max_answer) for e in found]
        for part, found in examples.items()
    }
    log.info("%d training examples; cut: %s", len(items["train"]), template.cuts)
    model = load_causal(source, getattr(torch, b.dtype), b.revision).to(device_of(cfg))
    net = adapted(model, cfg, d.lora, "CAUSAL_LM")
    steps = steps_of(d.epochs, len(items["train"]), d.batch_size)
    if cfg.trainer.activation_checkpointing:
        recompute_activations(net)
    module = DetoxifierTuner(net.train(), model, steps, d.lr, round(d.warmup * steps), d.weight_decay)
    batches = RewriteBatches(items["train"], d.batch_size, steps, cfg.seed, tokenizer.pad_token_id)
    before = token_nll(cfg, module, items["test"], batches)
    module.at_work = AtWork(stage.name, {"detoxifier.batch_size": d.batch_size})
    fit(cfg, stage, module, StepDataModule(batches), steps, d.checkpoint_every_steps, d.grad_clip)
    result: dict[str, Any] = {"examples": {part: len(found) for part, found in items.items()}, "steps": steps}
    # By every rank: weights in shards are fetched by all together.
    nll = {part: token_nll(cfg, module, items[part], batches) for part in ("val", "test")}
    weights = whole_weights(module.model)
    if run.leader:
        result |= {"token_nll": nll, "token_nll_before_training": before}
        folder = stage.folder / "detoxifier"
        export(module.model, tokenizer, folder, b.path, b.full_finetune, weights)
        spec(cfg, template, result).save(folder)
        values = {f"eval/detoxifier/{part}/token_nll": value for part, value in nll.items()}
        log_values(cfg, run.path, stage.folder, values)
        log_artifact(cfg, run.path, "detoxifier", folder, {"token_nll": nll})
    stage.finish(result)


def spec(cfg: Config, template: QATemplate, result: dict[str, Any]) -> DetoxifierSpec:
    """detoxifier.json."""
    b = cfg.backbone
    return DetoxifierSpec(
        template=template.text,
        refusal=cfg.detoxifier.refusal,
        max_length=template.max_length,
        max_question=template.max_question,
        base=None if b.full_finetune else b.path,
        base_revision=None if b.full_finetune else b.revision,
        versions=versions(),
        trained_on={"data": cfg.data.name, "seed": cfg.seed, "examples": result["examples"], "backbone": b.name},
        metrics={"token_nll": result["token_nll"]},
    )


@torch.no_grad()
def token_nll(cfg: Config, module: DetoxifierTuner, items: Encoded, batches: RewriteBatches) -> float:
    """Mean -log p of the target tokens (nats), on at most `detoxifier.evaluate` examples."""
    chosen = items[: max(1, cfg.detoxifier.evaluate)]
    others = RewriteBatches(chosen, cfg.detoxifier.batch_size, 1, cfg.seed, batches.pad_id)
    order = sorted(range(len(chosen)), key=lambda i: len(chosen[i][0]) + len(chosen[i][1]))
    total, n, size = 0.0, 0, cfg.detoxifier.batch_size
    training = module.training
    module.eval().to(device_of(cfg))
    for at in range(0, len(order), size):
        batch = module.transfer_batch_to_device(others.collate(order[at : at + size]), device_of(cfg), 0)
        logps = module.logps(batch)
        total, n = total - float(logps.sum()), n + len(logps)
    module.train(training)
    return total / n


def evaluate(cfg: Config, run: Run) -> None:
    """The sub-stage that rewrites harmful test answers and measures what came out."""
    d = cfg.detoxifier
    stage = run.stage(
        "train_detoxifier/evaluation", run.settings("seed", "data", "detoxifier", "pairs"), after=["train_detoxifier"]
    )
    if stage.done or d.evaluate == 0:
        return
    folder = run.path / "train_detoxifier" / "detoxifier"
    examples = chosen_examples(cfg, question_parts(cfg)["test"])
    detoxifier = Detoxifier.load(folder, device_of(cfg), getattr(torch, cfg.backbone.dtype))
    rewritten = rewrite(cfg, stage, detoxifier, examples)
    result = measure(cfg, stage, detoxifier, examples, rewritten)
    write_json(stage.folder / "metrics.json", result)
    log.info("%s", told(result))
    values = numbers("eval/detoxifier", result)
    if (tuned := detoxifier_objective(result["all"])) is not None:
        values["objective/detoxifier"] = tuned
    log_values(cfg, run.path, stage.folder, values)
    stage.finish(result)


def chosen_examples(cfg: Config, pairs: Sequence[QAPair]) -> list[Rewriting]:
    """Harmful test answers, each question in turn, each answer once."""
    by_question: dict[str, list[Rewriting]] = {}
    seen = set()
    for example in rewritings(pairs, cfg.detoxifier.refusal):
        if (example.question, example.harmful) not in seen:
            seen.add((example.question, example.harmful))
            by_question.setdefault(example.question, []).append(example)
    turns = max(map(len, by_question.values()))
    ordered = [found[i] for i in range(turns) for found in by_question.values() if i < len(found)]
    return ordered[: cfg.detoxifier.evaluate]


def rewrite(cfg: Config, stage: Stage, detoxifier: Detoxifier, examples: Sequence[Rewriting]) -> list[str]:
    """Rewritten answers; finished batches are on disk, so an interrupted evaluation goes on with the missing ones."""
    path, size = stage.folder / "rewritten.jsonl", cfg.detoxifier.generate_batch_size
    done: list[str] = []
    if path.exists():
        done = [json.loads(line)["rewritten"] for line in path.read_text(encoding="utf-8").splitlines()]
    with Progress("detoxify", len(examples), "answers", done=len(done)) as progress:
        while len(done) < len(examples):
            part = examples[len(done) : len(done) + size]
            done += detoxifier.rewrite(
                [e.question for e in part], [e.harmful for e in part], cfg.detoxifier.max_new_tokens, size
            )
            rows = zip(examples, done, strict=False)
            lines = [
                json.dumps({"question": e.question, "harmful": e.harmful, "accepted": e.target, "rewritten": text})
                for e, text in rows
            ]
            write_durably(path, "".join(line + "\n" for line in lines).encode())
            progress.advance(len(part))
    return done


def measure(
    cfg: Config, stage: Stage, detoxifier: Detoxifier, examples: Sequence[Rewriting], rewritten: Sequence[str]
) -> dict[str, Any]:
    """Metrics over all answers, and with a detector over those alone that it flags (what a guard would rewrite).

    `guarded`: of the flagged ones, what a guard shows: several attempts, and the refusal if none passes.
    """
    questions = [e.question for e in examples]
    accepted = [e.target for e in examples]
    similar = SentenceSimilarity(device_of(cfg))
    cosine, cosine_accepted = similar(questions, rewritten), similar(questions, accepted)
    everything = list(range(len(examples)))
    groups = {"all": everything}
    harmless: dict[str, torch.Tensor] = {}
    if cfg.detoxifier.detector is not None:
        detector = Detector.load(Path(cfg.detoxifier.detector), device_of(cfg))
        texts = {"before": [e.harmful for e in examples], "after": list(rewritten), "accepted": accepted}
        scores = {when: detector.score(questions, answers) for when, answers in texts.items()}
        harmless = {when: ~detector.harmful(s) for when, s in scores.items()}
        groups["flagged"] = [i for i in everything if not harmless["before"][i]]
        groups["below_half"] = [i for i in everything if scores["before"][i] < 0.5]
    out: dict[str, Any] = {}
    shown = list(rewritten)
    if flagged := groups.get("flagged"):
        results = guarded(cfg, stage, detector, detoxifier, [examples[i] for i in flagged])
        for i, result in zip(flagged, results, strict=True):
            shown[i] = result.answer
        now = [shown[i] for i in flagged]
        asked = [questions[i] for i in flagged]
        flags = {"before": harmless["before"][flagged], "after": ~detector.harmful(detector.score(asked, now))}
        targets = [accepted[i] for i in flagged]
        out["guarded"] = rewriting_metrics(
            now, targets, cfg.detoxifier.refusal, similar(asked, now), cosine_accepted[flagged], flags
        )
    for name, chosen in groups.items():
        if not chosen:
            continue
        flags = {when: values[chosen] for when, values in harmless.items()}
        out[name] = rewriting_metrics(
            [rewritten[i] for i in chosen],
            [accepted[i] for i in chosen],
            cfg.detoxifier.refusal,
            cosine[chosen],
            cosine_accepted[chosen],
            flags,
        )
    return out


def guarded(
    cfg: Config, stage: Stage, detector: Detector, detoxifier: Detoxifier, examples: Sequence[Rewriting]
) -> list[Guarded]:
    """What a guard makes of these harmful answers; also in guarded.jsonl."""
    d = cfg.detoxifier
    guard = Guard(
        detector,
        detoxifier,
        batch_size=d.generate_batch_size,
        max_new_tokens=d.max_new_tokens,
        refusal=d.refusal,
        attempts=d.attempts,
        timeout=DAY,
        rewrite_timeout=DAY,
    )
    results = []
    with Progress("guard", len(examples), "answers") as progress:
        for at in range(0, len(examples), d.generate_batch_size):
            part = examples[at : at + d.generate_batch_size]
            results += guard.check([e.question for e in part], [e.harmful for e in part])
            progress.advance(len(part))
    guard.close()
    rows = [{"question": e.question, **asdict(r)} for e, r in zip(examples, results, strict=True)]
    write_durably(stage.folder / "guarded.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return results


def told(result: dict[str, Any]) -> str:
    """One line for the log."""
    parts = []
    for name, m in result.items():
        shares = [
            f"{when} {m[f'harmless_{when}']['value']:.1%}" for when in ("before", "after") if f"harmless_{when}" in m
        ]
        shares += [f"similarity {m['similarity']:.3f} (accepted {m['similarity_accepted']:.3f})"]
        shares += [f"bare refusals {m['refusals']['value']:.1%}", f"n {m['refusals']['n']}"]
        parts.append(f"{name}: harmless " + ", ".join(shares))
    return "; ".join(parts)
