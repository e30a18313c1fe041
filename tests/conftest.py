"""What every test shares: no network, no display, one thread for each worker, and the public data if it is there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

# Before torch and the libraries are imported by any test.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)
# A launcher's variables in the caller's shell (an interactive SLURM job) would change who leads a run.
for name in [
    n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_", "SEAWALL_", "WANDB_SWEEP_", "WANDB_RUN_ID"))
]:
    del os.environ[name]

# A shell's background job ignores Ctrl-C, and what it starts would too: tests that send it need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the public data sets in {folder}")
    return folder
