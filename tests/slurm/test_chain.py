"""Jobs on a real SLURM cluster that nobody disturbs: a chain of stages, an array on one store, a stage that fails."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from tests.slurm.cluster import Chain, same_adapter, same_store, slurm


def test_chain_of_three_stages_equals_one_process(undisturbed: Path, tmp_path: Path) -> None:
    """synthesize as an array -> align by two ranks -> evaluate, in a folder with a blank in its name."""
    chain = Chain(tmp_path / "a run", "slurm.synthesize.array=2", "slurm.align.tasks=2")
    assert list(chain.ids) == ["synthesize", "align", "evaluate"]
    assert f"afterok:{chain.ids['synthesize']}" in chain.field("align", "Dependency")
    chain.completes()
    same_store(chain.run, undisturbed)
    same_adapter(chain.run, undisturbed)
    report = json.loads((chain.run / "report.json").read_text())
    assert report["synthesis"]["n"] == 12
    assert {row["variant"] for row in report["results"]} >= {"sea_sft"}
    starts = json.loads((chain.run / "manifest.json").read_text())["starts"]
    assert len(starts) == 4
    assert starts[-1]["host"]["slurm_job"] == chain.ids["evaluate"]


def test_array_of_four_writes_one_store_and_one_task_is_requeued(undisturbed: Path, tmp_path: Path) -> None:
    chain = Chain(tmp_path / "run", "slurm.synthesize.array=4", "stages=[synthesize]")
    chain.until_said("synthesize", "shard-1-of-4 begins")
    # Whenever it comes: before the program can listen, while the model is loaded, or in the work.
    time.sleep(2)
    slurm("scancel", "--signal=USR1", f"{chain.ids['synthesize']}_1")
    chain.completes()
    assert chain.field("synthesize_1", "Restarts") == "1"
    assert len(list((chain.run / "synthesize" / "store").glob("index-*.jsonl"))) == 4
    same_store(chain.run, undisturbed)


def test_failed_stage_is_failed_and_takes_its_dependents_with_it(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    chain = Chain(run, "seed=1")  # the run was made with another one: a real error, in the stage itself
    chain.until_state("synthesize", "FAILED")
    assert chain.field("synthesize", "ExitCode") == "1:0"
    assert "seed: 0 -> 1" in chain.log("synthesize")
    for stage in ("align", "evaluate"):
        chain.until_state(stage, "CANCELLED")
        assert chain.log(stage) == ""
    same_store(run, undisturbed)
    same_adapter(run, undisturbed)
