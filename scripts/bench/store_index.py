"""The embedding store with a million rows: how long it takes to open, to find and read one, and how much memory it has.

    python scripts/bench/store_index.py [--rows 1000000] [--folder FOLDER]

Embeddings are tiny (4 x 8 float16 values: what is measured is the index, not the disk); ids, concepts and the rest are
as long as real ones. Rows are written by `EmbeddingStore.append`, then a fresh process opens the store; by then the
files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datamodules.embedding_store import EmbeddingMeta, EmbeddingStore, StoredEmbedding
from datamodules.records import Concept
from scripts.bench.machine import described, record

SHAPES, AT_ONCE, READS, BATCH = {"model.multi_modal_projector": (1, 4, 8)}, 5000, 2000, 64


def id_of(i: int) -> str:
    """As long as a record's id."""
    return f"saferlhf/{i * 2654435761 % 2**32:08x}{i:08x}"


def entry(i: int, values: torch.Tensor) -> StoredEmbedding:
    phrase = f"paint the wooden fence number {i}"
    concept = Concept(phrase, "activity", f"someone will {phrase}", "List steps to perform this activity.")
    meta = EmbeddingMeta(
        harmful=i % 2 == 0, concept=concept, style="photograph", model="llava-hf/llava-1.5-7b-hf",
        settings_hash="0123456789abcdef", loss=0.01, steps=30, seconds=1.5,
    )  # fmt: skip
    return StoredEmbedding(id_of(i), dict.fromkeys(SHAPES, values), meta)


def fill(folder: Path, rows: int) -> float:
    """Seconds that writing took."""
    began = time.perf_counter()
    with EmbeddingStore.create_or_open(folder, "bench", SHAPES, "float16", writer="0") as store:
        values = torch.randn(AT_ONCE, 1, 4, 8).half()
        for start in range(len(store), rows, AT_ONCE):
            part = range(start, min(rows, start + AT_ONCE))
            store.append([entry(i, values[i - start]) for i in part])
    return time.perf_counter() - began


def look(folder: Path, rows: int) -> dict[str, float]:
    """What a fresh process sees of it."""

    def memory() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    before, began = memory(), time.perf_counter()
    store = EmbeddingStore.open(folder)
    opened, held = time.perf_counter() - began, memory() - before
    rng, took = random.Random(0), []
    for _ in range(READS):
        id = id_of(rng.randrange(rows))
        began = time.perf_counter()
        store.batch([id])
        took.append(time.perf_counter() - began)
    batches = []
    for _ in range(50):
        ids = [id_of(rng.randrange(rows)) for _ in range(BATCH)]
        began = time.perf_counter()
        store.batch(ids)
        batches.append(time.perf_counter() - began)
    began = time.perf_counter()
    n = len(store.ids(status="ok"))
    listed = time.perf_counter() - began
    took.sort()
    assert n == rows
    return {
        "open_s": opened, "index_mb": held, "bytes_a_row": held * 1e6 / rows, "read_median_us": took[READS // 2] * 1e6,
        "read_99_us": took[READS * 99 // 100] * 1e6, "batch_of_64_ms": sorted(batches)[25] * 1e3, "list_ok_s": listed,
        "memory_after_reads_mb": memory() - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        print(json.dumps(look(args.folder, args.rows)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "store"
        wrote = fill(folder, args.rows)
        again = [sys.executable, __file__, "--look", "--folder", str(folder), "--rows", str(args.rows)]
        found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        journal = sum(path.stat().st_size for path in folder.glob("index-*.jsonl"))
    row = {"work": "store_index", "rows": args.rows, "write_s": wrote, "journal_mb": journal / 1e6, **found}
    print(described("cpu", torch.get_num_threads()))
    print("\n".join(f"{name:22s} {value:,.1f}" for name, value in row.items() if isinstance(value, (int, float))))
    record(args.out, "store_index", row, torch.get_num_threads())


if __name__ == "__main__":
    main()
