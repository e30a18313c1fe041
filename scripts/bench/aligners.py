"""One optimiser step of DPO and of SFT against TRL's trainers: same weights, data, LoRA, dtype and batch, in turns.

    python scripts/bench/aligners.py [--model llava_small] [--rows 2] [--answer 64] [--rounds 3] [--threads 2]

TRL (DPOTrainer, SFTTrainer) is given the picture and runs the encoder; the aligner is given what the encoder makes of
the same picture. Both have the same PEFT model. In float32 the losses of the first step must agree to 1e-5 (relative
above 1). A round is one
`training_step` and one optimiser step of each; medians over the rounds, of CPU time (of wall time on a GPU).

Reference log-probs: TRL computes them in every step; with pictures it refuses to precompute them. The aligner does it
once for each pair, and `ratio` does not count it; `ratio_one_epoch` counts it as if there were a single pass over the
data. With text alone TRL can precompute them too (not its default): there `ratio_one_epoch` is the fairer figure.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import compose
from datamodules.alignment import AlignmentBatch, AlignmentExample, encode
from lightning_modules.aligner import Aligner
from lightning_modules.dpo_aligner import DPOAligner
from lightning_modules.optimisation import clip_gradients, trained
from lightning_modules.sft_aligner import SFTAligner
from mllm.loading import MLLM, load, to_device
from mllm.media import media_arguments
from mllm.prompts import encode_text
from scripts.bench.machine import Clock, described, record
from scripts.bench.shapes import SHAPES, shape_words
from stages.trainers import quieten

RANK = 16


@dataclass
class Data:
    """rows: for TRL. items, E, ids: the same for the aligner."""

    rows: list[dict[str, Any]]
    batch: AlignmentBatch


def made(mllm: MLLM, n: int, words: int, media: bool, pairs: bool) -> Data:
    """Questions of 12 words, answers of `words` (and the token that ends them), pictures of noise."""
    rng = np.random.default_rng(0)
    side = mllm.spec.blank_size[0]
    known = sorted(word for word, i in mllm.processor.tokenizer.get_vocab().items() if word.isalpha() and i < 162)

    def text(count: int) -> str:
        return " ".join(rng.choice(known, count))

    questions, chosen, rejected = [text(12) for _ in range(n)], [], []
    for _ in range(n):
        chosen.append(text(words - 1))
        rejected.append(text(words - 1))
    pictures = [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(n)]
    rows, examples = [], []
    for i in range(n):
        answers = {"chosen": chosen[i], "rejected": rejected[i]} if pairs else {"completion": chosen[i]}
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": questions[i]}]}
        row |= {name: [{"role": "assistant", "content": said}] for name, said in answers.items()}
        rows.append(row | ({"images": [pictures[i]]} if media else {}))
        other = rejected[i] if pairs else None
        where = str(i) if media else None
        examples.append(AlignmentExample(str(i), "plain", True, questions[i], chosen[i], other, where))
    ids = sorted(mllm.anchor.media_token_ids)
    items = [encode(e, mllm.prompts, ids, pairs) for e in examples]
    E: dict[str, torch.Tensor] = {}
    if media:
        texts = [mllm.prompts.text(q, True) for q in questions]
        inputs = encode_text(mllm.processor, texts, media_arguments(mllm.spec, mllm.processor, pictures))
        E = {path: e.float() for path, e in mllm.anchor.observe(**to_device(inputs, mllm.model.device)).items()}
    named = [e.id for e in examples]
    return Data(rows, AlignmentBatch(0, [] if media else items, items if media else [], E, named))


def shaken(model: torch.nn.Module) -> None:
    """LoRA's B is zero at the start: policy and reference would be equal, and so would be any two losses."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.empty(p.shape).normal_(std=0.02, generator=generator))


def peer(mllm: MLLM, data: Data, pairs: bool, folder: str) -> Any:
    """TRL's trainer on the bare model, which it puts LoRA on; no activation checkpointing, no dropout."""
    common: dict[str, Any] = {
        "output_dir": folder, "report_to": [], "per_device_train_batch_size": len(data.rows), "max_length": None,
        "gradient_checkpointing": False, "bf16": mllm.model.dtype == torch.bfloat16, "learning_rate": 1e-4,
        "use_cpu": not torch.cuda.is_available(), "logging_strategy": "no", "save_strategy": "no", "max_steps": 10**6,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=mllm.spec.lora_targets, task_type="CAUSAL_LM")
    given: dict[str, Any] = {
        "model": mllm.model, "train_dataset": Dataset.from_list(data.rows), "processing_class": mllm.processor,
        "peft_config": lora,
    }  # fmt: skip
    if pairs:
        return DPOTrainer(args=DPOConfig(**common, beta=0.1), **given)
    return SFTTrainer(args=SFTConfig(**common, completion_only_loss=True), **given)


def aligner(mllm: MLLM, model: torch.nn.Module, data: Data, pairs: bool) -> Aligner:
    kind: Any = DPOAligner if pairs else SFTAligner
    more = {"beta": 0.1} if pairs else {}
    module = kind(mllm, model, steps=10**6, micro_batch_size=len(data.rows), lr=1e-4, **more)
    module.to(mllm.model.device)
    return module


def our_step(module: Aligner, optimizer: torch.optim.Optimizer, data: Data) -> float:
    """What `Aligner.training_step` does for one micro-batch."""
    b = data.batch
    items = b.media or b.text
    total = len(items) if isinstance(module, DPOAligner) else sum(int(i.branches[0].target.sum()) for i in items)
    optimizer.zero_grad(set_to_none=True)
    loss, _ = module.micro_step(items, b.E or None, b.ids, total)
    loss.backward()
    clip_gradients(trained(module), 1.0)
    optimizer.step()
    return float(loss.detach())


def compare(mllm: MLLM, pairs: bool, media: bool, args: argparse.Namespace) -> dict[str, Any]:
    data = made(mllm, args.rows, args.answer, media, pairs)
    clock = Clock(mllm.model.device)
    with tempfile.TemporaryDirectory() as folder:
        trl = peer(mllm, data, pairs, folder)
        trl.current_gradient_accumulation_steps = 1  # what its own loop would have set
        model = trl.model
        shaken(model)
        inputs = trl._prepare_inputs(trl.data_collator([dict(trl.train_dataset[i]) for i in range(args.rows)]))
        module = aligner(mllm, model, data, pairs)
        once = 0.0
        b = data.batch
        module.forward_branches.settle()  # tries the packed form, once for a model
        if isinstance(module, DPOAligner):
            logps, once = clock.timed(lambda: module.reference_logps(b.media or b.text, b.E or None))
            module.reference = {i: (float(c), float(r)) for i, (c, r) in zip(b.ids, logps, strict=True)}
        theirs = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        ours = torch.optim.AdamW(trained(module), lr=1e-6)

        def their_step() -> float:
            theirs.zero_grad(set_to_none=True)
            loss = trl.training_step(model, inputs)
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            theirs.step()
            return float(loss)

        with torch.no_grad():
            total = len(b.ids) if pairs else sum(int(i.branches[0].target.sum()) for i in b.media or b.text)
            mine = float(module.micro_step(b.media or b.text, b.E or None, b.ids, total)[0])
            model.train()
            its = float(trl.compute_loss(model, dict(inputs)))
        if not abs(mine - its) < 1e-5 * max(1.0, abs(its)) and mllm.model.dtype == torch.float32:
            raise SystemExit(f"the losses differ: {mine} and {its} (TRL)")
        sides: dict[str, Callable[[], float]] = {"ours": lambda: our_step(module, ours, data), "trl": their_step}
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(args.rounds + 1):
            for name in sides if round_number % 2 else reversed(sides):
                _, seconds = clock.timed(sides[name])
                if round_number:  # the first one warms up
                    taken[name].append(seconds)
        trl.model.unload()
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    tokens = max(len(i.prefix) + sum(len(x.ids) for x in i.branches) for i in b.media or b.text)
    gc.collect()
    return {
        "work": "dpo" if pairs else "sft", "media": media, "model": args.model, "rows": args.rows,
        "answer_tokens": args.answer, "packed_row_tokens": tokens, "trl_rows": list(inputs["input_ids"].shape),
        "loss": mine, "loss_trl": its, "ratio": medians["trl"] / medians["ours"], "median_s": medians["ours"],
        "median_trl_s": medians["trl"], "reference_once_s": once,
        "ratio_one_epoch": medians["trl"] / (medians["ours"] + once),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava_small")
    parser.add_argument("--rows", type=int, default=2, help="pairs (DPO) or examples (SFT) in a batch")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quieten()
    words = shape_words(args.model) if args.model in SHAPES else [f"model={args.model}"]
    cfg = compose(["experiment=sea_image", *words]).config
    print(described("cpu", args.threads))
    for pairs in (True, False):
        for media in (True, False):
            row = compare(load(cfg.model), pairs, media, args)
            what = f"{row['work']} {'with a picture' if media else 'text alone'}"
            print(
                f"{what:22s} {row['median_trl_s']:7.2f} s TRL  {row['median_s']:7.2f} s ours  ratio {row['ratio']:.2f}x"
                + (f" (one epoch, with the reference: {row['ratio_one_epoch']:.2f}x)" if pairs else "")
                + f"  loss {row['loss_trl']:.6f} {row['loss']:.6f}",
                flush=True,
            )
            record(args.out, f"{row['work']}_{'image' if media else 'text'}_{args.model}", row, args.threads)


if __name__ == "__main__":
    main()
