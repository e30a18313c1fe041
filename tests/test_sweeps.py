"""The files of scripts/sweeps: W&B's own schema, its own engine, its own agent; and what a run leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.compose import compose, last_wins
from configs.keys import find, leaves
from tests.wandb_server import PROJECT, SWEEP, SeenRun, WandbServer

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "scripts" / "sweeps").glob("*.yaml"))
SMALL = [
    "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.max_steps=40", "synthesis.retries=0",
    "synthesis.include_failed=true", "align.variants=[text_sft,sea_dpo]", "variants.text_sft.steps=1",
    "variants.sea_dpo.steps=30", "variants.sea_dpo.batch_size=8", "variants.sea_dpo.mixture.replay=0",
    "align.probe_every_steps=1", "align.probe_prompts=1", "trainer.log_every_n_steps=1", "evaluate.limit=2",
    "evaluate.max_new_tokens=12", "logger.tensorboard=false",
]  # fmt: skip

sweeps = pytest.importorskip("sweeps", reason="needs W&B's sweep engine: make env installs it")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def sweep_of(name: str, *words: str, **changes: Any) -> dict[str, Any]:
    """A shipped file with further words in its command."""
    sweep = read(ROOT / "scripts" / "sweeps" / f"{name}.yaml") | changes
    fixed = [word for word in sweep["command"] if not word.startswith("${")]
    macros = [word for word in sweep["command"] if word.startswith("${")]
    return sweep | {"command": [*macros[:-1], *last_wins(*fixed, *words), macros[-1]]}


def command_of(sweep: dict[str, Any], drawn: dict[str, Any]) -> list[str]:
    """What the agent would start, by wandb's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    parts = create_sweep_command_args({"args": drawn})
    parts |= {"env": [], "interpreter": [sys.executable], "program": [sweep["program"]]}
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        words += parts[word[2:-1]] if word.startswith("${") else [word]
    return words


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_keeps_to_wandbs_schema_and_its_trials_are_configurations(path: Path) -> None:
    sweep = read(path)
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    assert (ROOT / sweep["program"]).is_file()
    runs: list[Any] = []
    for number in range(3):
        trial = sweeps.next_run(sweep, runs, validate=number == 0)
        words = command_of(sweep, trial.config)[2:]
        cfg = compose(words, check_paths=False).config
        values = {leaf.key: leaf.value for leaf in leaves(cfg)}
        for key, drawn in trial.config.items():
            assert find(key) is not None
            assert values[key] == pytest.approx(drawn["value"])
        assert (cfg.logger.wandb, cfg.logger.mode) == (True, "online")
        trial.state, trial.summary_metrics = sweeps.RunState.finished, {sweep["metric"]["name"]: number / 10}
        runs.append(trial)


def test_the_schema_finds_what_is_wrong_in_a_file() -> None:
    sweep = sweep_of("sea")
    for wrong in ({"method": "bayess"}, {"early_terminate": {"type": "hyperband"}}, {"metric": {"goal": "maximize"}}):
        assert sweeps.schema_violations_from_proposed_config(sweep | wrong)


def agent(server: WandbServer, place: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The real `wandb agent`, in a folder of its own, on this checkout."""
    (place / "train.py").symlink_to(ROOT / "train.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env |= {"PATH": path, "WANDB_AGENT_DISABLE_FLAPPING": "true", "WANDB_DIR": str(place), **server.environment}
    command = [sys.executable, "-m", "wandb", "agent", f"someone/{PROJECT}/{SWEEP}"]
    everything = {**os.environ, **env}
    return subprocess.run(command, cwd=place, env=everything, capture_output=True, text=True, timeout=400)


def leader(run_dir: Path) -> int:
    """The process that has the run directory, by the name in its lock."""
    match = re.match(r"process (\d+) on", (run_dir / ".lock").read_text())
    assert match
    return int(match[1])


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> tuple[WandbServer, Path, str]:
    """Two trials: the first is told to make room after its second probe, the second is pruned.

    A finished run that nobody can beat is known to the sweep from then on.
    """
    place = tmp_path_factory.mktemp("agent")
    told: list[str] = []

    def make_room(run: SeenRun) -> bool:
        if not told and len(objectives(run)) >= 2:
            told.append(run.name)
            os.kill(leader(place / "runs" / "sea_image" / f"sweep-{SWEEP}-{run.name}"), signal.SIGUSR1)
        return False

    sweep = sweep_of("sea", *SMALL, early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    server = WandbServer(sweep, trials=2, on_history=make_room)
    with server:
        done = agent(server, place)
    return server, place, done.stdout + done.stderr


def objectives(run: SeenRun) -> list[float]:
    return [row["objective/sea_dpo"] for row in run.history if "objective/sea_dpo" in row]
