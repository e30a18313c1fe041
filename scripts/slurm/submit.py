"""Submits the stages of an experiment to SLURM, each after the one before: the words of `train.py`, and `slurm.*`.

    python scripts/slurm/submit.py experiment=sea_image run=mine --dry-run     # prints the scripts, no more
    python scripts/slurm/submit.py experiment=sea_image run=mine slurm.all.partition=gpu slurm.all.gpus=1 \
        slurm.synthesize.array=8 slurm.align.gpus=4 slurm.all.time=4:00:00

A mistake in the configuration is told here, as train.py would tell it, and nothing is submitted. docs/slurm.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.compose import Composed, ConfigError, compose
from stages.run_folder import choose
from stages.slurm_jobs import Job, plan


def main(argv: list[str]) -> int:
    """Exit code 0: submitted or printed; 1: sbatch refused; 2: a mistake in the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    parser.add_argument("--config-dir", action="append", type=Path, default=[], help="as for train.py")
    args = parser.parse_intermixed_args(argv)
    try:
        composed = checked(args.overrides, args.config_dir)
        cfg = composed.config
        # Every job and every restart must find the same place, so its name cannot be left to them.
        run_dir = choose(replace(cfg, run=cfg.run or time.strftime("%Y%m%d-%H%M%S")), leader=True)
        folders = [word for folder in args.config_dir for word in ("--config-dir", str(folder.resolve()))]
        jobs = plan(cfg, [*args.overrides, *folders], run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"run directory: {run_dir}")
    if args.dry_run:
        for number, job in enumerate(jobs):
            after = f" --dependency=afterok:<{jobs[number - 1].stage}>" if number else ""
            print(f"\n### sbatch --parsable{after} {job.file}\n{job.script}", end="")
        return 0
    return submit(jobs)


def checked(overrides: list[str], config_dirs: list[Path]) -> Composed:
    """Composed, and looked through as far as this machine can: the GPUs are elsewhere. Raises ConfigError."""
    composed = compose(overrides, config_dirs)
    if composed.config.synthesis.shard is not None:
        raise ConfigError("synthesis.shard is set by the jobs; say how many with slurm.synthesize.array=N")
    from stages.preflight import preflight  # imports torch

    cfg = composed.config
    preflight(replace(cfg, trainer=replace(cfg.trainer, accelerator="auto")))
    return composed


def submit(jobs: list[Job]) -> int:
    """Writes each script beside its logs and hands it to sbatch; says how to watch and to cancel."""
    ids: list[str] = []
    for job in jobs:
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(job.script, encoding="utf-8")
        after = [f"--dependency=afterok:{ids[-1]}"] if ids else []
        command = ["sbatch", "--parsable", *after, str(job.file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            print("error: there is no sbatch on this machine; --dry-run prints the scripts", file=sys.stderr)
            return 1
        if done.returncode:
            told = done.stderr.strip() or done.stdout.strip()
            print(f"error: sbatch refused {job.file}: {told}", file=sys.stderr)
            if ids:
                print(
                    f"already submitted: {' '.join(ids)}; take them back with scancel {' '.join(ids)}", file=sys.stderr
                )
            return 1
        ids.append(done.stdout.strip().partition(";")[0])  # a federation adds the cluster's name
        print(f"{job.stage}: job {ids[-1]}, log {job.log}")
    print(f"watch:  squeue -j {','.join(ids)}")
    print(f"follow: tail -F {jobs[0].log.parent}/*.out")
    print(f"cancel: scancel {' '.join(ids)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
