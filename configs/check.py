"""What types alone cannot say: closed choices, ranges, variants that exist, files that are there.

Every error names the key, what it got, what was expected and how to mend it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.keys import Leaf, leaves, nearest
from configs.schema import BENCHMARKS, MODALITIES, STAGES, Api, Config, Evaluate, Model, Protector

PROJECT = Path(__file__).resolve().parent.parent
"""The checkout: paths in the shipped files are looked up here when the current directory has none of that name."""


def check(cfg: Config, paths: bool = True) -> None:
    """Validate `cfg`; put its stages in order and its data files where they are, in place. Raises ValueError.

    Without `paths` the files need not be there: a configuration can be shown anywhere.
    """
    for leaf in leaves(cfg):
        _check_leaf(leaf)
    if cfg.run is not None:
        check_folder_name("run", cfg.run, "; for a path use run_dir")
    if not cfg.stages:
        raise ValueError(f"stages: got an empty list, expected one or more of {', '.join(STAGES)}")
    cfg.stages = [stage for stage in STAGES if stage in cfg.stages]
    if cfg.protector.source:
        _leave_out_training(cfg)
    for name in cfg.variants:
        check_folder_name("variants", name)
    for name in cfg.align.variants:
        if name not in cfg.variants:
            raise ValueError(f"align.variants: got {name!r}, {nearest(name, cfg.variants)}")
    taken = ["base", *cfg.align.variants]  # of others in `variants` nothing is made here: their names are free
    for name in cfg.evaluate.adapters:
        if name in taken or not re.fullmatch(r"[A-Za-z][\w-]*", name):  # it names files and rows of the report
            raise ValueError(
                f"evaluate.adapters: {name!r} is taken or is no name; give a new one (letters, digits, _ -)"
            )
    known = ["base", *cfg.variants, *cfg.evaluate.adapters]
    for name in cfg.evaluate.variants or []:
        if name not in known:
            raise ValueError(f"evaluate.variants: got {name!r}, {nearest(name, known)}")
    if cfg.trainer.precision == "16-mixed" and "align" in cfg.stages:  # nobody unscales its gradients
        raise ValueError("trainer.precision=16-mixed: the stage align does not take it; set bf16-mixed or 32-true")
    _check_probes(cfg)
    _check_shard(cfg)
    if cfg.judge.max_cost is not None and None in (cfg.judge.price_in, cfg.judge.price_out):
        raise ValueError("judge.max_cost needs judge.price_in and judge.price_out: what a million tokens cost")
    if cfg.media.frames is not None and cfg.media.fps is not None:
        raise ValueError("media.frames and media.fps are both set: one of them says which frames are taken")
    _check_modality(cfg.model)
    _check_api("concepts.api", cfg.concepts.api)
    _check_api("judge.api", cfg.judge.api)
    _check_api("generator.api", cfg.generator.api)
    _check_api("build.scenes.api", cfg.build.scenes.api)
    if paths:
        _check_paths(cfg)


def _check_modality(m: Model) -> None:
    """A word that is not built in needs a plugin and the shape of its blank; nearly always it is a misspelling."""
    if m.modality in MODALITIES:
        if m.blank_shape:
            raise ValueError(f"model.blank_shape: the blank of modality {m.modality} has other keys; leave it away")
        return
    if not m.plugin:
        raise ValueError(
            f"model.modality: got {m.modality!r}, {nearest(m.modality, MODALITIES)} (any other word needs "
            "model.plugin, see docs/new-modality.md)"
        )
    # The word is the processor's keyword and the type of a message's part: not one that both have already.
    if not re.fullmatch(r"[a-z][a-z0-9_]*", m.modality) or m.modality in ("text", "images", "videos"):
        raise ValueError(f"model.modality: got {m.modality!r}, expected a word of lower-case letters, digits and _")
    if not m.blank_shape or min(m.blank_shape) < 1:
        raise ValueError(
            f"model.blank_shape: got {m.blank_shape}, expected the shape of one {m.modality} item, channels first: "
            "model.blank_shape=[6,128]"
        )


def _check_shard(cfg: Config) -> None:
    shard, shards = cfg.synthesis.shard, cfg.synthesis.shards
    if shard is None and shards > 1:
        raise ValueError(f"synthesis.shards={shards}: say which of them this is, synthesis.shard=0 to {shards - 1}")
    if shard is not None and shard >= shards:
        raise ValueError(f"synthesis.shard: got {shard}, expected less than synthesis.shards, which is {shards}")
    if shard is not None and cfg.stages != ["synthesize"]:
        raise ValueError("synthesis.shard: a shard runs stages=[synthesize] alone; the others need the whole store")


def _check_probes(cfg: Config) -> None:
    if cfg.align.patience is not None and cfg.align.probe_every_steps is None:
        raise ValueError("align.patience counts probes, and there are none: set align.probe_every_steps too")
    if cfg.align.probe_every_steps is not None and cfg.trainer.strategy == "fsdp2":
        raise ValueError("align.probe_every_steps: sharded weights cannot answer; take trainer=ddp, or leave it away")


def check_folder_name(key: str, name: str, hint: str = "") -> None:
    """Raises ValueError unless `name` is that of one folder: nothing leads out of where runs and variants belong."""
    if not re.fullmatch(r"[\w@+=,-][\w.@+=,-]*", name):
        raise ValueError(f"{key}: got {name!r}, expected a folder name (letters, digits, . _ - +){hint}")


def _check_api(key: str, api: Api) -> None:
    """A configuration is saved and logged, so no key may slip into it. The messages do not repeat what was given."""
    name = api.key_env
    looks_like_a_key = len(name) >= 20 and re.search(r"[a-z]", name) and re.search(r"[0-9]", name)
    if name and (looks_like_a_key or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
        raise ValueError(f"{key}.key_env: expected the NAME of an environment variable, never the key itself")
    if "@" in urlsplit(api.base_url).netloc:
        raise ValueError(f"{key}.base_url: holds a user or password; put the key into the variable of {key}.key_env")


def _check_leaf(leaf: Leaf) -> None:
    meta, value = leaf.field.metadata, leaf.value
    choices = meta.get("choices")
    if choices:
        for item in value if isinstance(value, list) else [value]:
            if item not in choices:
                raise ValueError(f"{leaf.key}: got {item!r}, {nearest(str(item), choices)}")
    low, high = meta.get("low"), meta.get("high")
    if isinstance(value, (int, float)):
        if low is not None and value < low:
            raise ValueError(f"{leaf.key}: got {value}, expected at least {low:g} ({meta['help']})")
        if high is not None and value > high:
            raise ValueError(f"{leaf.key}: got {value}, expected at most {high:g} ({meta['help']})")


def _leave_out_training(cfg: Config) -> None:
    """The adapters of `protector.source` are evaluated as they are."""
    trained = ("synthesize", "encode", "align")
    kept = [stage for stage in cfg.stages if stage not in trained]
    if not kept:
        raise ValueError(
            f"stages: {', '.join(cfg.stages)} would train what protector.source brings; add evaluate, or leave "
            "protector.source away"
        )
    cfg.stages = kept


def _check_paths(cfg: Config) -> None:
    # model.path and model.plugin stay as they were written, for stores and runs know their model by them; mllm looks
    # them up alike.
    if cfg.model.plugin:
        _existing("model.plugin", cfg.model.plugin)
    if not all(stage.startswith("pretrain_") for stage in cfg.stages):  # those make the model from nothing
        if cfg.model.make and locate(cfg.model.path) is None:
            raise ValueError(f"model.path: {cfg.model.path} is not there yet; make it with `{cfg.model.make}`")
        _path_or_hub_id("model.path", cfg.model.path)
    if cfg.concepts.extractor == "local":
        cfg.concepts.path = _chat_model("concepts.path", cfg.concepts.path)
    if cfg.judge.kind == "local":
        cfg.judge.path = _chat_model("judge.path", cfg.judge.path)
    if cfg.data.format in ("saferlhf", "hh_rlhf", "jsonl", "csv"):
        cfg.data.path = _existing("data.path", cfg.data.path)
        if cfg.data.harmless_path:
            cfg.data.harmless_path = _existing("data.harmless_path", cfg.data.harmless_path)
    if cfg.data.format == "huggingface" and not cfg.data.path:
        raise ValueError("data.path is not set; set it to a data set of the hub: data.path=OWNER/NAME")
    if cfg.real.path or "encode" in cfg.stages:
        cfg.real.path = _existing("real.path", cfg.real.path)
    if "build_benchmark" in cfg.stages:
        cfg.build.source = _existing("build.source", cfg.build.source)
    if "train_detoxifier" in cfg.stages and cfg.detoxifier.detector and cfg.detoxifier.evaluate:
        detector = _guard_model("detoxifier.detector", cfg.detoxifier.detector, "harm_detector", "detector")
        cfg.detoxifier.detector = detector
    if "export" in cfg.stages:
        cfg.export.adapter = _adapter("export.adapter", cfg.export.adapter)
    if asks_benchmarks(cfg):
        _check_evaluate_paths(cfg.evaluate)
    if "evaluate" in cfg.stages:
        _check_protector(cfg.protector)


def asks_benchmarks(cfg: Config) -> bool:
    """In the stage `evaluate`, or by probes while aligning."""
    return "evaluate" in cfg.stages or ("align" in cfg.stages and cfg.align.probe_every_steps is not None)


def _check_evaluate_paths(e: Evaluate) -> None:
    for name in dict.fromkeys(BENCHMARKS[benchmark] for benchmark in e.benchmarks):
        if name is not None:
            setattr(e, name, _existing(f"evaluate.{name}", getattr(e, name)))
    for name, path in e.adapters.items():
        e.adapters[name] = _adapter(f"evaluate.adapters.{name}", path)


def _adapter(key: str, path: str | None) -> str:
    """The folder of an adapter in safetensors: without them peft would fall back to a pickle."""
    folder = Path(_existing(key, path))
    if missing := [f for f in ("adapter_config.json", "adapter_model.safetensors") if not (folder / f).is_file()]:
        inside = next((p.parent for p in sorted(folder.glob("**/adapter_model.safetensors"))), None)
        hint = f"did you mean {inside}?" if inside else "for a whole model set model.path"
        raise ValueError(f"{key}: {folder} holds no {missing[0]}, so it is no adapter; {hint}")
    return str(folder)


def _check_protector(p: Protector) -> None:
    """A guard is trained before the run that uses it; what is missing is told before anything is generated."""
    if p.detector and not p.enabled:
        raise ValueError("protector.detector is set, but protector.enabled is not: take experiment=protector")
    if p.enabled:
        p.detector = _guard_model("protector.detector", p.detector, "harm_detector_micro", "detector")
    if p.enabled and p.detoxifier:
        p.detoxifier = _guard_model("protector.detoxifier", p.detoxifier, "detoxifier_micro", "detoxifier")
    if p.source:
        make = "`python train.py experiment=sea_image run=x` makes one in runs/sea_image/x"
        source = locate(p.source)
        if source is None:
            raise ValueError(f"protector.source: {p.source} does not exist ({_looked()}); {make}")
        if not (source / "align").is_dir():
            raise ValueError(f"protector.source: {source} is no run directory with adapters (no folder align); {make}")
        p.source = str(source.resolve())


def _guard_model(key: str, path: str | None, experiment: str, kind: str) -> str:
    """The folder that holds `<kind>.json`, or a YAML file like those of configs/<kind>/published."""
    made = f"{experiment}/x/train_{kind}/{kind}"
    make = f"`python train.py experiment={experiment} run=x` makes one, then {key}=runs/{made}"
    if not path:
        raise ValueError(f"{key} is not set: the guard needs a trained {kind}; {make}")
    found = locate(path)
    if found is None:
        raise ValueError(f"{key}: {path} does not exist ({_looked()}); {make}")
    if found.is_dir() and not (found / f"{kind}.json").is_file():
        inside = next((p.parent for p in sorted(found.glob(f"**/{kind}.json"))), None)
        hint = f"did you mean {key}={inside}?" if inside else make
        raise ValueError(f"{key}: {found} holds no {kind}.json, so it is no trained {kind}; {hint}")
    return str(found)


def locate(path: str) -> Path | None:
    """`path` from the current directory, else from the checkout; None if it is in neither."""
    for candidate in (Path(path).expanduser(), PROJECT / path):
        if candidate.exists():
            return candidate
    return None


def _existing(key: str, path: Any) -> str:
    if not path:
        raise ValueError(f"{key} is not set; set it to an existing file or folder: {key}=PATH")
    found = locate(path)
    if found is None:
        raise ValueError(f"{key}: {path} does not exist ({_looked()}); set {key}=PATH")
    return str(found)


def _chat_model(key: str, path: str) -> str:
    return path if path == "smollm2" else _path_or_hub_id(key, path)  # mllm.smol knows where `make smol` put it


def _looked() -> str:
    return f"looked in {' and '.join(dict.fromkeys((str(Path.cwd()), str(PROJECT))))}"


def _path_or_hub_id(key: str, path: str) -> str:
    """A hub id is `owner/name` whose owner is no folder here, so `assets/typo` counts as a missing folder."""
    found = locate(path)
    if found is not None:
        return str(found)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and locate(path.split("/")[0]) is None:
        return path
    raise ValueError(f"{key}: {path} is neither a folder ({_looked()}) nor a hub id (owner/name){_beside(path)}")


def _beside(path: str) -> str:
    """What the parent folder holds; of a place outside of the project and of here no more than a name like this one."""
    folder = locate(str(Path(path).parent))
    if folder is None or not folder.is_dir() or folder.resolve() == Path("/"):
        return ""
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    ours = any(folder.resolve().is_relative_to(root) for root in (Path.cwd(), PROJECT))
    if ours and 0 < len(there) < 30:
        return f"; in {folder}: {nearest(Path(path).name, there)}"
    near = difflib.get_close_matches(Path(path).name, there, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""
