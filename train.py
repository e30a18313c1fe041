"""Run an experiment: compose its configuration, open its run directory, run its stages.

    python train.py                          list the experiments
    python train.py --help                   every group and key
    python train.py experiment=sea_image     run one

Heavy imports (torch, transformers, lightning) come after the configuration is read, so mistakes are told at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from configs import cli, pages

if TYPE_CHECKING:
    from configs.compose import Composed


def main(argv: list[str]) -> int:
    """Answer the command line; returns the exit code (see `--help`)."""
    request = cli.parse(argv)
    if request.help and not any(o.startswith("experiment=") for o in request.overrides):
        cli.show(pages.help_page(config_dirs=request.config_dirs))
        return 0
    if not request.overrides:
        cli.show(pages.experiment_list(request.config_dirs))
        return 0

    from configs.compose import ConfigError, compose, save

    try:
        if request.multirun:
            return cli.start_all(request)
        showing = request.help or request.show
        composed = compose(request.overrides, request.config_dirs, check_paths=not showing)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if request.help:
        cli.show(pages.help_page(composed, request.config_dirs))
        return 0
    if request.show:
        cli.show(save(composed.config).rstrip())
        return 0

    from stages.outcome import exit_code_of

    return exit_code_of(lambda: run_stages(composed, argv))


def run_stages(composed: Composed, argv: list[str]) -> None:
    """Every selected stage in order, in one locked run directory. A stage is `run(cfg, run)` of `stages/<name>.py`.

    Raises ConfigError, before there is a directory, for what cannot work.
    """
    from stages.runs import Run

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns at every fork of a loader
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from stages.preflight import preflight  # imports transformers, which reads these

    preflight(composed.config)
    if composed.config.plan:
        from stages.memory_plan import show

        show(composed.config)
        return
    with Run(composed.config, composed.choices, argv) as run:
        for name in composed.config.stages:
            importlib.import_module(f"stages.{name}").run(composed.config, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
