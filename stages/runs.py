"""The run directory and the stages in it: done ones are skipped, broken ones resumed, changed ones refused.

    runs/<experiment>/<run>/
        config.yaml  manifest.json  run.log        what was asked for, by which code, on which machine
        <stage>/stage.json                         state, what it was made from, result
        <stage>/...                                whatever the stage writes

    stage = run.stage("align/sea_sft", run.settings("seed", "model", "align", "variants.sea_sft"), after=["synthesize"])
    if stage.done:
        return stage.result
    ...  # write into stage.folder; "resume" if stage.state says that an earlier attempt was cut off
    stage.finish({"loss": 0.01})

Every JSON file is complete or absent whatever happens (`datamodules.durable`), so kill -9 costs at most the work since
the stage's own last checkpoint. One process works in a run directory at a time: the lock dies with its process. The
exception are the shards of a synthesis (stages/synthesis_shard.py), one process for each.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from callbacks.progress import console
from configs.compose import save
from configs.keys import leaves
from configs.schema import MODALITIES, Config
from datamodules.durable import write_durably
from lightning_modules.at_work import explained
from mllm.plugins import source_hash
from stages import ranks, run_folder
from stages.failures import Failures
from stages.manifest import begin_manifest
from stages.run_log import RunLog, file_only, log
from stages.telling import RankFailed

State = Literal["new", "resume", "done"]


@dataclass
class Stage:
    """One stage of a run, as `Run.stage` found it."""

    name: str
    folder: Path
    state: State
    result: dict[str, Any]
    _run: Run = field(repr=False)
    _began: float = field(default_factory=time.monotonic, repr=False)

    @property
    def done(self) -> bool:
        """True if an earlier process (or this one) finished it with the same configuration."""
        return self.state == "done"

    def finish(self, result: Mapping[str, Any] | None = None) -> None:
        """Mark the stage done and keep `result` (JSON values). Other ranks wait here for the leader."""
        self.result = dict(result or {})
        seconds = round(time.monotonic() - self._began, 2)
        self._run._finish(self.name, self.result, seconds)
        self.state = "done"


class Run:
    """A run directory, locked for this process until `close` (or the end of the `with` block)."""

    def __init__(self, cfg: Config, choices: Mapping[str, str] | None = None, command: Sequence[str] = ()) -> None:
        """Make or reopen the directory that `cfg` names.

        Raises:
            ValueError: the name is no folder name, or another process works there.
        """
        self.cfg = cfg
        self.shard = shard_name(cfg)
        self.leader = ranks.is_leader()
        self.session = ranks.session()
        self.path = run_folder.choose(cfg, self.leader)
        self._command, self._choices = list(command), dict(choices or {})
        self._accepted = False
        self._log: RunLog | None = None
        self._lock: list[int] = []
        self._at_work: str | None = None  # the stage, for whoever reports that it failed
        self.failures = Failures(self.path, self.session)
        self.failures.watch()
        if not self.leader:
            console.quiet = True
            ranks.end_with_leader()
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = run_folder.lock(self.path, self.shard)
        try:
            os.environ |= {ranks.RUN_DIR: str(self.path), ranks.SESSION: self.session, ranks.LEADER: str(os.getpid())}
            self._log = RunLog(self.path / (f"run-{self.shard}.log" if self.shard else "run.log"))
            if not self.shard:  # another shard may be failing just now
                self.failures.forget()
            for left_over in [] if self.shard else self.path.glob(".old-*"):
                shutil.rmtree(left_over)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.failures.end(failed=error is not None)
        if error is None:
            self.close()
            return
        cause = self.failures.cause(error)
        given, error = error, explained(error, self._at_work or "", {})
        if cause is None and isinstance(error, Exception):
            self.failures.tell(error)
        if self.leader:
            if cause is not None:
                file_only.error("%s\n%s", cause, cause.trace)
            if isinstance(error, Exception):
                file_only.error("failed", exc_info=error)
                assert self._log is not None
                log.info("full traceback: %s", self._log.path)
            if self._accepted:
                log.info("to go on where it stopped: %s", self.resume_command)
        self.close()
        if cause is not None:
            raise RankFailed(str(cause)) from error
        if error is not given:
            raise error from given

    @property
    def resume_command(self) -> str:
        """The command that continues in this directory."""
        named = self.cfg.run is not None or self.cfg.run_dir is not None
        return shlex.join(["python", "train.py", *self._command, *([] if named else [f"run={self.path.name}"])])

    def close(self) -> None:
        """Release the lock and the log file."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock:
            for name in (ranks.RUN_DIR, ranks.SESSION, ranks.LEADER):
                os.environ.pop(name, None)
            run_folder.unlock(self.path, self._lock)
            self._lock = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What shards share is opened, made and finished by one of them at a time. Not for other runs' processes.

        Raises:
            ValueError: shards of another division are at work here.
        """
        assert self.shard is not None
        with run_folder.turn(self.path):
            of = self.shard.rpartition("-")[2]
            if other := [s for s in run_folder.shards_at_work(self.path, self.shard) if s.rpartition("-")[2] != of]:
                raise ValueError(
                    f"{self.path}: {other[0]} is at work here, and this is {self.shard}: wait for all shards of one "
                    "division to end before you begin another (synthesis.shards)"
                )
            yield

    def settings(self, *prefixes: str) -> dict[str, Any]:
        """The keys at and below `prefixes` (`"model"`, `"variants.sea_sft"`) with their values, but no `free` ones."""
        found: dict[str, Any] = {}
        for prefix in prefixes:
            below = {k: v for k, v in self._config().items() if k == prefix or k.startswith(prefix + ".")}
            assert below, f"{prefix} is no key of the configuration, or may change freely"
            found.update(below)
        return found

    def stage(
        self,
        name: str,
        made_from: Mapping[str, Any],
        after: Sequence[str] = (),
        parts: Mapping[str, str] | None = None,
    ) -> Stage:
        """Open a stage; the folder exists when this returns.

        Args:
            name: folder below the run directory, `synthesize` or nested `align/sea_sft`.
            made_from: JSON values that decide the result, by dotted key; usually `run.settings(...)`.
            after: stages whose output this one reads. If one of them was redone, this one is redone too.
            parts: stage of `after` -> name of the files that were made from it, at any depth in the folder. Where only
                such stages were redone, only their files go, and the stage is resumed.

        Raises:
            ValueError: the folder was made from something else (names the keys), or a stage in `after` is not done.
                An attempt that failed before it wrote anything does not count.
        """
        folder = self.path / name
        self._at_work = name
        if not self.leader:
            found = ranks.wait_for(lambda: self._opened(name), f"{name} to begin")
            return Stage(name, folder, found["opened_as"], found.get("result", {}), self)
        made_from = json.loads(json.dumps(dict(made_from)))
        before = {up: self._upstream(up, name) for up in after}
        record = self._read(name)
        state: State = "new"
        if record is not None:
            changed = self._that_count(difference(with_defaults(record["made_from"], made_from), made_from))
            redone = [up for up, identity in before.items() if record["after"].get(up) != identity]
            if record["status"] != "done" and not any(p.name != "stage.json" for p in folder.iterdir()):
                changed, redone = {}, []  # an attempt that left nothing: there is nothing that could not fit
            if changed and not self.cfg.overwrite:
                raise ValueError(_changed_message(self.path, name, changed))
            if redone and not changed and set(redone) <= set(parts or {}):
                log.info("%s goes on, what was made from %s anew", name, ", ".join(redone))
                for up in redone:  # gone before the new `after` is written: a kill in between does this once more
                    for made in folder.rglob((parts or {})[up]):
                        made.unlink()
                state = "resume"
            elif changed or redone:
                log.info("%s is made anew: %s changed", name, ", ".join([*changed, *redone]))
                self._discard(folder)
            else:
                state = "done" if record["status"] == "done" else "resume"
        self._accept()
        folder.mkdir(parents=True, exist_ok=True)
        if state == "done":
            assert record is not None
            log.info("%s is done already (%s)", name, folder)
            self._write(name, {**record, "session": self.session, "opened_as": state})
            return Stage(name, folder, state, record["result"], self)
        log.info("%s %s in %s", name, "begins" if state == "new" else "is resumed", folder)
        record = record if state == "resume" and record else {"id": uuid.uuid4().hex, "attempts": 0}
        record |= {"status": "running", "made_from": made_from, "after": before, "result": {}}
        record |= {"attempts": record["attempts"] + 1, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._write(name, {**record, "session": self.session, "opened_as": state})
        return Stage(name, folder, state, {}, self)

    def result(self, name: str) -> dict[str, Any]:
        """What a finished stage of this run handed to `finish`. Raises ValueError if it is not done."""
        if not self.leader:
            found = ranks.wait_for(lambda: self._finished(name), f"{name} to end")
            return dict(found["result"])
        record = self._finished(name)
        if record is None:
            raise ValueError(_not_done_message(self.path, name))
        return dict(record["result"])

    def _accept(self) -> None:
        """Once the first stage agreed to the configuration, it is the run's own."""
        if not self._accepted:
            synthesis = replace(self.cfg.synthesis, shard=None, shards=1)  # the file is the whole run's
            write_durably(self.path / "config.yaml", save(replace(self.cfg, synthesis=synthesis)).encode())
            begin_manifest(self.path / "manifest.json", self.cfg, self._choices, self._command)
            self._accepted = True

    def _discard(self, folder: Path) -> None:
        """Renamed first: a stage folder is never half deleted, whenever the process dies."""
        if self.shard and (other := run_folder.shards_at_work(self.path, self.shard)):
            raise ValueError(f"{folder}: {', '.join(other)} at work there; end them before it is made anew")
        grave = self.path / f".old-{uuid.uuid4().hex}"
        folder.rename(grave)
        shutil.rmtree(grave)

    def _upstream(self, up: str, name: str) -> str:
        """Identity of a finished stage that `name` reads, after checking that it fits the present configuration."""
        record = self._finished(up)
        if record is None:
            raise ValueError(_not_done_message(self.path, up))
        now = self._config()
        recorded = {k: v for k, v in record["made_from"].items() if k in now}
        changed = self._that_count(difference(recorded, {k: now[k] for k in recorded}))
        if changed:
            raise ValueError(_changed_message(self.path, up, changed) + f"; {name} reads it")
        return str(record["id"])

    def _that_count(self, changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Without how much is computed at once: who ran out of memory lowers it and goes on with what is there."""
        at_once = {leaf.key for leaf in leaves(self.cfg) if leaf.field.metadata.get("at_once")}
        return {key: values for key, values in changed.items() if key not in at_once}

    def _config(self) -> dict[str, Any]:
        kept = {leaf.key: leaf.value for leaf in leaves(self.cfg) if not leaf.field.metadata.get("free")}
        if self.cfg.model.plugin:  # it counts by what is written in it: edited, it is another model
            kept["model.plugin.source"] = source_hash(self.cfg.model.plugin)
        else:
            del kept["model.plugin"]
        if self.cfg.model.modality in MODALITIES:  # what does not apply is left out: runs from before it can be resumed
            del kept["model.blank_shape"], kept["model.blank_level"]
        values: dict[str, Any] = json.loads(json.dumps(kept))
        return values

    def _finish(self, name: str, result: dict[str, Any], seconds: float) -> None:
        if not self.leader:
            ranks.wait_for(lambda: self._finished(name), f"{name} to end")
            return
        record = self._read(name)
        assert record is not None, f"{name} was not opened in this run"
        record |= {"status": "done", "result": result, "seconds": seconds}
        self._write(name, {**record, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        log.info("%s is done after %.1f s", name, seconds)

    def _opened(self, name: str) -> dict[str, Any] | None:
        record = self._read(name)
        return record if record and record.get("session") == self.session else None

    def _finished(self, name: str) -> dict[str, Any] | None:
        record = self._read(name)
        return record if record and record["status"] == "done" else None

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_record(self.path, name)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        write_json(self.path / name / "stage.json", record)


def shard_name(cfg: Config) -> str | None:
    """`shard-2-of-8` where this process is the third of eight that synthesise, else None."""
    s = cfg.synthesis
    return None if s.shard is None else f"shard-{s.shard}-of-{s.shards}"


def read_record(run_dir: Path, name: str) -> dict[str, Any] | None:
    """A stage's `stage.json` in any run directory; None if it never began. Raises ValueError if it is no JSON."""
    path = run_dir / name / "stage.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete the folder {path.parent} to redo the stage") from error
    return record


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all. Raises ValueError for NaN, DiskFullError (with the name)."""
    write_durably(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def with_defaults(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage was made from, with the defaults of keys that are younger than it: a new key's default is what was
    done before there was one."""
    known = {leaf.key: leaf.value for leaf in leaves(Config())}
    younger = {key: known[key] for key in now if key not in recorded and key in known}
    return {**json.loads(json.dumps(younger)), **recorded}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """key -> (old, new) of the values that differ; a key that one side lacks counts as "(absent)" there."""
    absent = "(absent)"
    keys = [*old, *(k for k in new if k not in old)]
    return {k: (old.get(k, absent), new.get(k, absent)) for k in keys if old.get(k, absent) != new.get(k, absent)}


def _changed_message(path: Path, name: str, changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in list(changed.items())[:12]]
    more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
    return (
        f"{path}: {name} was made from another configuration:\n  " + "\n  ".join(shown) + more + "\n"
        f"set the old values again, take another run=NAME, or add overwrite=true (with {name.split('/')[0]} in stages) "
        "to redo it and what was made from it"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _not_done_message(path: Path, name: str) -> str:
    first = name.split("/")[0]
    return f"{path}: {name} is not done in this run; add {first} to stages (or leave stages away to run them all)"
