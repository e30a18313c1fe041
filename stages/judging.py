"""The judges that a configuration names, what they will cost, and the loop over what is not judged yet."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from callbacks.progress import Progress
from configs.schema import Config
from datamodules.benchmark_prompts import BenchmarkPrompt
from datamodules.sources import chat_api
from evaluation.api_judge import APIJudge
from evaluation.judge_cost import Budget, Estimate, Prices, estimate
from evaluation.judge_prompts import ANSWER_ONLY, WITH_QUESTION, judge_prompt
from evaluation.judges import Judge, JudgementLog, judge_rows, unjudged
from evaluation.local_judge import LocalJudge
from evaluation.refusal import RefusalJudge
from evaluation.rows import GenerationLog, GenerationRow
from mllm.smol import text_model_folder
from stages.trainers import device_of

log = logging.getLogger(__name__)


def make_judges(cfg: Config) -> list[Judge]:
    """Who decides ASR: first the one whose rates stand in the tables, then, with `judge.both`, the other view of it.

    refusal: strings; local: a chat model; api: an endpoint (its key comes from the environment). All views of an
    endpoint spend from one `judge.max_cost`.

    Raises:
        ValueError: the local model is missing, or the key's variable is not set.
    """
    settings = cfg.judge
    views = [settings.with_question, not settings.with_question][: 1 + settings.both]
    if settings.kind == "local":
        first = LocalJudge.from_pretrained(
            text_model_folder(settings.path), device=str(device_of(cfg)), batch_size=settings.batch_size
        )
        return [first.viewing(with_question) for with_question in views]
    if settings.kind == "api":
        api, prices = chat_api(settings.api, "judge.api"), _prices(cfg)
        if prices is None or settings.max_cost is None:
            return [APIJudge(api, with_question) for with_question in views]
        budget = Budget(prices, settings.max_cost, api.usage)
        return [APIJudge(api, with_question, budget.exhausted) for with_question in views]
    return [RefusalJudge()]


def judges_needed(judges: Sequence[Judge]) -> list[Judge]:
    """Compliance is always read by the refusal judge; ASR by the chosen ones."""
    refusal = RefusalJudge()
    return [refusal, *(judge for judge in judges if judge.name != refusal.name)]


def judge_all(rows: Sequence[GenerationRow], judge: Judge, judgements: JudgementLog) -> None:
    """Judges what is not judged yet, or could not be judged; tells how many of these failed, and why the last one."""
    todo = unjudged(rows, judge, judgements)
    with Progress(f"judge {judge.name}", len(todo), "answers") as progress:
        n, failed = judge_rows(todo, judge, judgements, on_batch=progress.advance)
    if failed:
        reasons = [j.error for row in todo if (j := judgements.get(row, judge.name)) is not None and j.error]
        log.warning(
            "%s: %d of %d answers could not be judged (the last: %s); they are counted apart, run again to retry them "
            "alone",
            judge.name,
            failed,
            n,
            reasons[-1],
        )


def check_cost(
    cfg: Config,
    prompts: Sequence[BenchmarkPrompt],
    answers: Mapping[str, GenerationLog],
    judgements: JudgementLog,
) -> None:
    """Tells what a paid judge will cost at most, before anything is generated.

    Raises:
        ValueError: more than `judge.max_cost`.
    """
    if cfg.judge.kind != "api":
        return
    judges = [judge for judge in make_judges(cfg) if isinstance(judge, APIJudge)]
    parts = [
        _estimate(cfg, judge, prompts, generated, judgements) for judge in judges for generated in answers.values()
    ]
    calls, read, written = (sum(getattr(p, n) for p in parts) for n in ("calls", "tokens_read", "tokens_written"))
    told = f"judge {cfg.judge.api.model}: at most {calls} calls, about {read} tokens read and {written} written"
    if (prices := _prices(cfg)) is None:
        log.info("%s; judge.price_in and judge.price_out would tell what that costs", told)
        return
    cost = Estimate(calls, read, written).cost(prices)
    log.info("%s, a cost of %.4f", told, cost)
    if cfg.judge.max_cost is not None and cost > cfg.judge.max_cost:
        raise ValueError(
            f"{told} would cost up to {cost:.4f}, judge.max_cost is {cfg.judge.max_cost:g}; raise it, or ask less "
            "(evaluate.limit, evaluate.tasks, evaluate.variants, judge.both=false)"
        )


def _estimate(
    cfg: Config,
    judge: APIJudge,
    prompts: Sequence[BenchmarkPrompt],
    generated: GenerationLog,
    judgements: JudgementLog,
) -> Estimate:
    """Of one variant: by their texts where answers are on disk, else by the longest that they can get."""
    rows = [row for row in generated.rows() if row.request in judge.requests]
    known = list({judge_prompt(row, judge.with_question) for row in unjudged(rows, judge, judgements)})  # paid once
    waiting = [p for p in generated.todo(prompts) if p.request in judge.requests]
    unknown = len(waiting)
    if cfg.protector.enabled:  # what the guard shows is judged too, and not known yet
        known, unknown = known * 2, unknown * 2
    asked = max((len(p.asked or p.text) for p in waiting), default=0) if judge.with_question else 0
    template = len(WITH_QUESTION if judge.with_question else ANSWER_ONLY) + asked
    return estimate(known, template, unknown, cfg.evaluate.max_new_tokens)


def _prices(cfg: Config) -> Prices | None:
    read, written = cfg.judge.price_in, cfg.judge.price_out
    return None if read is None or written is None else Prices(read, written)
