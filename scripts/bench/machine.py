"""What every benchmark says of the machine, how it takes time, and how it keeps its results."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PACKAGES = ("torch", "transformers", "trl", "peft", "lightning")


class Clock:
    """CPU seconds of this process where the work is on the CPU (a busy machine changes little), else wall seconds up
    to the end of what the GPU was given."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def timed(self, action: Callable[[], T]) -> tuple[T, float]:
        if not self.gpu:
            began = time.process_time()
            out = action()
            return out, time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        out = action()
        torch.cuda.synchronize()
        return out, time.perf_counter() - began


def peak_memory(device: torch.device) -> float:
    """MB: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    """FLOP/s of a matrix product of n x n, the best of ten: what utilisation is measured against."""
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    clock = Clock(device)
    a @ b
    return 2 * n**3 / min(clock.timed(lambda: a @ b)[1] for _ in range(10))


def described(device: str, threads: int) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{name}, {threads} threads, {versions}"


def processor() -> str:
    """Its name, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record(folder: Path, name: str, row: dict[str, Any], threads: int, device: str = "cpu") -> None:
    """`folder/name.json`: the row, with machine and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": device, "machine": described(device, threads), "threads": threads}
    (folder / f"{name}.json").write_text(json.dumps(row | where, indent=1) + "\n")
