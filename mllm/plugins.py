"""Model classes that transformers does not know, from Python source of the user's own: `model.plugin`.

A plugin is a Python file, or a folder with `__init__.py`. Importing it registers its classes with transformers
(`AutoConfig.register`, `AutoModel.register`, `AutoProcessor.register`); after that the checkpoint loads like any
other, and `trust_remote_code` stays off. It is code, and it runs: only a path on this machine is taken, never a hub id.

For the embedded model's pretraining and benchmark (experiment=pretrain_micro*, evaluate.benchmarks=[micro]) a plugin
may also have what the built-in modalities have: the functions of `mllm.micro_blueprints.Blueprint`, and `MEDIUM`
(datamodules/micro_media.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from configs.check import locate


def load_plugin(path: str) -> ModuleType:
    """The module of a plugin, imported once in a process.

    Raises:
        ValueError: there is no such file or folder, or importing it failed (names the cause and its line).
    """
    file = entry(path)
    # The place is part of the name: two plugins may have files of one name.
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    stem = file.parent.name if file.name == "__init__.py" else file.stem
    name = f"seawall_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    inside = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]
        raise ValueError(f"model.plugin={path}: {_where(error, file)}{type(error).__name__}: {error}") from error
    return module


def has_parts(module: ModuleType, path: str, names: tuple[str, ...], purpose: str) -> None:
    """Raises ValueError unless the plugin has all of `names`."""
    if missing := [name for name in names if name not in vars(module)]:
        raise ValueError(f"model.plugin={path}: it has no {', '.join(missing)}, which {purpose} needs")


def source_hash(path: str) -> str:
    """16 hex digits of a plugin's source: the file, or every Python file below the folder.

    Raises:
        ValueError: there is no such file or folder.
    """
    file = entry(path)
    root = file.parent
    digest = hashlib.sha256()
    for each in sorted(root.rglob("*.py")) if file.name == "__init__.py" else [file]:
        digest.update(f"{each.relative_to(root).as_posix()}\0".encode() + each.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def entry(path: str) -> Path:
    """The file that is run. Raises ValueError if there is none."""
    found = locate(path)
    file = found / "__init__.py" if found is not None and found.is_dir() else found
    if file is None or not file.is_file() or file.suffix != ".py":
        raise ValueError(
            f"model.plugin={path}: expected a Python file, or a folder with __init__.py, from the current directory or "
            "from the project on"
        )
    return file.resolve()


def _where(error: BaseException, file: Path) -> str:
    """`file:line: ` of the last line of the plugin's own that the error passed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    line, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if Path(name).is_relative_to(file.parent):
            line = f"{name}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return line
