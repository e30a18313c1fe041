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

import train
from configs.compose import ConfigError, compose, last_wins
from configs.keys import find, leaves
from evaluation.objective import report_objectives
from mllm.minilm import minilm_folder
from tests.wandb_server import PROJECT, SWEEP, SeenRun, WandbServer, inspected

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "scripts" / "sweeps").glob("*.yaml"))
STEPS = 40  # long enough for what W&B's service sends late, some seconds, to come while it is trained
SMALL = [
    "synthesis.harmful=3", "synthesis.harmless=3", "synthesis.max_steps=15", "synthesis.retries=0",
    "synthesis.include_failed=true", "align.variants=[text_sft,sea_dpo]", "variants.text_sft.steps=1",
    f"variants.sea_dpo.steps={STEPS}", "variants.sea_dpo.batch_size=8", "variants.sea_dpo.mixture.replay=0",
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


def objectives(run: SeenRun) -> list[float]:
    return [row["objective/sea_dpo"] for row in run.history if "objective/sea_dpo" in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agent")


@pytest.fixture(scope="module")
def server(place: Path) -> WandbServer:
    """What it has seen of two trials: the first is told to make room after its second probe and comes back, the second
    is pruned by Hyperband, for the sweep has then had runs that nobody can beat."""
    if os.environ.get("TEST_WANDB") != "1":
        pytest.skip("W&B's agent, service and a trial signal each other by the clock: `make test-wandb` runs this")
    server = WandbServer(sweep_of("sea", *SMALL, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2}), 2)
    signalled: list[str] = []

    def send(run: SeenRun, signum: int) -> None:
        os.kill(leader(place / "runs" / "sea_image" / f"sweep-{SWEEP}-{run.name}"), signum)

    def on_history(run: SeenRun) -> bool:
        if run.name == "trial0" and len(objectives(run)) >= 2 and run.name not in signalled:
            signalled.append(run.name)
            send(run, signal.SIGUSR1)
        if run.name == "trial1" and len(objectives(run)) >= 2 and run.name not in signalled:
            signalled.append(run.name)
            send(run, signal.SIGSTOP)  # until the agent has heard that it is to be stopped
            config = {key: {"value": value} for key, value in server.given["trial0"].items()}
            best = {"state": "finished", "config": config, "sampledHistory": [{"objective/sea_dpo": 1.5}] * 100}
            server.known = [{"name": f"best{i}", **best} for i in range(5)]  # the better half is theirs
        return False

    beats: list[str] = []

    def on_heartbeat() -> None:
        if "trial1" in server.told_to_stop:
            beats.append("told")
            if len(beats) == 3:  # a busy agent may send SIGTERM only after its next heartbeat
                send(server.runs["trial1"], signal.SIGCONT)

    server.on_history, server.on_heartbeat = on_history, on_heartbeat
    with server:
        done = agent(server, place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not server.errors, server.errors
    return server


def test_the_agents_trial_is_told_to_make_room_and_goes_on_as_the_same_run(server: WandbServer, place: Path) -> None:
    run = server.runs["trial0"]
    assert (run.starts, run.exit_codes, run.preempting > 0, run.state) == (2, [75, 0], True, "finished")
    assert {key: run.config[key] for key in server.given["trial0"]} == server.given["trial0"]
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps))
    fit = [row["trainer/global_step"] for row in run.history if "sea_dpo/align/loss" in row]
    assert fit == sorted(set(fit)), "no step of the alignment was done twice"
    assert len(objectives(run)) == STEPS + 1  # a probe after each step, and the report
    folder = place / "runs" / "sea_image" / f"sweep-{SWEEP}-trial0"
    report = json.loads((folder / "report.json").read_text())
    assert run.summary["objective/sea_dpo"] == report_objectives(report["results"])["sea_dpo"] == objectives(run)[-1]
    assert len(list((folder / "wandb").glob("run-*-trial0"))) == 2


def test_a_pruned_trial_has_saved_its_work_and_ends_with_143(server: WandbServer, place: Path) -> None:
    run = server.runs["trial1"]
    assert (run.exit_codes, run.state) == ([143], "failed")
    assert 2 <= len(objectives(run)) < STEPS + 1
    folder = place / "runs" / "sea_image" / f"sweep-{SWEEP}-trial1"
    assert (folder / "align" / "sea_dpo" / "checkpoints" / "last.ckpt").exists()
    assert not (folder / "report.json").exists()


def test_artifacts_lead_from_the_report_back_to_the_store(server: WandbServer) -> None:
    run = server.runs["trial0"]
    kinds = {server.artifacts[id]["type"] for id in run.logged}
    assert {"embedding-store", "adapter", "run_table"} <= kinds
    (store,) = (id for id in run.logged if id.startswith("store-micro_llava@"))
    about = {id: json.loads(server.artifacts[id]["metadata"]) for id in run.logged if id.startswith("adapter-")}
    adapters = {found["variant"]: id for id, found in about.items()}
    assert set(adapters) == {"text_sft", "sea_dpo"}
    assert set(run.used) == {store, adapters["sea_dpo"]}  # the one that is evaluated
    assert (about[adapters["sea_dpo"]]["store"], about[adapters["text_sft"]].get("store")) == (store, None)


@pytest.fixture(scope="module")
def patient(server: WandbServer, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant that learns nothing, trained on a trial's store with patience, evaluated by a second start; offline."""
    folder = tmp_path_factory.mktemp("runs") / "patient"
    store = place / "runs" / "sea_image" / f"sweep-{SWEEP}-trial0" / "synthesize" / "store"
    words = [f"run_dir={folder}", "logger.wandb=true", "align.variants=[sea_dpo]", f"store.path={store}"]
    start = last_wins("experiment=sea_image", *SMALL, *words, "variants.sea_dpo.lr=0", "align.patience=2")
    assert train.main([*start, "stages=[align]"]) == 0
    # The adapter stays what it is, whatever is asked of it later.
    assert train.main(last_wins(*start, "stages=[evaluate]", "evaluate.max_new_tokens=4", "evaluate.limit=1")) == 0
    return folder


def test_patience_ends_training_after_probes_without_a_better_objective(patient: Path) -> None:
    folder = patient / "align" / "sea_dpo"
    assert json.loads((folder / "stage.json").read_text())["result"]["steps"] == 3  # the first is the best, then two
    assert "probe/objective" in (folder / "metrics" / "metrics.csv").read_text().splitlines()[0]


def test_a_sync_makes_one_run_of_all_starts_and_draws_the_lineage(patient: Path) -> None:
    assert len(list((patient / "wandb").glob("offline-run-*"))) == 2
    with WandbServer() as server:
        command = [sys.executable, "-m", "wandb", "sync", str(patient / "wandb")]
        env = {**os.environ, **server.environment}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not server.errors
    (run,) = server.runs.values()
    assert run.exit_codes == [0, 0]
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps))
    assert len(objectives(run)) == 3 + 1
    assert {server.artifacts[id]["type"] for id in run.used} == {"embedding-store", "adapter"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["align.patience=3"], "set align.probe_every_steps too"),
        (["align.probe_every_steps=5", "trainer=fsdp2"], "sharded weights cannot answer"),
        (["align.probe_every_steps=5", "stages=[align]", "evaluate.benchmarks=[figstep]", "evaluate.figstep=nowhere"],
         "evaluate.figstep: nowhere does not exist"),
    ],
)  # fmt: skip
def test_probes_that_cannot_work_are_told_at_once(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose(["experiment=sea_image", *words])


def documented() -> dict[str, re.Pattern[str]]:
    """The table of docs/sweeps.md: name -> what it matches. `<fit>` and the like stand for one part of a name."""
    text = (ROOT / "docs" / "sweeps.md").read_text()
    table = text.split("| metric | what |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    return {name: re.compile(re.sub(r"<\w+>", "[^/]+", name)) for name in names}


def undocumented(names: Iterable[str]) -> set[str]:
    own = {name for name in names if not name.startswith("_")}  # W&B's own: _step, _runtime, _timestamp
    return {name for name in own if not any(pattern.fullmatch(name) for pattern in documented().values())}


def test_the_table_of_metrics_is_what_is_logged(server: WandbServer, guards: set[str]) -> None:
    logged = {name for run in server.runs.values() for row in run.history for name in row} | guards
    assert undocumented(logged) == set()
    unseen = {n for n, pattern in documented().items() if not any(pattern.fullmatch(name) for name in logged)}
    assert unseen == {"<fit>/tower/<metric>"}  # only where the embedded model is made
    assert "tower/loss" in (ROOT / "lightning_modules" / "micro_tower.py").read_text()


def similarity_is_there() -> bool:
    """`make minilm` has fetched the sentence encoder that rewritten answers are measured by."""
    try:
        minilm_folder()
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names that training and measuring detector and detoxifier log, offline."""
    folder = tmp_path_factory.mktemp("guards")
    common = ["logger=wandb", "trainer.log_every_n_steps=1"]
    words = ["experiment=harm_detector_micro", f"run_dir={folder / 'd'}", "detector.epochs=0.05", *common]
    assert train.main(words) == 0
    detector = folder / "d" / "train_detector" / "detector"
    measured = similarity_is_there()
    rewriting = ["detoxifier.epochs=0.05", "detoxifier.max_new_tokens=8", f"detoxifier.evaluate={4 * measured}"]
    words = ["experiment=detoxifier_micro", f"run_dir={folder / 'x'}", f"detoxifier.detector={detector}", *rewriting]
    assert train.main([*words, *common]) == 0
    names: set[str] = set()
    for run in folder.glob("*/wandb/offline-run-*"):
        records = inspected(run)
        names |= {name for r in records if r["type"] == "history" for name in r["history"]["item"]}
        assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [0]
        kinds = {r["artifact"]["type"] for r in records if r["type"] == "artifact"}
        assert kinds == {"detector" if run.parents[1].name == "d" else "detoxifier"}
    assert "objective/detector" in names
    assert ("objective/detoxifier" in names) == measured
    return names
