"""The run directory: skip, resume, refuse, redo; locked to one process; whole after kill -9 and on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from configs.schema import Config
from stages.ranks import session, wait_for
from stages.runs import Run

ROOT = Path(__file__).resolve().parents[2]


def config(place: Path, **changes: Any) -> Config:
    """A configuration for a run in `place`; `synthesis__lr=1.0` sets `synthesis.lr`."""
    cfg = Config(experiment="test", run_dir=str(place))
    for key, value in changes.items():
        target: Any = cfg
        *path, last = key.split("__")
        for part in path:
            target = target[part] if isinstance(target, dict) else getattr(target, part)
        setattr(target, last, value)
    return cfg


def synthesize(run: Run) -> str:
    """Open and finish the stage; returns the state it was found in."""
    stage = run.stage("synthesize", run.settings("seed", "synthesis"))
    if not stage.done:
        stage.finish({"osr": 0.97})
    return stage_state(run, "synthesize")


def align(run: Run, name: str) -> str:
    stage = run.stage(f"align/{name}", run.settings("seed", f"variants.{name}"), after=["synthesize"])
    if not stage.done:
        stage.finish()
    return stage_state(run, f"align/{name}")


def stage_state(run: Run, name: str) -> str:
    """How the last `run.stage(name)` found it."""
    return str(json.loads((run.path / name / "stage.json").read_text())["opened_as"])


def start(program: str, place: Path, **env: str) -> subprocess.Popen[str]:
    """A real process with `Run`, `Config` and `place` at hand."""
    head = f"""
        import os, signal, sys, time
        from pathlib import Path
        from configs.schema import Config
        from stages.outcome import exit_code_of
        from stages.runs import Run, write_json
        place = Path({str(place)!r})
        cfg = Config(experiment="test", run_dir=str(place))
    """
    source = textwrap.dedent(head) + textwrap.dedent(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def output(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def until(path: Path) -> None:
    wait_for(lambda: path.exists() or None, str(path), timeout=60)


def test_done_stage_is_skipped_and_keeps_its_result(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        assert synthesize(run) == "new"
    with Run(config(tmp_path)) as run:
        stage = run.stage("synthesize", run.settings("seed", "synthesis"))
        assert stage.done
        assert stage.result == {"osr": 0.97}
        assert run.result("synthesize") == {"osr": 0.97}


def test_unfinished_stage_is_resumed_with_its_files(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        stage = run.stage("synthesize", run.settings("seed"))
        (stage.folder / "half").write_text("kept")
    with Run(config(tmp_path)) as run:
        stage = run.stage("synthesize", run.settings("seed"))
        assert stage.state == "resume"
        assert (stage.folder / "half").read_text() == "kept"
        assert json.loads((stage.folder / "stage.json").read_text())["attempts"] == 2


def test_an_attempt_that_left_nothing_accepts_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(config(tmp_path)) as run:
        stage = run.stage("synthesize", run.settings("synthesis"))
    with Run(config(tmp_path, synthesis__lr=0.2)) as run:
        stage = run.stage("synthesize", run.settings("synthesis"))
        (stage.folder / "half").touch()
    assert "made anew" not in capsys.readouterr().err
    with Run(config(tmp_path, synthesis__lr=0.3)) as run:
        with pytest.raises(ValueError, match=r"synthesis\.lr: 0\.2 -> 0\.3"):
            run.stage("synthesize", run.settings("synthesis"))


def test_changed_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        synthesize(run)
    before = (tmp_path / "config.yaml").read_text()
    with Run(config(tmp_path, synthesis__lr=0.2)) as run:
        with pytest.raises(ValueError, match=r"synthesis\.lr: 0\.1 -> 0\.2\n.*run=NAME.*overwrite=true"):
            synthesize(run)
    assert (tmp_path / "config.yaml").read_text() == before, "a refused configuration must not replace the run's own"
    assert (tmp_path / "synthesize" / "stage.json").exists()


def test_keys_that_a_stage_does_not_depend_on_may_change(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        synthesize(run)
    with Run(config(tmp_path, evaluate__limit=3, synthesis__checkpoint_every_steps=7)) as run:
        assert synthesize(run) == "done"


def test_overwrite_redoes_what_changed_and_what_was_made_from_it(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        assert [synthesize(run), align(run, "sea_sft"), align(run, "sea_dpo")] == ["new"] * 3
        (tmp_path / "align" / "sea_sft" / "adapter").write_text("old")
    with Run(config(tmp_path, overwrite=True, variants__sea_sft__lr=0.5)) as run:
        assert [synthesize(run), align(run, "sea_sft"), align(run, "sea_dpo")] == ["done", "new", "done"]
        assert not (tmp_path / "align" / "sea_sft" / "adapter").exists()
    with Run(config(tmp_path, overwrite=True, variants__sea_sft__lr=0.5, synthesis__lr=1.0)) as run:
        assert [synthesize(run), align(run, "sea_sft"), align(run, "sea_dpo")] == ["new"] * 3
    assert not list(tmp_path.glob(".old-*"))


def evaluate(run: Run, *variants: str) -> list[str]:
    """Writes the file of each variant that has none; returns those that were there."""
    parts = {f"align/{v}": f"{v}.jsonl" for v in variants}
    stage = run.stage("evaluate/generations", run.settings("evaluate"), list(parts), parts)
    kept = sorted(path.stem for path in stage.folder.glob("*.jsonl"))
    for name in parts.values():
        (stage.folder / name).touch()
    stage.finish()
    return kept


def test_parts_whose_input_is_the_same_are_kept(tmp_path: Path) -> None:
    both = ("sea_sft", "sea_dpo")
    with Run(config(tmp_path)) as run:
        assert [synthesize(run), *(align(run, v) for v in both)] == ["new"] * 3
        assert evaluate(run, *both) == []
    with Run(config(tmp_path, overwrite=True, variants__sea_sft__lr=0.5)) as run:
        assert [synthesize(run), *(align(run, v) for v in both)] == ["done", "new", "done"]
        assert evaluate(run, "sea_dpo") == ["sea_dpo", "sea_sft"]
        assert evaluate(run, *both) == ["sea_dpo"], "also when the variant was left out in between"
        assert align(run, "text_sft") == "new"
        assert evaluate(run, *both, "text_sft") == sorted(both), "a variant more costs the others nothing"
    with Run(config(tmp_path, overwrite=True, variants__sea_sft__lr=0.5, evaluate__limit=1)) as run:
        assert evaluate(run, *both) == [], "another setting concerns them all"


def test_stage_whose_input_was_deleted_by_hand_is_not_lost(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        synthesize(run)
        align(run, "sea_sft")
    (tmp_path / "synthesize" / "stage.json").unlink()
    with Run(config(tmp_path)) as run:
        with pytest.raises(ValueError, match="synthesize is not done in this run; add synthesize to stages"):
            align(run, "sea_sft")
    assert (tmp_path / "align" / "sea_sft" / "stage.json").exists()


def test_stage_refuses_an_input_that_does_not_fit_the_configuration(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        synthesize(run)
    with Run(config(tmp_path, synthesis__lr=0.2)) as run:
        with pytest.raises(ValueError, match=r"(?s)synthesize was made from .*0\.1 -> 0\.2.*align/sea_sft reads it"):
            align(run, "sea_sft")


def test_run_without_a_name_is_always_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(2):
        with Run(Config(experiment="test"), command=["experiment=test"]) as run:
            synthesize(run)
            paths.append(run.path)
            assert run.resume_command == f"python train.py experiment=test run={run.path.name}"
    assert paths[0] != paths[1]
    assert {p.parent for p in paths} == {tmp_path / "runs" / "test"}


def test_trials_of_a_sweep_have_folders_of_their_own_also_inside_one_slurm_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    for trial in ("t1", "t2", "t1"):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        with Run(Config(experiment="test")) as run:
            assert run.path == tmp_path / "runs" / "test" / f"sweep-abc-{trial}"
    with Run(Config(experiment="test", run="mine")) as run:
        assert run.path.name == "mine"


def test_run_is_named_after_the_slurm_job_so_that_a_requeue_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with Run(Config(experiment="test")) as run:
        assert run.path == tmp_path / "runs" / "test" / "4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with Run(Config(experiment="test")) as run:
        assert run.path.name == "4700_3"


@pytest.mark.parametrize("name", ["../outside", "a/b", "", "."])
def test_run_name_stays_below_its_experiment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected a folder name"):
        Run(Config(experiment="test", run=name))


def test_manifest_tells_code_machine_and_every_start_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-to-be-found")
    for _ in range(2):
        with Run(config(tmp_path, seed=5), {"model": "tiny"}, ["experiment=test"]) as run:
            synthesize(run)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["groups"], len(manifest["starts"])) == (5, {"model": "tiny"}, 2)
    assert {"torch", "transformers", "python"} <= set(manifest["starts"][0]["versions"])
    assert manifest["starts"][0]["host"]["cores"] >= 1
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "not-to-be-found" not in written


def test_second_process_is_refused_and_told_who_works_there(tmp_path: Path) -> None:
    first = start("with Run(cfg): (place / 'open').touch(); time.sleep(60)", tmp_path)
    try:
        until(tmp_path / "open")
        with pytest.raises(ValueError, match=rf"in use by process {first.pid} on .*run=NAME"):
            Run(config(tmp_path))
    finally:
        first.kill()
        first.communicate()
    with Run(config(tmp_path)) as run:  # the lock died with its process
        assert synthesize(run) == "new"
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            Run(config(tmp_path))


def test_lock_is_not_kept_by_a_forked_child(tmp_path: Path) -> None:
    """A loader's worker may outlive a killed run for a moment."""
    parent = start(
        """
        with Run(cfg):
            if os.fork() == 0:
                (place / "child").write_text(str(os.getpid())); time.sleep(60)
            time.sleep(60)
        """,
        tmp_path,
    )
    until(tmp_path / "child")
    time.sleep(0.2)
    child = int((tmp_path / "child").read_text())
    parent.kill()
    parent.wait()
    try:
        with Run(config(tmp_path)) as run:
            assert synthesize(run) == "new"
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_kill_9_in_a_stage_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    process = start(
        """
        with Run(cfg) as run:
            run.stage("synthesize", run.settings("seed", "synthesis")).finish({"osr": 0.97})
            stage = run.stage("align/sea_sft", run.settings("seed", "variants.sea_sft"), after=["synthesize"])
            for step in range(10**9):
                write_json(stage.folder / "progress.json", {"step": step, "padding": "x" * 10000})
                (place / "open").touch()
        """,
        tmp_path,
    )
    until(tmp_path / "open")
    time.sleep(0.3)
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / "align" / "sea_sft" / "progress.json").read_text())["step"] >= 0
    with Run(config(tmp_path)) as run:
        assert synthesize(run) == "done"
        stage = run.stage("align/sea_sft", run.settings("seed", "variants.sea_sft"), after=["synthesize"])
        assert stage.state == "resume"


def test_full_disk_is_one_message_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    process = start(
        """
        import resource
        def action():
            with Run(cfg) as run:
                run.stage("synthesize", run.settings("seed", "synthesis")).finish({"osr": 0.97})
                stage = run.stage("align/sea_sft", run.settings("seed", "variants.sea_sft"))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
                write_json(stage.folder / "big.json", "x" * 100_000)
        sys.exit(exit_code_of(action))
        """,
        tmp_path,
    )
    code, _, err = output(process)
    assert code == 1
    assert "error: the disk is full" in err
    assert "big.json" in err
    assert "Traceback" not in err
    with Run(config(tmp_path)) as run:
        assert synthesize(run) == "done"
        assert run.stage("align/sea_sft", run.settings("seed", "variants.sea_sft")).state == "resume"


def test_other_ranks_see_what_the_leader_decided(tmp_path: Path) -> None:
    launcher = {"TORCHELASTIC_RUN_ID": "one", "WORLD_SIZE": "2"}
    program = """
        with Run(cfg) as run:
            first = run.stage("synthesize", run.settings("seed", "synthesis"))
            if not first.done:
                time.sleep(0.3 if run.leader else 0)
                first.finish({"from": "leader" if run.leader else "follower"})
            print(run.leader, first.state, run.result("synthesize"))
    """
    for found in ("done", "done"):
        follower = start(program, tmp_path, RANK="1", **launcher)
        leader = start(program, tmp_path, RANK="0", **launcher)
        told = [output(process)[1].strip() for process in (leader, follower)]
        assert told == [f"True {found} {{'from': 'leader'}}", f"False {found} {{'from': 'leader'}}"]
        launcher["TORCHELASTIC_RUN_ID"] = "two"


def test_two_launches_of_torchrun_with_one_id_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several nodes and a static rendezvous: the id is `none` each time. The store is torchrun's own, one a launch."""
    names = []
    for _ in range(2):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launch = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
        launch |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        told = []
        for rank in ("0", "1", "0"):
            monkeypatch.setenv("RANK", rank)
            told.append(session())
        assert len(set(told)) == 1
        names += told[:1]
    assert names[0] != names[1]


def test_torchrun_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ValueError, match="set run=NAME or run_dir=PATH"):
        Run(Config(experiment="test"))


def test_damaged_state_file_is_named(tmp_path: Path) -> None:
    with Run(config(tmp_path)) as run:
        synthesize(run)
        (tmp_path / "synthesize" / "stage.json").write_text('{"status": "do')
        with pytest.raises(ValueError, match=r"synthesize/stage\.json: not JSON .*delete the folder"):
            synthesize(run)


def test_a_plugin_counts_by_its_source(tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text("A = 1\n")
    cfg = config(tmp_path / "run", model__plugin=str(plugin))
    with Run(cfg) as run:
        run.stage("align/x", run.settings("model")).finish()
    plugin.write_text("A = 2\n")
    with Run(cfg) as run, pytest.raises(ValueError, match=r"model\.plugin\.source: \"\w{16}\" -> \"\w{16}\""):
        run.stage("align/x", run.settings("model"))


def test_keys_that_do_not_apply_are_not_recorded_so_that_older_runs_can_be_resumed(tmp_path: Path) -> None:
    with Run(config(tmp_path / "run")) as run:
        assert not {"model.plugin", "model.blank_shape", "model.blank_level"} & set(run.settings("model"))
    own = config(tmp_path / "own", model__modality="scent", model__blank_shape=[2, 3])
    with Run(own) as run:
        assert run.settings("model")["model.blank_shape"] == [2, 3]
