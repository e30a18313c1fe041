"""The judge that the configuration names."""

from __future__ import annotations

from configs.schema import Config
from datamodules.sources import chat_api
from evaluation.api_judge import APIJudge
from evaluation.judges import Judge
from evaluation.local_judge import LocalJudge
from evaluation.refusal import RefusalJudge
from mllm.smol import text_model_folder
from stages.trainers import device_of


def make_judge(cfg: Config) -> Judge:
    """refusal: strings; local: a chat model; api: an endpoint (its key comes from the environment).

    Raises:
        ValueError: the local model is missing, or the key's variable is not set.
    """
    settings = cfg.judge
    if settings.kind == "local":
        return LocalJudge.from_pretrained(
            text_model_folder(settings.path),
            device=str(device_of(cfg)),
            with_question=settings.with_question,
            batch_size=settings.batch_size,
        )
    if settings.kind == "api":
        return APIJudge(chat_api(settings.api, "judge.api"), with_question=settings.with_question)
    return RefusalJudge()
