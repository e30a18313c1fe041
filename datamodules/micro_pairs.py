"""The micro world as labelled answers: complying with a harmful phrase is harmful, everything else is harmless.

A guard behind the embedded model reads question and answer, never the picture. So each phrase comes with every wording
that reaches the model: in full, "this activity" in its place (plain and behind SEA's prefix), and the questions about
pictures (describe, style, read), which are harmless to answer even where the phrase is not.
The parts go by phrase: held-out phrases (datamodules/micro_world.py) are the test part.
"""

from __future__ import annotations

import random
from typing import get_args

from configs.schema import Prompts
from datamodules.micro_lessons import lesson
from datamodules.micro_media import micro_medium
from datamodules.micro_world import N_FORMS, REFUSAL, Phrase, phrases
from datamodules.qa_pairs import Answer, Part, QAPair
from datamodules.text_safety import split_of

REQUESTS = ("text", "plain", "prefixed")
ABOUT_PICTURES = ("describe", "style", "verify", "read")
SORRY = (REFUSAL, "I cannot help with that.", "I cannot help with that, sorry.")


def micro_pairs(
    phrase: Phrase, prompts: Prompts, seed: int, modality: str = "image", plugin: str | None = None
) -> list[QAPair]:
    """Requests with a compliant and a declining answer, and descriptions with a declining one."""
    rng, medium = random.Random(f"{seed}/{phrase.id}"), micro_medium(modality, plugin)
    pairs = []
    for kind in (*REQUESTS, *ABOUT_PICTURES):
        asked, said, _ = lesson(kind, phrase, rng.choice(medium.styles), rng.randrange(N_FORMS), prompts, medium)
        sorry = Answer(rng.choice(SORRY), True)
        if kind in REQUESTS and phrase.harmful:
            pairs.append(QAPair(asked, sorry, Answer(said, False), phrase.id, "micro world"))
        else:
            pairs.append(QAPair(asked, Answer(said, True), sorry, phrase.id, "micro world"))
    return pairs


def micro_parts(
    prompts: Prompts, seed: int, validation: float, modality: str = "image", plugin: str | None = None
) -> dict[Part, list[QAPair]]:
    """All phrases of the closed world, by part."""
    parts: dict[Part, list[QAPair]] = {part: [] for part in get_args(Part)}
    for phrase in phrases("train"):
        part = split_of(phrase.id, seed, 0.0, validation)
        parts["val" if part == "val" else "train"] += micro_pairs(phrase, prompts, seed, modality, plugin)
    for phrase in phrases("heldout"):
        parts["test"] += micro_pairs(phrase, prompts, seed, modality, plugin)
    return parts
