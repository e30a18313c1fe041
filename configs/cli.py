"""The command line of `train.py`: options here, everything of the form KEY=VALUE goes to Hydra."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.pages import USAGE

OPTION_NAMES = ("--help", "--cfg", "--multirun", "--config-dir")
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    overrides: list[str]
    config_dirs: list[Path]
    help: bool
    show: bool
    multirun: bool


def parse(argv: list[str]) -> Request:
    """Split `argv` into options and overrides. Raises SystemExit(2) for an unknown option."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.format_usage = lambda: USAGE  # type: ignore[method-assign]
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir", action="append", type=Path, default=[])
    parser.add_argument("overrides", nargs="*")
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_near_option(unknown[0])}")
    return Request(given.overrides, given.config_dir, given.help, given.cfg, given.multirun)


def _near_option(word: str) -> str:
    """`; did you mean experiment=sea_image?` for a key with dashes, else the nearest option."""
    bare = word.lstrip("-")
    if "=" in bare:
        return f"; did you mean {bare}?"
    near = difflib.get_close_matches(word, OPTION_NAMES, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(OPTION_NAMES)}, or KEY=VALUE"


def show(page: str) -> None:
    """Print a page; a reader that stops early (`| head`) is no error."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start_all(request: Request) -> int:
    """`-m`: run each combination in a process of its own, after all of them were found valid; the worst exit code.

    Raises ConfigError.
    """
    from configs.compose import check_words, compose

    check_words(request.overrides, request.config_dirs)
    runs = combinations(request.overrides)
    for overrides in runs:
        compose(overrides, request.config_dirs)
    folders = [word for folder in request.config_dirs for word in ("--config-dir", str(folder))]
    worst = 0
    for number, overrides in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {' '.join(overrides)}", flush=True)
        code, interrupted = ended(subprocess.Popen([sys.executable, str(TRAIN), *overrides, *folders]))
        if interrupted or code in (130, -2):
            return 130
        worst = max(worst, 128 - code if code < 0 else code)
    return worst


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """(exit code, whether Ctrl-C came): the process got it as well; it saves, and says how to resume. A second Ctrl-C
    ends it at once."""
    interrupted = False
    while True:
        try:
            return process.wait(), interrupted
        except KeyboardInterrupt:
            interrupted = True


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every combination of comma-separated values; a given run name gets `-1`, `-2`, ... so that none is shared.

    Raises ConfigError if an override cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from configs.compose import ConfigError

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        axes = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [str(o.input_line)]
            for o in parsed
        ]
    except HydraException as error:
        raise ConfigError(f"{error}") from error
    runs = [list(chosen) for chosen in itertools.product(*axes)]
    if len(runs) > 1:
        for number, chosen in enumerate(runs, 1):
            chosen[:] = [f"{o}-{number}" if o.startswith(("run=", "run_dir=")) else o for o in chosen]
    return runs
