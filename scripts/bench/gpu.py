"""On a GPU: synthesis at LLaVA 1.5 7B's shape with random weights in bfloat16, 30 steps of all slots.

    python scripts/bench/gpu.py [--slots 16] [--steps 30] [--budget 80]

Prints seconds for an embedding (all slots' steps, divided by the slots), model FLOPs utilisation against the fastest
matrix product that this GPU does, and the peak of its allocator. `--budget` (GB) makes the allocator refuse more:
`--slots 2 --budget 24` shows what a 24 GB card has. FLOPs: 4 for each weight of the decoder's layers and token of a
packed row (forward, and backward to the input alone; the last MLP runs where a target is predicted), 4 for each weight
of the head and target, and those of attention.
`--shape llava_small --device cpu` tries the script itself. DPO beside TRL: scripts/bench/aligners.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import compose
from datamodules.control_samples import synthesis_job
from datamodules.micro_world import records
from lightning_modules.embedding_optimizer import slot_losses
from lightning_modules.slots import SlotAdam, SlotTensors
from mllm.branches import BranchForward
from scripts.bench.machine import Clock, described, matmul_peak, peak_memory, record
from scripts.bench.shapes import SHAPES, assembled
from stages.trainers import quieten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava_1_5_7b")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--budget", type=float, help="GB that the allocator may give out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --shape llava_small tries the script")
    if args.budget and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.budget * 1e9 / whole))
    quieten()
    cfg = compose(["experiment=sea_image", "model=llava_1_5_7b"]).config
    mllm = assembled(args.shape, cfg.model, dtype, device)
    ids, prompts = sorted(mllm.anchor.media_token_ids), cfg.model.prompts
    jobs = [synthesis_job(r, mllm.prompts, prompts, ids, 0) for r in records("train", args.slots, 0)]
    forward = BranchForward(mllm.model, mllm.anchor)
    plan = forward.plan([job.item for job in jobs])
    tensors = SlotTensors(mllm.anchor.E0_by_path, args.slots).to(device)
    adam = SlotAdam(list(tensors.values), tensors.scales, 0.1)
    slots = list(range(args.slots))

    def step() -> float:
        out = forward(plan, tensors.rows(slots, 0.0, []))
        state = slot_losses(out, args.slots, 1.0, 0.0)
        adam.zero_grad(set_to_none=True)
        state.loss.sum().backward()
        adam.active = slots
        adam.step()
        return float(state.loss.detach().mean())

    clock = Clock(device)
    for slot in slots:
        tensors.restart(slot, 0.2, torch.Generator().manual_seed(slot))
        adam.reset(slot)
    first = step()
    step()  # warm-up
    last, seconds = clock.timed(lambda: [step() for _ in range(args.steps)][-1])
    (R, S), layers = plan.inputs["input_ids"].shape, mllm.model.get_decoder().layers
    weights = sum(p.numel() for p in layers.parameters())
    head = mllm.model.get_output_embeddings().weight.numel()
    width = mllm.model.config.get_text_config().hidden_size
    idle = sum(p.numel() for p in layers[-1].mlp.parameters()) * (R * S - len(plan.labels))
    flops = 4 * (weights * R * S - idle) + 4 * head * len(plan.labels) + 6 * len(layers) * R * S * S * width
    peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 1024)
    each, rate = seconds / args.slots, flops * args.steps / seconds
    print(described(device.type, torch.get_num_threads()))
    print(
        f"{args.shape}, {dtype}, {args.slots} slots, rows of {S} tokens ({plan.form}, {plan.causal} without a mask), "
        f"{args.steps} steps: loss {first:.3f} -> {last:.3f}\n"
        f"{each:.3f} s an embedding, {rate / 1e12:.2f} TFLOP/s, {rate / peak:.1%} of a matrix product's "
        f"{peak / 1e12:.2f}, peak {peak_memory(device) / 1e3:.1f} GB"
    )
    row = {
        "work": "synthesis", "model": args.shape, "dtype": str(dtype), "slots": args.slots, "steps": args.steps,
        "seconds_an_embedding": each, "mfu": rate / peak, "peak_memory_gb": peak_memory(device) / 1e3,
        "budget_gb": args.budget, "row_tokens": S, "loss": [first, last],
    }  # fmt: skip
    name = f"gpu_synthesis_{args.shape}" + (f"_{args.budget:.0f}gb" if args.budget else "")
    record(args.out, name, row, torch.get_num_threads(), device.type)


if __name__ == "__main__":
    main()
