"""The two pages of `train.py`: the list of experiments, and `--help`. Plain text, no import slower than dataclasses."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.keys import leaves, schema
from configs.schema import REQUIRED, AlignVariant, Config

if TYPE_CHECKING:
    from configs.compose import Composed

CONFIGS = Path(__file__).resolve().parent

USAGE = """\
usage: python train.py experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...] [options]

  python train.py                                      list the experiments
  python train.py experiment=sea_image                 run one, all its stages
  python train.py experiment=sea_image run=first       name the run; the same command again resumes it
  python train.py experiment=sea_image run=first stages=[align,evaluate]
  python train.py experiment=sea_image model=smol_llava data=saferlhf data.limit=8 stages=[synthesize]
  python train.py -m experiment=sea_image seed=0,1,2   one run for each value
"""

OPTIONS = """\
options:
  -h, --help         this page; with experiment=NAME its own description and values
  --cfg              print the composed configuration and exit
  -m, --multirun     run every combination of comma-separated values, one after the other
  --config-dir DIR   look for experiments and groups there too (may be repeated)

exit codes: 0 done, 1 the run failed, 2 a mistake in the command or the configuration, 130 Ctrl-C, 143 terminated,
  75 told to stop and to be started again (SIGUSR1)
SEAWALL_TRACEBACK=1 shows full tracebacks; they are always in run.log of the run directory
"""


def experiment_list(config_dirs: Sequence[Path] = ()) -> str:
    """Every experiment with the first line of its header comment."""
    found = {path.stem: header(path) for path in _files("experiment", config_dirs)}
    width = max(map(len, found), default=0)
    lines = [f"  {name:{width}}  {(about or ['(no header comment)'])[0]}" for name, about in sorted(found.items())]
    return "\n".join(
        [
            "experiments (python train.py experiment=NAME; add --help for more):",
            *lines,
            "",
            "python train.py --help: all",
        ]
    )


def help_page(composed: Composed | None = None, config_dirs: Sequence[Path] = ()) -> str:
    """Usage, groups with their choices, and every key; values are those of `composed` if it is given."""
    width = max(80, min(shutil.get_terminal_size((118, 24)).columns, 140))
    parts = [USAGE]
    if composed is not None:
        name = composed.choices["experiment"]
        about = [line for path in _files("experiment", config_dirs) if path.stem == name for line in header(path)]
        parts.append(textwrap.indent("\n".join([f"experiment {name}:", *about]), "  ").lstrip() + "\n")
    parts += ["\n".join(["groups (GROUP=CHOICE takes a file of configs/GROUP):", *_groups(config_dirs, width)]) + "\n"]
    title = "keys (KEY=VALUE; lists as 'KEY=[a,b]', nothing as null):"
    parts += ["\n".join([title, *_keys(composed.config if composed else None, width)]) + "\n", OPTIONS]
    return "\n".join(parts)


def header(path: Path) -> list[str]:
    """The comment lines at the top of a YAML file, without `#` and without Hydra's package line."""
    about: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            about.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return about


def groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Each group and its choices."""
    names = sorted({p.name for d in (CONFIGS, *config_dirs) for p in d.iterdir() if p.is_dir()} - {"__pycache__"})
    return {name: sorted(path.stem for path in _files(name, config_dirs)) for name in names}


def _files(group: str, config_dirs: Iterable[Path]) -> list[Path]:
    return [path for folder in (CONFIGS, *config_dirs) for path in sorted((folder / group).glob("*.yaml"))]


def _groups(config_dirs: Sequence[Path], width: int) -> list[str]:
    lines = []
    for name, choices in groups(config_dirs).items():
        if choices:
            indent = f"  {name:{12}}"
            lines += textwrap.wrap(
                ", ".join(choices), width, initial_indent=indent, subsequent_indent=" " * len(indent)
            )
    return lines


def _keys(config: Config | None, width: int) -> list[str]:
    """One line for each key; a variant's settings once, then what each variant sets otherwise."""
    shown = schema()
    if config is not None:
        values = {leaf.key: leaf.value for leaf in leaves(config)}
        shown = {k: type(leaf)(k, values.get(k, leaf.value), leaf.field) for k, leaf in shown.items()}
    abouts = {f.name: f.metadata["help"] for f in fields(Config)}
    lines, section = [], ""
    for key, leaf in shown.items():
        if key.startswith("slurm.") and not key.startswith("slurm.all."):
            continue  # the same keys again for each stage
        head = key.split(".")[0] if "." in key else ""
        if head != section:
            section = head
            lines += ["", f"  {head}: {abouts[head]}"]
        meta = leaf.field.metadata
        about = meta["help"] + (f" ({' | '.join(meta['choices'])})" if meta["choices"] else "")
        start = f"  {key:38}  {f'{leaf.field.type} = {_value(leaf.value)}':24}  "
        if len(start) > 68:  # a long value: its meaning goes below
            lines.append(start.rstrip())
            start = " " * 68
        lines += textwrap.wrap(about, width, initial_indent=start, subsequent_indent=" " * 68)
    lines += ["", "  slurm.<stage>.KEY sets the same for one stage: slurm.synthesize.array=8", ""]
    lines += ["  the variants and what they set otherwise:"]
    for name, variant in (config or Config()).variants.items():
        plain = {leaf.key: leaf.value for leaf in leaves(AlignVariant())}
        differing = [f"{leaf.key}={_value(leaf.value)}" for leaf in leaves(variant) if plain[leaf.key] != leaf.value]
        text = f"variants.{name}: {' '.join(differing)}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")
    return lines


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if value == REQUIRED:
        return "(required)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(str, value)) + "]"
    # A template's line feeds, escaped as in an override in double quotes: one value stays on one line.
    return str(value).replace("\\", "\\\\").replace("\n", "\\n") if value != "" else "''"
