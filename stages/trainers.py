"""The Lightning trainer of a stage: devices, precision and loggers from the configuration."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from callbacks.metrics_file import MetricsFile
from callbacks.throughput import Throughput
from callbacks.wandb_run import StageLogger, wandb_run
from configs.schema import Config
from lightning_modules.at_work import AtWork
from stages import ranks
from stages.failures import current
from stages.strategies import ShardedStep, SharedStep

# True for us by design, and repeated for every one of a dozen fits.
_EXPECTED = (
    ".*module\\(s\\) in eval mode.*",  # the frozen model stays in evaluation mode
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ".*is_gradient_checkpointing. is deprecated.*",  # PEFT's own use of transformers
    ".*does not have many workers.*",  # batches are index look-ups in memory-mapped files
    ".*is not expected to be called.*",
    ".*Couldn't infer the batch indices.*",  # callbacks/generation_writer.py needs none
    ".*`srun` command is available.*",  # a job of one process needs no srun
)


class TellFailures(L.Callback):
    """At the moment when a fit fails, before Lightning takes it down: that may hang where a connection is broken."""

    def __init__(self, at_work: AtWork) -> None:
        self.at_work = at_work

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The leader has just started the other processes."""
        if (failures := current()) is not None:
            failures.watch()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if (failures := current()) is not None:
            failures.tell(self.at_work.explained(exception))


class AtomicCheckpoints(TorchCheckpointIO):
    """A checkpoint is complete or absent, also after kill -9: written beside its place, flushed, then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"checkpoint not written, the one before is intact: {error.strerror}", str(path)
            ) from error
        temporary.replace(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Always with `weights_only=True`: a checkpoint must not be able to run code."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def quieten() -> None:
    """Lightning's banners and the warnings that hold by design."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    if not ranks.is_leader():  # the leader has the same warnings in run.log
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").propagate = False


def device_of(cfg: Config) -> torch.device:
    """Where a model is put outside of a fit (generation): this process's device."""
    local = ranks.local_rank()
    if cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local)
    if cfg.trainer.accelerator in ("gpu", "cuda"):
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator}: torch sees no GPU; use trainer.accelerator=cpu"
        )
    return torch.device("cpu")


def precision_of(cfg: Config) -> str:
    """`trainer.precision`; auto: bf16-mixed where the device multiplies bfloat16 natively, else 32-true."""
    if cfg.trainer.precision != "auto":
        return cfg.trainer.precision
    if device_of(cfg).type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    flags = Path("/proc/cpuinfo")  # emulated, bfloat16 is slower than float32
    native = flags.is_file() and any(f in flags.read_text() for f in ("amx_bf16", "avx512_bf16"))
    return "bf16-mixed" if native else "32-true"


def loggers(cfg: Config, folder: Path, name: str, part: str = "") -> list[Logger]:
    """CSV and TensorBoard in the stage's folder (a part's: in one below); W&B, offline unless told otherwise, in the
    run's."""
    made: list[Logger] = []
    if cfg.logger.csv:
        made.append(MetricsFile(folder / part))
    if cfg.logger.tensorboard:
        made.append(TensorBoardLogger(folder / part, name="", version="tensorboard"))
    if cfg.logger.wandb:
        run = folder.parent if folder.parent.name != "align" else folder.parent.parent
        if "shard-" in folder.name:  # jobs of their own, at the same time: each is a W&B run of its own
            run = folder
        made.append(StageLogger(experiment=wandb_run(cfg, run) if ranks.is_leader() else None, prefix=name))
    return made


def launched_by() -> list[ClusterEnvironment]:
    """SLURM, without Lightning's own requeueing: callbacks/interruption.py and the job's script see to that."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def trainer(
    cfg: Config,
    folder: Path,
    name: str,
    callbacks: Sequence[L.Callback],
    together: type[DDPStrategy] | None = None,
    logged: bool = True,
    part: str = "",
    precision: str | None = None,
    at_work: AtWork | None = None,
    **arguments: Any,
) -> L.Trainer:
    """A trainer that knows its rank and the number of ranks; `fit` starts the other processes.

    Args:
        together: of stages/strategies.py, in place of plain DDP where there are several processes.
        logged: with the loggers of the configuration.
        part: of a stage that fits several times: a name for the folder of this fit's curve.
        precision: in place of `trainer.precision`.
        at_work: what is told where memory does not suffice; also to be set as the module's own.
        arguments: go to `lightning.Trainer` as they are (max_steps, max_epochs, ...).

    Raises:
        ValueError: a stage that shards nothing is asked to.
    """
    quieten()
    t = cfg.trainer
    several = (t.devices not in (1, "1") or t.num_nodes > 1) and t.strategy in ("auto", "ddp")
    if t.strategy == "fsdp2":  # also on one device, where it can be tried
        if together is None:
            raise ValueError(f"trainer.strategy=fsdp2: {name} is not trained in shards; take trainer=ddp")
        together, several = ShardedStep if together is SharedStep else together, True
    return L.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=together() if together and several else t.strategy,
        precision=precision or precision_of(cfg),  # type: ignore[arg-type]
        deterministic=t.deterministic,
        log_every_n_steps=t.log_every_n_steps,
        logger=loggers(cfg, folder, name, part) if logged else False,
        callbacks=[
            *callbacks,
            *([Throughput()] if cfg.callbacks.throughput else []),
            TellFailures(at_work or AtWork(name)),
        ],
        plugins=[AtomicCheckpoints(), *launched_by()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **arguments,
    )
