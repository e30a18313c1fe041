"""The embedding store, adapters and guard models as W&B artifacts, with what was made from what.

An artifact is named by its kind and its model (`store-<model>`, `adapter-<model>`) and its version by its
content, both read from the folder alone: so the store that one run logs and another one uses is the same artifact, on
whichever machine either ran. `logger.artifacts=reference` leaves the files where they are (W&B gets checksums and
paths).

wandb's public API declares no inputs offline (`Run.use_artifact` raises). What that itself calls, for an artifact that
the server may not know yet, is recorded offline too, so it is called here; `wandb sync` then draws the edge.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.wandb_run import wandb_run
from configs.schema import Config

if TYPE_CHECKING:
    from wandb import Artifact, Run

log = logging.getLogger(__name__)

KINDS = {"store": "embedding-store", "adapter": "adapter", "detector": "detector", "detoxifier": "detoxifier"}
"""First word of the name -> W&B's type of artifact."""


def log_artifact(cfg: Config, run_dir: Path, kind: str, folder: Path, about: Mapping[str, Any]) -> None:
    """This run made the folder. `about`: JSON values, shown beside it. Nothing happens without `logger.wandb`."""
    with _run(cfg, run_dir, folder) as run:
        if run is not None:
            run.log_artifact(_artifact(cfg, kind, folder, about), aliases=[run.id])


def use_artifact(cfg: Config, run_dir: Path, kind: str, folder: Path) -> str | None:
    """This run reads the folder, whoever made it. Returns name and digest: of one content, the same everywhere."""
    with _run(cfg, run_dir, folder) as run:
        if run is not None:
            used = _artifact(cfg, kind, folder, {})
            run._log_artifact(used, is_user_created=True, use_after_commit=True)
            return f"{artifact_name(kind, folder)}@{used.digest}"
    return None


@contextmanager
def _run(cfg: Config, run_dir: Path, folder: Path) -> Iterator[Run | None]:
    """What W&B refuses costs the artifact, not the training that has led to it."""
    if not cfg.logger.wandb or cfg.logger.artifacts == "none":
        yield None
        return
    run = wandb_run(cfg, run_dir)
    try:
        yield run
    except Exception as error:
        log.warning("W&B: %s is not recorded as an artifact (%s: %s)", folder, type(error).__name__, error)


def _artifact(cfg: Config, kind: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
    import wandb

    made = wandb.Artifact(artifact_name(kind, folder), KINDS[kind], metadata=dict(about))
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        if cfg.logger.artifacts == "reference":
            made.add_reference(file.resolve().as_uri(), name=name)
        else:
            made.add_file(str(file), name=name, policy="immutable")  # or wandb copies it all into its cache
    return made


def artifact_name(kind: str, folder: Path) -> str:
    """`store-<model>`, of the model that the folder itself names (`whole`: it holds all weights)."""
    model = ""
    if kind == "store":
        model = json.loads((folder / "store.json").read_bytes())["model_key"].rpartition("@")[0]
    else:
        for file, key in (("adapter_config.json", "base_model_name_or_path"), (f"{kind}.json", "base")):
            if not model and (folder / file).exists():
                model = json.loads((folder / file).read_bytes()).get(key) or ""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(model).name) or 'whole'}"[:120]
