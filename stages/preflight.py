"""What can be found wrong before any stage runs: unreadable data or plugins, a device or a key that is not there.

Synthesis may take hours before alignment reads the rejected answers: what a later stage will stumble over is told at
once, as a mistake in the command, before a model is loaded and before there is a run directory. Only the stages that
were asked for count, and files on this machine: data sets of the hub are read by the stage itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from configs.check import asks_benchmarks
from configs.compose import ConfigError
from configs.schema import BENCHMARKS, Api, Config
from datamodules.media_records import read_media_records
from datamodules.raw_rows import read_rows
from datamodules.records import Record
from datamodules.sources import safety_records, text_safety_data
from mllm.plugins import load_plugin
from stages.benchmark_prompts import benchmark_prompts, check_drawn
from stages.runs import read_record
from stages.trainers import device_of

FIRST_ROWS = 20


def preflight(cfg: Config) -> None:
    """Raises ConfigError that names the key, or file and line."""
    try:
        _check_secrets(cfg)
        if cfg.trainer.accelerator in ("gpu", "cuda"):
            device_of(cfg)
        if "encode" in cfg.stages and cfg.real.path is not None:
            _check_media(cfg.real.path)
        if cfg.data.format != "micro" and Path(cfg.data.path or "").exists():
            _check_data(cfg)
        _check_pairs(cfg)
        if cfg.model.plugin:
            load_plugin(cfg.model.plugin)
        if asks_benchmarks(cfg) and any(BENCHMARKS[name] for name in cfg.evaluate.benchmarks):
            benchmark_prompts(cfg)  # opens no medium
        elif asks_benchmarks(cfg):
            check_drawn(cfg)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_secrets(cfg: Config) -> None:
    if cfg.concepts.extractor == "api" and (_is_ahead(cfg, "synthesize") or _is_ahead(cfg, "encode")):
        _check_secret("concepts.api", cfg.concepts.api, "concepts=api")
    if cfg.judge.kind == "api" and "evaluate" in cfg.stages:  # judging is never done for good: no stage records it
        _check_secret("judge.api", cfg.judge.api, "judge=api")
    if _is_ahead(cfg, "generate_pairs"):
        _check_secret("generator.api", cfg.generator.api, "the stage generate_pairs")
    describes = cfg.build.benchmark == "va_safetybench_video" and cfg.build.pipeline.path
    if _is_ahead(cfg, "build_benchmark") and describes and cfg.build.scenes.source == "api":
        _check_secret("build.scenes.api", cfg.build.scenes.api, "build.scenes.source=api")


def _is_ahead(cfg: Config, stage: str) -> bool:
    """Asked for, and not done yet in the run that is named."""
    place = cfg.run_dir or (cfg.run and f"runs/{cfg.experiment}/{cfg.run}")
    record = read_record(Path(place).expanduser(), stage) if place else None
    return stage in cfg.stages and (record is None or record["status"] != "done")


def _check_secret(group: str, api: Api, who: str) -> None:
    if api.key_env and not os.environ.get(api.key_env, "").strip():
        raise ValueError(
            f"{who} needs a key, and the environment variable {api.key_env} is not set: export it, or set "
            f"{group}.key_env to the name of the variable that holds the key ({group}.key_env= if none is wanted)"
        )


def _check_media(path: str) -> None:
    """Only what no setting mends: no file of rows, or not one sound row among the first."""
    rows, bad = read_media_records(path, FIRST_ROWS)
    if not rows:
        raise ValueError(f"{bad[0].where}: {bad[0].reason}; none of the rows of {path} can be used")


def _check_data(cfg: Config) -> None:
    if {"synthesize", "align"} & set(cfg.stages):
        text_safety_data(cfg.data, cfg.seed).glance(FIRST_ROWS)
    elif {"train_detector", "train_detoxifier"} & set(cfg.stages):
        next(read_rows(str(cfg.data.path), cfg.data.subset, cfg.data.split), None)


def _check_pairs(cfg: Config) -> None:
    """Every record that DPO reads has a rejected answer. That takes reading all of them, as the stage does again."""
    dpo = [v for v in cfg.align.variants if cfg.variants[v].method == "dpo" and cfg.variants[v].mixture.text > 0]
    if "align" not in cfg.stages or not dpo:
        return
    records: list[Record] = []
    if cfg.data.format not in ("micro", "hh_rlhf") and Path(cfg.data.path or "").exists():  # both have all answers
        records += safety_records(cfg.data, cfg.seed, cfg.synthesis.harmful, cfg.synthesis.harmless)
    if cfg.real.path is not None and any(cfg.variants[v].data == "sea" for v in dpo):
        records += [row.record for row in read_media_records(cfg.real.path, cfg.real.limit)[0]]
    lacking = next((record for record in records if record.rejected is None), None)
    if lacking is not None:
        raise ValueError(
            f"{lacking.source}: no rejected answer, which DPO needs (variants {', '.join(dpo)}); give every record "
            "one, or leave these variants out of align.variants"
        )
