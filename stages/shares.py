"""How the synthesis of one launch is divided among its ranks, and the figures that they bring home.

The leader writes down which embeddings are missing (`plan.json`); of these, rank r of n takes every n-th from the r-th.
So each is on exactly one rank, whatever the number of ranks and however far an earlier launch with another number came.
Each rank leaves a `part-<rank>.json` when it is done: the one moment when somebody (the leader) waits for others.
A shard (stages/synthesis_shard.py) divides its records among its own ranks in the same way, in a folder of its own;
whoever reads figures reads those of the shards as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from callbacks.progress import track
from datamodules.embedding_store import EmbeddingStore
from datamodules.records import Record
from stages.ranks import wait_for
from stages.runs import write_json

CURVE = "loss_by_age.json"


@dataclass(frozen=True)
class Plan:
    """What is to be done in this launch (`session`): ids without an embedding, and ids of those not verified yet."""

    session: str
    missing: list[str]
    unverified: list[str]

    def share(self, rank: int, world: int) -> tuple[list[str], list[str]]:
        """(missing, unverified) of one rank."""
        return self.missing[rank::world], self.unverified[rank::world]


@dataclass(frozen=True)
class Part:
    """One rank's figures: wall time (s), embeddings made, peak memory (MB), age -> [sum of losses, number]."""

    session: str
    rank: int
    seconds: float
    embeddings: int
    peak_memory_mb: float
    loss_by_age: dict[int, list[float]]


def make_plan(session: str, records: Sequence[Record], store: EmbeddingStore, verify: bool) -> Plan:
    """The leader's plan; write it with `publish` when everything else that the ranks read is in place."""
    missing = [r.id for r in records if r.id not in store]
    ok = set(store.ids(status="ok"))
    unverified = [r.id for r in records if verify and r.id in ok and store.meta(r.id).verified is None]
    return Plan(session, missing, unverified)


def publish(folder: Path, plan: Plan) -> None:
    """Tells the other ranks of this launch."""
    write_json(folder / "plan.json", asdict(plan))


def await_plan(folder: Path, session: str) -> Plan:
    """The plan of this launch, as soon as the leader has published it."""
    return wait_for(lambda: _of_session(folder / "plan.json", Plan, session), "the division of the work")


def leave_part(folder: Path, part: Part) -> None:
    """Says that this rank is done."""
    write_json(folder / f"part-{part.rank}.json", asdict(part))


def await_parts(folder: Path, session: str, world: int) -> list[Part]:
    """The figures of all ranks, once all are done."""
    parts = []
    ranks = range(world)
    for rank in track(ranks, "all ranks", world, "ranks") if world > 1 else ranks:
        path = folder / f"part-{rank}.json"
        parts.append(wait_for(lambda path=path: _of_session(path, Part, session), f"rank {rank}"))  # type: ignore[misc]
    return parts


def keep_figures(folder: Path, parts: Sequence[Part]) -> None:
    """Adds this launch to `speed.json`, replaces `loss_by_age.json`, removes the ranks' own figures."""
    if parts:
        speed = {
            "seconds": max(part.seconds for part in parts),
            "embeddings": sum(part.embeddings for part in parts),
            "ranks": len(parts),
            "peak_memory_mb": max(part.peak_memory_mb for part in parts),
        }
        write_json(folder / "speed.json", [*_read_rows(folder / "speed.json"), speed])
        curve: dict[int, list[float]] = {}
        for part in parts:
            for age, (total, n) in part.loss_by_age.items():
                known = curve.setdefault(int(age), [0.0, 0.0])  # a key of JSON is a text
                known[0], known[1] = known[0] + total, known[1] + n
        rows = [[age, total / n, n] for age, (total, n) in sorted(curve.items())]
        write_json(folder / CURVE, {"columns": ["steps", "mean loss", "embeddings"], "rows": rows})
    for path in folder.glob("part-*.json"):  # the plan stays: a rank that starts late must still find it
        path.unlink(missing_ok=True)


def read_speed(folder: Path) -> list[dict[str, float]]:
    """Seconds and embeddings of every launch that came to its end, those of shards included."""
    return [row for path in _with_shards(folder, "speed.json") for row in _read_rows(path)]


def read_curve(folder: Path) -> list[tuple[int, float, float]]:
    """(steps, mean loss, embeddings that it is the mean of) of the last launch, or of the last of every shard."""
    curve: dict[int, list[float]] = {}
    for path in _with_shards(folder, CURVE):
        for age, mean, n in json.loads(path.read_text())["rows"] if path.exists() else []:
            known = curve.setdefault(age, [0.0, 0.0])
            known[0], known[1] = known[0] + mean * n, known[1] + n
    return [(age, total / n, n) for age, (total, n) in sorted(curve.items())]


def _with_shards(folder: Path, file: str) -> list[Path]:
    return [folder / file, *sorted(folder.glob(f"shard-*/{file}"))]


def _read_rows(path: Path) -> list[dict[str, float]]:
    return json.loads(path.read_text()) if path.exists() else []


def _of_session(path: Path, kind: type[Any], session: str) -> Any:
    """What the file holds, or None if it is absent or of an earlier launch."""
    if not path.exists():
        return None
    values = json.loads(path.read_bytes())
    return kind(**values) if values["session"] == session else None
