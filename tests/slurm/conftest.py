"""A real SLURM cluster for the tests of this folder, and one undisturbed run that all of them compare with."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train
from configs.compose import last_wins
from tests.conftest import ROOT
from tests.slurm.cluster import SMALL, environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cluster(shared: Path) -> None:
    """Started if it does not run yet; it stays for the next time (`scripts/slurm/test_cluster.sh stop` ends it)."""
    if os.environ.get("TEST_SLURM") != "1":
        pytest.skip("these tests start a SLURM cluster on this machine: `make test-slurm` runs them")
    with alone(shared / "cluster.lock"):
        command = ["scripts/slurm/test_cluster.sh", "start"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    environment(done.stdout.split()[-1])


@pytest.fixture(scope="session")
def undisturbed(cluster: None, shared: Path) -> Path:
    """A run of synthesize and align by one process, without SLURM. Made once, by whichever worker comes first."""
    run = shared / "undisturbed"
    with alone(shared / "undisturbed.lock"):
        assert train.main(last_wins(*SMALL, f"run_dir={run}", "stages=[synthesize,align]")) == 0
    return run


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One worker at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
