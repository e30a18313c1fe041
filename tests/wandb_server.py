"""A real HTTP server on 127.0.0.1 that speaks as much of W&B's protocol as an agent, a run and `wandb sync` need.

    with WandbServer(sweep=yaml.safe_load(...), trials=2) as server:
        subprocess.run(["wandb", "agent", ...], env=os.environ | server.environment)
        server.runs["..."].history

Which settings a trial gets, and which trial is stopped, is decided by W&B's own engine (package `sweeps`). What the
real server does with the data beyond keeping it is not imitated. Nothing leaves the machine.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.local_http import LocalHttp

ENTITY, PROJECT, SWEEP = "someone", "seawall", "sweep1"


@dataclass
class SeenRun:
    """What the server knows of a run."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    preempting: int = 0
    starts: int = 0
    state: str = "running"
    stop: bool = False
    logged: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)


def inspected(folder: Path) -> list[dict[str, Any]]:
    """Records of an offline run, read back by wandb."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


class WandbServer(LocalHttp):
    """Keeps runs and artifacts; with a sweep it also hands out trials, one agent at a time.

    Args:
        sweep: the sweep's file.
        trials: so many; then agents are told to exit.
        on_history: called with a run after its metrics have come in; True stops it, as W&B's pages can.
        known: runs that the sweep has had before, as `sweeps.SweepRun` takes them.
    """

    def __init__(
        self,
        sweep: dict[str, Any] | None = None,
        trials: int = 1,
        on_history: Callable[[SeenRun], bool] = lambda run: False,
        known: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.sweep, self.trials, self.on_history, self.known = sweep, trials, on_history, known
        self.on_heartbeat: Callable[[], None] = lambda: None
        self.runs: dict[str, SeenRun] = {}
        self.given: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.told_to_stop: list[str] = []
        self.uploaded = 0
        self._lock = threading.RLock()

    @property
    def environment(self) -> dict[str, str]:
        """For the programs that are to speak to this server."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "local" + "0" * 35,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_MODE": "online",
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.3",  # s; by default 15
        }

    # ------------------------------------------------------------------------------------------------ HTTP
    def serve(self, http: BaseHTTPRequestHandler) -> None:
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        if http.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self._lock:
            if http.path.endswith("/graphql"):
                asked = json.loads(body)
                answer: dict[str, Any] = {"data": self._graphql(asked["query"], asked.get("variables") or {})}
            elif http.path.endswith("/file_stream"):
                answer = self._file_stream(http.path.split("/")[-2], json.loads(body))
            else:  # the storage that uploads go to
                self.uploaded += len(body)
                answer = {}
        payload = json.dumps(answer).encode()
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(payload)))
        http.end_headers()
        http.wfile.write(payload)

    def _file_stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[name]
        files = body.get("files") or {}
        if part := files.get("wandb-history.jsonl"):
            rows = [json.loads(line) for line in part["content"]]
            run.history[part["offset"] : part["offset"] + len(rows)] = rows
            run.stop = run.stop or self.on_history(run)
        if part := files.get("wandb-summary.json"):
            run.summary = json.loads(part["content"][-1])
        run.preempting += bool(body.get("preempting"))
        if body.get("complete"):
            code = int(body.get("exitcode", 0))
            run.exit_codes.append(code)
            run.state = "finished" if code == 0 else "preempted" if run.preempting else "failed"
        return {"stopped": True} if run.stop else {}

    # ------------------------------------------------------------------------------------------------ GraphQL
    def _graphql(self, query: str, v: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else ""
        self.operations.append(name)
        found: dict[str, Any] = getattr(self, f"_on_{name}", lambda v: {})(v)
        return found

    def _on_Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        me = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": me}

    def _on_ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_XXHashDigestsEnabled(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _on_RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run, bucket = self.runs.get(v["name"]), None
        if run is not None:
            bucket = {
                "id": run.name, "name": run.name, "displayName": run.name, "tags": [], "notes": "",
                "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "eventsLineCount": 0,
                "historyLineCount": len(run.history), "eventsTail": "[]",
                "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "wandbConfig": json.dumps({"t": 1}),
            }  # fmt: skip
        return {"model": {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _on_UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], SeenRun(v["name"]))
        if v.get("config"):
            run.config |= {k: c["value"] for k, c in json.loads(v["config"]).items() if "value" in c}
        run.starts += v.get("host") is not None
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        bucket = {
            "id": run.name, "name": run.name, "displayName": v.get("displayName") or run.name, "description": "",
            "config": "{}", "sweepName": v.get("sweep"), "project": project, "historyLineCount": len(run.history),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    # ------------------------------------------------------------------------------------------------ artifacts
    def _on_ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # an artifact of that name may have any type

    def _on_CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        made = v["input"]
        id = f"{made['artifactCollectionName']}@{made['digest']}"
        state = "COMMITTED" if id in self.artifacts else "PENDING"
        self.artifacts.setdefault(id, {"type": made["artifactTypeName"], "metadata": made.get("metadata")})
        if made.get("runName"):  # else it is only to be used: `UseArtifact` follows
            self.runs[made["runName"]].logged.append(id)
        return {
            "createArtifact": {"artifact": {"id": id, "state": state, "artifactSequence": {"latestArtifact": None}}}
        }

    def _on_CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.url}/storage/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    _on_UpdateArtifactManifest = lambda self, v: {  # noqa: E731
        "updateArtifactManifest": self._on_CreateArtifactManifest(v)["createArtifactManifest"]
    }

    def _on_CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f["name"], "uploadUrl": f"{self.url}/storage/{f['name']}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]},
            }
            for f in v["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _on_CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": v["artifactID"].partition("@")[2]}}}

    def _on_UseArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.runs[v["input"]["runName"]].used.append(v["input"]["artifactID"])
        return {"useArtifact": {"artifact": {"id": v["input"]["artifactID"]}}}

    # ------------------------------------------------------------------------------------------------ the sweep
    def _on_SweepWithRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "s", "name": SWEEP, "state": "RUNNING", "config": json.dumps(self.sweep), "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _on_CreateAgent(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "a"}}}

    def _on_Heartbeat(self, v: dict[str, Any]) -> dict[str, Any]:
        self.on_heartbeat()
        commands = self._commands(set(json.loads(v["runState"])))
        return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}

    def _commands(self, alive: set[str]) -> list[dict[str, Any]]:
        import sweeps

        assert self.sweep is not None
        known = [sweeps.SweepRun(**run) for run in self.known] + [
            sweeps.SweepRun(
                name=name,
                state="running" if name in alive else self.runs[name].state if name in self.runs else "failed",
                config={key: {"value": value} for key, value in config.items()},
                sampledHistory=self.runs[name].history if name in self.runs else [],
                summaryMetrics=self.runs[name].summary if name in self.runs else {},
            )
            for name, config in self.given.items()
        ]
        if alive:
            told = sweeps.stop_runs(self.sweep, known) if "early_terminate" in self.sweep else []
            stopped = [run.name for run in told if run.name in alive]
            self.told_to_stop += stopped
            return [{"type": "stop", "run_id": name} for name in stopped]
        for run in self.runs.values():
            if run.state == "preempted":
                run.state = "running"
                return [self._start("resume", run.name)]
        if len(self.given) >= self.trials:
            return [{"type": "exit"}]
        drawn = sweeps.next_run(self.sweep, known)
        name = f"trial{len(self.given)}"
        self.given[name] = {key: value["value"] for key, value in drawn.config.items()}
        return [self._start("run", name)]

    def _start(self, kind: str, name: str) -> dict[str, Any]:
        assert self.sweep is not None
        args = {key: {"value": value} for key, value in self.given[name].items()}
        return {"type": kind, "run_id": name, "program": self.sweep["program"], "args": args}
