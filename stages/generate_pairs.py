"""Stage `generate_pairs`: new questions with accepted and rejected answers from an endpoint, a file for `data=jsonl`.

Writes `generate_pairs/pairs.jsonl` (whole after every scenario) and `costs.json`, a row for each attempt. Replies are
cached, so an interrupted stage pays for nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter

from callbacks.progress import Progress
from configs.schema import Config
from datamodules.durable import write_durably
from datamodules.pair_generator import GeneratedPair, PairGenerator
from datamodules.sources import chat_api
from stages.runs import Run, write_json

log = logging.getLogger(__name__)


def run(cfg: Config, run: Run) -> None:
    """Raises ValueError when the key's variable is not set, requests got no answer, or not one pair came out."""
    stage = run.stage("generate_pairs", run.settings("generator"))
    if stage.done or not run.leader:
        return
    g = cfg.generator
    api = chat_api(g.api, "generator.api")
    generator = PairGenerator(api, g.questions_per_request, g.similarity)
    costs = stage.folder / "costs.json"
    before = json.loads(costs.read_text()) if costs.exists() else []  # of earlier attempts
    pairs: list[GeneratedPair] = []
    left_out: Counter[str] = Counter()
    with Progress("pairs", 2 * g.questions * len(g.scenarios), "answers") as progress:
        for scenario in g.scenarios:
            found, dropped = generator.pairs(scenario, g.questions, progress.advance)
            pairs, left_out = pairs + found, left_out + dropped
            rows = [json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in pairs]
            write_durably(stage.folder / "pairs.jsonl", "".join(rows).encode())
            write_json(costs, [*before, dataclasses.asdict(api.usage)])
    if generator.failed:
        ((why, _),) = generator.failed.most_common(1)
        raise ValueError(
            f"generator: {generator.failed.total()} requests to {g.api.base_url} got no answer, most of them: {why}. "
            f"{len(pairs)} pairs are in {stage.folder}; the same command asks for the missing ones only"
        )
    if not pairs:
        reasons = "; ".join(f"{why} ({count})" for why, count in left_out.most_common(3)) or "no questions"
        raise ValueError(f"generator: {g.api.model} at {g.api.base_url} gave no usable pair: {reasons}")
    attempts = json.loads(costs.read_text())
    tokens = {name: sum(attempt[name] for attempt in attempts) for name in ("prompt_tokens", "completion_tokens")}
    log.info("%d pairs; %s tokens in all; left out: %s", len(pairs), tokens, dict(left_out))
    stage.finish({"pairs": len(pairs), "left_out": dict(left_out), "attempts": attempts, **tokens})
