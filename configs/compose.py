"""From overrides to a typed configuration: Hydra's compose API over the strict schema, with errors a person can use.

Hydra itself lets two mistakes pass: an unknown key added with `+`, and the traceback of a misspelled one. The composed
tree is therefore merged once more into the schema, and every error is retold as file, line, key and suggestion.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from configs.check import check
from configs.keys import find, nearest, suggest
from configs.pages import groups
from configs.schema import Config, default_variants

CONFIGS = Path(__file__).resolve().parent


class ConfigError(ValueError):
    """A mistake in the configuration: one message, exit code 2."""


@dataclass(frozen=True)
class Composed:
    """The typed configuration, and which file each group was taken from (`{"model": "micro_llava", ...}`)."""

    config: Config
    choices: dict[str, str]


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = (), check_paths: bool = True) -> Composed:
    """Compose and check. `config_dirs` are searched for experiments and groups after `configs/`.

    Raises ConfigError.
    """
    folders = [CONFIGS, *(Path(d).resolve() for d in config_dirs)]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir: {folder} is no folder")
    choices: dict[str, str] = {}
    try:
        check_words(overrides, config_dirs)
        tree, choices = _compose(overrides, folders)
        _require_all(tree)
        cfg = OmegaConf.to_object(tree)
        assert isinstance(cfg, Config)
        check(cfg, check_paths)
    except ConfigError:
        raise
    except MissingConfigException as error:
        _retell_missing_file(error, folders)
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override}: cannot be read as KEY=VALUE ({str(error).splitlines()[-2]}); quote a value with "
            f"special characters, for instance \"run_dir='a=b'\", and lists as 'stages=[align,evaluate]'"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        _retell(error, folders)
    except ValueError as error:
        key = match[1] if (match := re.match(r"([\w.]+): got ", str(error))) else ""
        raise ConfigError(_written_in(key, overrides, choices, folders) + str(error)) from error
    return Composed(cfg, choices)


def save(cfg: Config) -> str:
    """The configuration as YAML, everything resolved. Of `slurm`, which says little in many keys, what is set."""
    tree = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(cfg)))
    for stage, job in list(tree.slurm.items()):
        tree.slurm[stage] = {key: value for key, value in job.items() if value is not None}
        if not tree.slurm[stage]:
            del tree.slurm[stage]
    return OmegaConf.to_yaml(tree)


@cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
    for mapping in (schema.data.columns, schema.evaluate.adapters):  # free: `data.columns={question:prompt}`, no `+`
        OmegaConf.set_struct(mapping, False)
    return schema


def check_words(overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """What Hydra takes in another sense than people mean it, or refuses in its parser's words. Raises ConfigError."""
    seen: dict[str, str] = {}
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        if word.startswith("~"):
            raise ConfigError(f"{word}: a key cannot be taken away; leave it out for its default, or set {key}=VALUE")
        if "=" not in word:
            _retell_bare_word(word, config_dirs)
        if key in seen:
            raise ConfigError(f"{key} is given twice, {seen[key]} and {word}: leave one of them out")
        seen[key] = word


def last_wins(*words: str) -> list[str]:
    """For programs that set keys and take more from their users: of each key the last word, as `check_words` wants."""
    return list({word.partition("=")[0]: word for word in words}.values())


def _retell_bare_word(word: str, config_dirs: Sequence[Path]) -> NoReturn:
    if find(word) is not None:
        raise ConfigError(f"{word}: cannot be read as KEY=VALUE; write {word}=VALUE")
    known = groups([folder for folder in config_dirs if folder.is_dir()])
    choices = {name: group for group, names in reversed(known.items()) if group != "experiment" for name in names}
    choices |= dict.fromkeys(known["experiment"], "experiment")
    near = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {choices[near[0]]}={near[0]}?" if near else suggest(word)
    raise ConfigError(f"{word}: cannot be read as KEY=VALUE{hint}")


def _compose(overrides: Sequence[str], folders: list[Path]) -> tuple[DictConfig, dict[str, str]]:
    ConfigStore.instance().store(name="schema", node=_schema())
    search = ", ".join("'file://" + str(folder).replace("'", r"\'") + "'" for folder in folders[1:])
    with hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
        extra = [f"hydra.searchpath=[{search}]"] if search else []
        tree = hydra.compose("train", [*overrides, *extra], return_hydra_config=True)
    runtime = tree.hydra.runtime.choices
    choices = {str(k): str(v) for k, v in runtime.items() if "/" not in str(k) and v is not None}
    with open_dict(tree):
        del tree["hydra"]
    if "experiment" in choices:
        tree.experiment = choices["experiment"]
    strict = OmegaConf.merge(_schema(), OmegaConf.to_container(tree, resolve=True))
    assert isinstance(strict, DictConfig)
    return strict, choices


def _require_all(tree: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(tree))
    for key in missing:
        if key.startswith("variants."):
            name = key.split(".")[1]
            others = [v for v in tree.variants if not {f"variants.{v}.method", f"variants.{v}.data"} & set(missing)]
            raise ConfigError(f"variants.{name}: a new variant must set method and data; {nearest(name, others)}")
    if "experiment" in missing:
        raise ConfigError("no experiment given: python train.py experiment=NAME; `python train.py` lists them")
    for key in missing:
        leaf = find(key)
        about = leaf.field.metadata["help"] if leaf else ""
        raise ConfigError(f"{key} is not set ({about}); set it with {key}=VALUE")


def _retell_missing_file(error: MissingConfigException, folders: list[Path]) -> NoReturn:
    wanted = error.missing_cfg_file or ""
    group, _, name = wanted.rpartition("/")
    # A base among the `defaults` of a file comes without Hydra's own list of options.
    options = nearest(name, sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")}))
    where = re.match(r"In '([^']+)'", str(error))
    source = f"{_file(where[1], folders)}: " if where and where[1] != "train" else ""
    raise ConfigError(f"{source}{group}={name}: no such {group}, {options}") from error


def _retell(error: Exception, folders: list[Path]) -> NoReturn:
    """Raise ConfigError with source, key and advice, from the texts of Hydra and OmegaConf."""
    text = f"{error}\n{error.__cause__ or ''}"
    key = match[1] if (match := re.search(r"full_key: (\S+)", text)) else ""
    source = _source(text, key, folders)
    unknown = re.search(r"Key '([^']+)' (?:not in|is not in struct)", text)
    no_group = re.search(r"Could not override '([^']+)'\. No match in the defaults list", text)
    ambiguous = re.search(r"Ambiguous value for argument '([^']*)'", text)
    leaf = find(key)
    if no_group:
        told = f"override {no_group[1]}: no such group{suggest(no_group[1].rpartition('/')[2])}"
    elif key == "experiment" and "Cannot convert" in text:
        told = "an experiment file must begin with the line '# @package _global_'"
    elif "AlignVariant" in text and (unknown or "not a subclass" in text) and key.count(".") < 2:
        name = key.removeprefix("variants.")
        told = f"unknown variant {name}: {nearest(name, default_variants())}; new ones are added in an experiment file"
    elif ambiguous:
        told = f"{ambiguous[1]}: several values need -m (one run for each), or brackets if they are one list"
    elif unknown:
        told = f"unknown key {key}{suggest(key) or '; `python train.py --help` lists them all'}"
    elif leaf is not None:
        got = re.search(r"[Vv]alue '([^']*)' of type '([^']*)'", text)
        value = f"got {got[1]!r} ({got[2]})" if got else _first_line(error).rstrip(".")
        told = f"{key}: {value}, expected {leaf.field.type}: {leaf.field.metadata['help']}"
        if str(leaf.field.type).startswith("list") and "not a ListConfig" in text:
            told = f"{key}: got one value, expected a list ({leaf.field.metadata['help']}): write '{key}=[VALUE]'"
    else:
        told = _first_line(error) + (f" ({key})" if key and key not in _first_line(error) else "")
    raise ConfigError(source + told) from error


def _first_line(error: Exception) -> str:
    """The innermost message without Hydra's preamble."""
    lines = [line for line in str(error.__cause__ or error).splitlines() if "raised while composing" not in line]
    return lines[0] if lines else str(error)


def _source(text: str, key: str, folders: list[Path]) -> str:
    """`file:line: ` if a file is to blame, `command line: ` if an override is."""
    if match := re.match(r"In '([^']+)'", text):
        path, key = _file(match[1], folders), key.split("[")[0]
        line = _line(path, key) or _line(path, key.partition(".")[2])  # the file of a group leaves its name away
        return f"{path}:{line}: " if line else f"{path}: "
    return "command line: " if "override" in text.splitlines()[0] else ""


def _written_in(key: str, overrides: Sequence[str], choices: dict[str, str], folders: list[Path]) -> str:
    """`file:line: ` of a value that composed well and is wrong; empty if it comes from the command line."""
    given = [word.lstrip("+").partition("=")[0] for word in overrides]
    if not key or any(key == word or key.startswith(word + ".") for word in given if word not in choices):
        return ""
    group, _, below = key.partition(".")
    experiments = _bases(choices.get("experiment", ""), folders)
    for name, inside in [*((e, key) for e in experiments), (f"{group}/{choices.get(group)}", below)]:
        path = _file(name, folders)
        if line := _line(path, inside):
            return f"{path}:{line}: "
    return ""


def _bases(experiment: str, folders: list[Path]) -> list[str]:
    """`experiment/NAME` and what it inherits from, the file that has the last word first."""
    path = Path(_file(f"experiment/{experiment}", folders))
    if not path.is_file():
        return []
    defaults = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    bases = [base for base in reversed(defaults) if isinstance(base, str) and base != "_self_"]
    return [f"experiment/{experiment}", *(name for base in bases for name in _bases(base, folders))]


def _line(path: str, key: str) -> int | None:
    """Where a YAML file sets a dotted key."""
    if not key or not Path(path).is_file():
        return None
    node, line = yaml.compose(Path(path).read_text(encoding="utf-8")), None
    for part in key.split("."):
        found = [pair for pair in node.value if pair[0].value == part] if isinstance(node, yaml.MappingNode) else []
        if not found:
            return None
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def _file(name: str, folders: list[Path]) -> str:
    """The path of the file that Hydra calls `experiment/sea_image`."""
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return name
