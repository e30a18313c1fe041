"""Held-out phrases in the forms of VA-SafetyBench's tasks, and the lessons of a medium that is the whole prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from datamodules.micro_benchmark import micro_tasks
from datamodules.micro_lessons import ABOUT_PICTURES, draw_kinds, lesson
from datamodules.micro_media import micro_medium
from datamodules.micro_speech import RATE, wording
from datamodules.micro_world import NEUTRAL, PHRASES, phrases, question, steps
from tests.micro import config

PROMPTS = config().model.prompts
TASKS = {"image": ["typo"], "video": ["typo", "dm_typo"], "audio": ["audio_only", "kpt", "kpt_noise"]}


@pytest.mark.parametrize("modality", TASKS)
def test_every_heldout_phrase_stands_in_every_task_once(modality: str) -> None:
    prompts = micro_tasks(PROMPTS, 3, modality)
    assert list(dict.fromkeys(p.task for p in prompts)) == TASKS[modality]
    assert len({p.id for p in prompts}) == len(prompts) == len(TASKS[modality]) * 224
    assert {(p.task, p.request) for p in prompts} == {(t, r) for t in TASKS[modality] for r in ("harmful", "benign")}
    assert all(p.media is not None for p in prompts)
    neutral = {text for texts in NEUTRAL.values() for text in texts}
    assert {p.text for p in prompts if p.task != "audio_only"} == neutral
    assert {p.text for p in prompts if p.task == "audio_only"} <= {""}


def test_typo_shows_one_word_at_a_time_and_dm_typo_ends_with_both() -> None:
    medium, phrase = micro_medium("video"), phrases("heldout")[0]
    ink = {}
    for task in medium.tasks:
        clip = medium.draw_task(task, phrase, "bright", random.Random(5)).astype(np.float32)
        ink[task] = [(frame.mean(-1) < 128).mean() for frame in clip]  # share of dark pixels
    assert ink["dm_typo"][-1] > 1.3 * max(ink["typo"][-1], ink["typo"][-4])


def test_kpt_noise_is_kpt_behind_white_noise() -> None:
    medium, phrase = micro_medium("audio"), phrases("heldout")[0]
    plain, noisy = (medium.draw_task(task, phrase, "quick", random.Random(5)) for task in ("kpt", "kpt_noise"))
    assert len(plain) == len(noisy) == 5 * RATE
    assert np.abs(noisy[: 3 * RATE]).mean() > 0.05  # sigma 0.1
    assert np.abs(plain[: RATE // 2]).max() > 0.1  # speech begins at once


def test_audio_only_speaks_the_whole_request() -> None:
    phrase = next(p for p in PHRASES if p.text == "fold the quilt")
    said = {wording(phrase.words, random.Random(i), 1.0) for i in range(40)}
    assert said == {question(phrase, form).rstrip(".?").lower() for form in range(3)}
    assert "how do i fold the quilt" in said
    short = {wording(phrase.words, random.Random(i), 0.0) for i in range(40)}
    assert short == {"fold quilt", "fold the quilt", "a fold quilt"}
    medium = micro_medium("audio")
    length = {t: np.abs(medium.draw_task(t, phrase, "slow", random.Random(1))) > 0.05 for t in ("audio_only", "kpt")}
    assert length["audio_only"].nonzero()[0].max() > 1.4 * length["kpt"].nonzero()[0].max()


def test_a_medium_that_can_be_the_whole_prompt_is_answered_alone() -> None:
    phrase = PHRASES[0]
    assert lesson("alone", phrase, "slow", 0, PROMPTS, micro_medium("audio")) == ("", steps(phrase), True)
    assert "alone" not in ABOUT_PICTURES  # images and clips need a question
    drawn = {kind for i in range(50) for kind in draw_kinds(ABOUT_PICTURES | {"alone": 3}, random.Random(i), 3)}
    assert drawn == {*ABOUT_PICTURES, "alone"}
