"""One pass of the harm detector with LoRA over texts of mixed lengths, against transformers.Trainer and RewardTrainer.

    python scripts/bench/detector.py [--questions 48] [--batch 8] [--threads 2]

A model of 42 M parameters with random weights (vocabulary 32,064, 8 layers of width 512); `--questions` questions with
a harmless and a harmful answer, lengths drawn from a log-normal distribution (median 90 tokens, sigma 0.7, at most
512). Everybody computes each of the texts once, forward and backward, in batches of as many texts, with the same PEFT
model; the peers' own collators and samplers make their batches. The Trainer is run as it comes, and once more with
`group_by_length` (not its default). CPU time of a pass, after a warm-up; ours first and last, its mean counts. Ours is
a bare loop over module and batches, the peers' `train()` has their own loop around it.

Equal losses: on one batch, BCE equals the Trainer's (`problem_type="multi_label_classification"`, its mean over one
output), and the pairwise part of the loss equals RewardTrainer's, both to 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datamodules.qa_batches import QuestionBatches, QuestionTexts
from lightning_modules.detector_losses import bce, bce_pairwise
from lightning_modules.harm_detector import HarmDetector
from lightning_modules.optimisation import clip_gradients, trained
from scripts.bench.machine import Clock, described, record
from scripts.bench.shapes import config_of, processor_of
from stages.trainers import quieten

TARGETS = r".*(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PAD = 0


def texts(n: int) -> list[QuestionTexts]:
    """Each with a harmless answer, then a harmful one."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        lengths = np.clip(np.exp(rng.normal(np.log(90), 0.7, 2)), 12, 512).astype(int)
        ids = tuple([*rng.integers(200, 30000, length - 1).tolist(), 2] for length in lengths)
        out.append(QuestionTexts(ids, ((0, True), (1, False)), ((0, 1),), str(len(out))))
    return out


def classifier() -> Any:
    """Random weights from seed 0, LoRA that is not zero."""
    config = config_of("llava_small").text_config
    config.num_labels, config.pad_token_id, config.problem_type = 1, PAD, "multi_label_classification"
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="SEQ_CLS")
    net = get_peft_model(model, lora)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return net


def our_pass(net: Any, questions: list[QuestionTexts], batch: int) -> None:
    module = HarmDetector(net.train(), "bce", 1, 1e-6)
    optimizer = torch.optim.AdamW(trained(module), lr=1e-6)
    batches = QuestionBatches(questions, batch // 2, len(questions) // (batch // 2), 0, PAD)
    for part in batches:
        optimizer.zero_grad(set_to_none=True)
        z_N = module(part)
        bce(z_N[part.text_L], part.harmless_L).backward()
        clip_gradients(trained(module), 1.0)
        optimizer.step()


def check(net: Any, questions: list[QuestionTexts], reward: Any) -> dict[str, float]:
    """Losses of one batch: ours, the Trainer's, and the pairwise part beside RewardTrainer's."""
    net.eval()
    module = HarmDetector(net, "bce", 1, 1e-6)
    part = QuestionBatches(questions, 4, 1, 0, PAD).collate(range(4))
    with torch.no_grad():
        z_N = module(part)
        mine = bce(z_N[part.text_L], part.harmless_L)
        labels = torch.zeros(len(part.ids), 1)
        labels[part.text_L, 0] = part.harmless_L
        its = net(input_ids=part.ids, attention_mask=part.mask, labels=labels).loss
        better, worse = z_N[part.pairs_P2[:, 0]], z_N[part.pairs_P2[:, 1]]
        pairwise = bce_pairwise(z_N[part.text_L], part.harmless_L, better, worse) - 4 * mine
        rows = [{"chosen_ids": list(q.ids[0]), "rejected_ids": list(q.ids[1])} for q in questions[:4]]
        theirs = reward.compute_loss(net, reward.data_collator(rows))
    found = {"bce": float(mine), "trainer": float(its), "pairwise": float(pairwise), "reward_trainer": float(theirs)}
    if abs(mine - its) > 1e-5 or abs(pairwise - theirs) > 1e-5:
        raise SystemExit(f"the losses differ: {found}")
    net.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    if args.questions % (args.batch // 2):
        parser.error(f"--questions: a multiple of {args.batch // 2} (half of --batch), or a pass leaves some out")
    torch.set_num_threads(args.threads)
    quieten()
    questions, net, clock = texts(args.questions), classifier(), Clock(torch.device("cpu"))
    tokenizer = processor_of(config_of("llava_small")).tokenizer
    tokenizer.padding_side = "right"
    single = [
        {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": [float(harmless)]}
        for q in questions
        for ids, (_, harmless) in zip(q.ids, q.labels, strict=True)
    ]
    pairs = [{"chosen_ids": list(q.ids[0]), "rejected_ids": list(q.ids[1])} for q in questions]
    with tempfile.TemporaryDirectory() as folder:

        def common(texts_in_a_row: int, by_length: bool) -> dict[str, Any]:
            grouping = {"train_sampling_strategy": "group_by_length"} if by_length else {}
            return {
                "output_dir": folder, "report_to": [], "use_cpu": True, "num_train_epochs": 1, "bf16": False,
                "per_device_train_batch_size": args.batch // texts_in_a_row, "learning_rate": 1e-6,
                "logging_strategy": "no", "save_strategy": "no", "gradient_checkpointing": False,
                "dataloader_pin_memory": False, "disable_tqdm": True, **grouping,
            }  # fmt: skip

        def trainer(by_length: bool) -> Trainer:
            arguments = TrainingArguments(**common(1, by_length))
            return Trainer(net, arguments, train_dataset=Dataset.from_list(single), processing_class=tokenizer)

        def reward_trainer() -> RewardTrainer:
            arguments = RewardConfig(**common(2, False), max_length=None, disable_dropout=False)
            return RewardTrainer(net, arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)

        losses = check(net, questions, reward_trainer())
        our_pass(net, questions[: args.batch], args.batch)  # warm-up
        taken: dict[str, float] = {}
        _, first = clock.timed(lambda: our_pass(net, questions, args.batch))
        _, taken["transformers.Trainer"] = clock.timed(trainer(False).train)
        _, taken["Trainer, group_by_length"] = clock.timed(trainer(True).train)
        _, taken["TRL RewardTrainer"] = clock.timed(reward_trainer().train)
        _, second = clock.timed(lambda: our_pass(net, questions, args.batch))
    ours = (first + second) / 2  # before and after: a machine whose speed drifts favours nobody
    lengths = [len(ids) for q in questions for ids in q.ids]
    print(described("cpu", args.threads))
    print(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; losses {losses}")
    print(f"{'harm detector':26s} {ours:7.1f} s")
    for name, seconds in taken.items():
        print(f"{name:26s} {seconds:7.1f} s  ratio {seconds / ours:.2f}x")
        row = {
            "work": "detector", "peer": name, "ratio": seconds / ours, "median_s": ours, "median_peer_s": seconds,
            "texts": len(lengths), "tokens": sum(lengths), "batch": args.batch, "losses": losses,
        }  # fmt: skip
        record(args.out, f"detector_{name.replace(', ', '_').replace(' ', '_')}", row, args.threads)


if __name__ == "__main__":
    main()
