"""The jobs that run an experiment on a SLURM cluster: one for each stage, or an array for `synthesize`.

    jobs = plan(cfg, overrides, run_dir)      # what, with which resources, after which
    jobs[0].script                            # scripts/slurm/job.sh with the stage's values

`scripts/slurm/submit.py` hands them to sbatch. Which signals mean what: docs/slurm.md.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from configs.check import PROJECT
from configs.schema import Config, SlurmJob

TEMPLATE = PROJECT / "scripts" / "slurm" / "job.sh"
OURS = ("run", "run_dir", "stages", "synthesis.shard", "synthesis.shards")
"""Keys that each job sets itself."""


@dataclass(frozen=True)
class Job:
    """One call of sbatch: `script`, and the file below the run directory that keeps it. `log`: where output goes."""

    stage: str
    script: str
    file: Path
    log: Path


def plan(cfg: Config, overrides: Sequence[str], run_dir: Path) -> list[Job]:
    """The jobs of `cfg.stages`, in order; each needs the one before.

    Args:
        overrides: the words of the command line that `cfg` was composed from.
        run_dir: absolute; all jobs, and all their restarts, work there.

    Raises:
        ValueError: a resource does not fit its stage; names the key.
    """
    return [_job(cfg, stage, overrides, run_dir) for stage in cfg.stages]


def resources(cfg: Config, stage: str) -> SlurmJob:
    """What a stage's job asks for: its own values over those of `slurm.all`.

    Raises:
        ValueError: names the key.
    """
    own, common = getattr(cfg.slurm, stage), cfg.slurm.all
    values = {
        f.name: getattr(common, f.name) if getattr(own, f.name) is None else getattr(own, f.name)
        for f in fields(SlurmJob)
    }
    found = SlurmJob(**values)
    key = f"slurm.{stage}"
    if (found.array or 1) > 1 and stage != "synthesize":
        raise ValueError(f"{key}.array: got {found.array}; only synthesize can be divided, set slurm.synthesize.array")
    if found.runtime not in ("pyxis", "apptainer"):
        raise ValueError(f"{key}.runtime: got {found.runtime!r}, expected pyxis or apptainer")
    seconds = seconds_of(found.time) if found.time is not None else math.inf
    if seconds is None:
        raise ValueError(f"{key}.time: got {found.time!r}, expected minutes, MM:SS, H:MM:SS, D-HH or D-HH:MM:SS")
    if seconds < (found.warn or 0) + 60:  # SLURM may send the signal a minute early
        raise ValueError(
            f"{key}.time: {found.time} is {seconds:.0f} s, expected at least {key}.warn ({found.warn} s) and a minute: "
            "it would be told to stop as soon as it starts"
        )
    for option in found.extra or []:
        if not option.startswith("-"):
            raise ValueError(f"{key}.extra: got {option!r}, expected an option of sbatch, such as --constraint=a100")
    return found


def seconds_of(time: str) -> float | None:
    """A time limit as sbatch reads it; None if it is none. `90` is minutes, `1-12` days and hours."""
    if time == "UNLIMITED":
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, first, second, third = (None if text is None else int(text) for text in match.groups())
    if days is not None:  # D-HH[:MM[:SS]]
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:  # HH:MM:SS
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)  # MM[:SS]


def _job(cfg: Config, stage: str, overrides: Sequence[str], run_dir: Path) -> Job:
    r = resources(cfg, stage)
    folder = run_dir / "slurm"
    array = (r.array or 1) > 1
    log = folder / (f"{stage}-%A_%a.out" if array else f"{stage}-%j.out")
    values = {
        "STAGE": stage,
        "RUN_DIR": str(run_dir),
        "DIRECTIVES": "\n".join(f"#SBATCH {option}" for option in _options(cfg, stage, r, log)),
        "WORKDIR": shlex.quote(str(Path.cwd())),
        "SETUP": "\n".join(r.setup or []),
        "RESTARTS": str(r.restarts),
        "SRUN": " ".join(_srun(r, run_dir)),
        "COMMAND": _command(cfg, stage, r, overrides, run_dir),
    }
    script = re.sub(r"@([A-Z_]+)@", lambda m: values[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    return Job(stage, script, folder / f"{stage}.sh", log)


def _options(cfg: Config, stage: str, r: SlurmJob, log: Path) -> list[str]:
    """Options of sbatch; Lightning wants the number of tasks for each node, not the total."""
    named: dict[str, Any] = {
        "job-name": stage,
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "time": r.time,
        "nodes": r.nodes,
        "ntasks-per-node": _tasks(r),
        "gpus-per-node": r.gpus or None,
        "cpus-per-task": r.cpus,
        "mem": r.mem,
        "array": f"0-{r.array - 1}" if r.array and r.array > 1 else None,
        "output": shlex.quote(str(log.parent).replace("%", "%%") + f"/{log.name}"),
        "open-mode": "append",  # a restart must not wipe out what the start before has said
        "signal": f"B:USR1@{r.warn}",
        "kill-on-invalid-dep": "yes",
    }
    return [f"--{name}={value}" for name, value in named.items() if value is not None] + ["--requeue", *(r.extra or [])]


def _tasks(r: SlurmJob) -> int:
    return r.tasks or max(1, r.gpus or 0)


def _srun(r: SlurmJob, run_dir: Path) -> list[str]:
    options = ["--kill-on-bad-exit=0", "--wait=120"]
    options += [f"--cpus-per-task={r.cpus}"] if r.cpus else []  # SLURM 22.05 and later do not take it from the job
    if r.container and r.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in _mounts(r, run_dir))
        options += [
            f"--container-image={r.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={Path.cwd()}",
        ]
    return [shlex.quote(option) for option in options]


def _command(cfg: Config, stage: str, r: SlurmJob, overrides: Sequence[str], run_dir: Path) -> str:
    words = []
    if r.container and r.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if r.gpus else []), "--pwd", str(Path.cwd())]
        words += ["--bind", ",".join(_mounts(r, run_dir)), r.container]
    words += [r.python or ("python" if r.container else sys.executable), str(PROJECT / "train.py")]
    set_here = [*OURS, "trainer.devices", "trainer.num_nodes"]
    words += [word for word in overrides if word.lstrip("+").partition("=")[0] not in set_here]
    words += [f"run_dir={_quoted(str(run_dir))}", f"stages=[{stage}]"]
    words += [f"trainer.devices={_tasks(r)}", f"trainer.num_nodes={r.nodes}"]
    if _tasks(r) * (r.nodes or 1) > 1 and cfg.trainer.strategy == "auto":
        words.append("trainer.strategy=ddp")
    command = shlex.join(words)
    if r.array and r.array > 1:
        command += f' synthesis.shards={r.array} synthesis.shard="$SLURM_ARRAY_TASK_ID"'
    return command


def _quoted(text: str) -> str:
    """A path as a value of an override: Hydra reads some signs as its own."""
    if re.fullmatch(r"[\w/.+@%-]+", text):
        return text
    return "'" + text.replace("'", r"\'") + "'"


def _mounts(r: SlurmJob, run_dir: Path) -> list[str]:
    return list(dict.fromkeys([str(PROJECT), str(Path.cwd()), str(run_dir), *(r.mounts or [])]))
