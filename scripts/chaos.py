"""Kills runs at random moments, starts the same command again, and compares what comes out with an undisturbed run.

    python scripts/chaos.py                                       # the trials (scripts/chaos_trials.py)
    python scripts/chaos.py experiment=sea_image --kills 20       # one, or several: experiment=detoxifier,export
    python scripts/chaos.py experiment=all --kills 20 --keep PLACE
    python scripts/chaos.py experiment=sea_image --signals KILL --kills 3 -- synthesis.harmful=3

Signals: KILL, TERM, USR1 and INT (Ctrl-C), drawn anew for each kill. After KILL nothing was saved; after the others the
exit code must be the signal's. When a run is complete, everything in it must equal the undisturbed run's to the bit
(scripts/chaos_compare.py says what); if that comes before the last kill, another run begins. Attempts are forked from a
process that has imported everything, so that the kills fall into the work and not into the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must not inherit running threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

import train
from callbacks.signals import EXIT_CODES
from configs.compose import last_wins
from configs.schema import STAGES
from mllm.smol import cache_folder
from scripts.chaos_compare import differences
from scripts.chaos_trials import TRIALS, Trial, few_phrases, write_data

SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "TERM", "USR1", "INT")}
SHARES = (0.02, 0.6)
"""Shortest and longest life of an attempt that is killed, as shares of the undisturbed run's CPU time."""
SLOW_END = 300.0
"""Seconds within which a run that was told to stop must have stopped."""


class Outcome(NamedTuple):
    """Of one trial. `wrong`: what went wrong, in words."""

    kills: Counter[str]
    runs: int
    seconds: float
    wrong: list[str]


class Chaos:
    """Runs in `scratch`; `places`: what the words' @NAME@ stand for."""

    def __init__(self, scratch: Path, api: str, extra: list[str]) -> None:
        self.scratch, self.extra = scratch, extra
        self.places = {"data": str(scratch / "data"), "api": api}
        write_data(scratch / "data")

    def undisturbed(self, name: str) -> tuple[Path, float]:
        """The run directory of a trial that nobody disturbed, made once; and its CPU time (s), 0 if it was there."""
        run = self.scratch / name / "undisturbed"
        if name in self.places:
            return run, 0.0
        for other in TRIALS[name].needs:
            self.undisturbed(other)
        status, seconds, _ = self.attempt(TRIALS[name], run, None, signal.SIGKILL)
        if status != 0:
            raise SystemExit(f"{name}: undisturbed, it ends with {status}:\n{self.told(run)}")
        self.places[name] = str(run)
        return run, seconds

    def torment(self, name: str, kills: int, rng: random.Random, signals: list[str]) -> Outcome:
        """Runs, each killed until it is complete, until so many kills have fallen."""
        began = time.monotonic()
        whole, cpu = self.undisturbed(name)
        cpu = cpu or 3.0
        fallen: Counter[str] = Counter()
        runs, wrong = 0, []
        while (not runs or fallen.total() < kills) and not wrong:
            run, code, killed = self.scratch / name / f"run-{runs}", -1, True
            while killed and not wrong:
                sent = rng.choice(signals)
                life = rng.uniform(*SHARES) * cpu if fallen.total() < kills else None
                code, _, killed = self.attempt(TRIALS[name], run, life, SIGNALS[sent])
                if killed:
                    fallen[sent] += 1
                    expected = {0, -SIGNALS[sent], EXIT_CODES.get(SIGNALS[sent], 0)}
                    if code not in expected:
                        wrong.append(f"after SIG{sent} it ended with {code}, expected one of {expected}")
                    killed = code != 0  # the signal may have come when all was done
            if code != 0 and not wrong:
                wrong.append(f"it ended with {code}")
            wrong += [self.told(run)] if wrong else differences(whole, run)
            runs += 1
            if not wrong:
                shutil.rmtree(run)
        return Outcome(fallen, runs, time.monotonic() - began, wrong)

    def attempt(self, trial: Trial, run: Path, life: float | None, sent: int) -> tuple[int, float, bool]:
        """One process, sent a signal after `life` seconds of its own CPU time (a busy machine changes nothing).

        Returns (exit code, negative for a signal; its CPU time (s); whether the signal was sent).
        """
        words = [f"experiment={trial.experiment}", f"run_dir={run}", *trial.words, *self.extra]
        filled = [re.sub(r"@(\w+)@", lambda m: str({**self.places, "run": run}[m[1]]), word) for word in words]
        run.parent.mkdir(parents=True, exist_ok=True)
        pid = start(last_wins(*filled), run.with_suffix(".log"), self.cache(run), trial.few)
        process, killed, deadline = psutil.Process(pid), False, float("inf")
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, killed
            times = process.cpu_times()
            if life is not None and not killed and times.user + times.system > life:
                os.kill(pid, sent)
                killed, deadline = True, time.monotonic() + SLOW_END
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.03)

    def cache(self, run: Path) -> Path:
        """A cache of the run's own, with the models that are there: what is cached of one run must not help another."""
        folder = run.with_suffix(".cache")
        if not folder.exists():
            folder.mkdir(parents=True)
            for path in cache_folder().glob("*"):
                if path.name != "sections":
                    (folder / path.name).symlink_to(path)
        return folder

    def told(self, run: Path) -> str:
        """The end of what it said."""
        return run.with_suffix(".log").read_text(errors="replace")[-3000:]


def start(argv: list[str], log: Path, cache: Path, few: bool) -> int:
    """Forks an attempt; its output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(Exception):
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["SEAWALL_CACHE"] = str(cache)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # before a run begins it ends the process, as TERM and USR1 do
        if few:
            few_phrases()
        code = train.main(argv)
    os._exit(code)


def row(name: str, outcome: Outcome) -> str:
    """Of the table in docs/resuming.md."""
    kills = ", ".join(f"{outcome.kills[s]} {s}" for s in SIGNALS if outcome.kills[s])
    result = "equal to the bit" if not outcome.wrong else f"DIFFERS: {outcome.wrong[0]}"
    return f"| {name} | {outcome.kills.total()} ({kills}) | {outcome.runs} | {outcome.seconds:.0f} | {result} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="experiment=NAME[,NAME...] of the trials, or experiment=all")
    parser.add_argument("--kills", type=int, default=20, help="of each trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default=",".join(SIGNALS))
    parser.add_argument("--keep", type=Path, help="a folder for the runs, in place of a temporary one")
    parser.add_argument("overrides", nargs="*", help="further keys of train.py")
    words = sys.argv[1:]  # argparse gives no words to a second list of positionals behind options
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    args.overrides += words[at + 1 :]
    if args.experiment is None:
        print("\n".join(f"{name}: experiment={trial.experiment}" for name, trial in TRIALS.items()))
        return 0
    asked = args.experiment.removeprefix("experiment=").split(",")
    names = list(TRIALS) if asked == ["all"] else asked
    signals = args.signals.split(",")
    if unknown := [*(n for n in names if n not in TRIALS), *(s for s in signals if s not in SIGNALS)]:
        parser.error(f"{unknown[0]} is neither a trial ({', '.join(TRIALS)}) nor a signal ({', '.join(SIGNALS)})")
    if args.keep is not None and args.keep.is_dir() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: there is something in it, expected a new or an empty folder")
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}")
    with contextlib.ExitStack() as stack:
        scratch = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seawall-chaos-")))
        api = ""
        if any(TRIALS[name].experiment == "generate_pairs" for name in names):
            from tests.datamodules.test_pair_generator import author
            from tests.loopback import LoopbackServer

            api = stack.enter_context(LoopbackServer(author)).base_url
        chaos = Chaos(scratch.resolve(), api, args.overrides)
        print("| trial | kills | runs | seconds | result |\n|---|---|---|---|---|", flush=True)
        wrong = 0
        for name in names:
            outcome = chaos.torment(name, args.kills, random.Random(f"{args.seed}/{name}"), signals)
            print(row(name, outcome), flush=True)
            for what in outcome.wrong:
                print(f"    {what}", file=sys.stderr, flush=True)
            wrong += bool(outcome.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
