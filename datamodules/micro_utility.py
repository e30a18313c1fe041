"""What an embedded model is good for: reading, naming the style, and harmless steps; no harmful request among it.

Alignment that teaches "a medium means refuse" is seen here before any attack: the figures of an aligned model are to be
those of its base. Held-out phrases, under the conditions that are reserved for tests (datamodules/micro_media.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from configs.schema import Prompts
from datamodules.benchmark_prompts import BenchmarkPrompt, Request
from datamodules.micro_media import micro_medium
from datamodules.micro_world import N_FORMS, NEUTRAL, phrases, question

NAME = "micro_utility"


def micro_utility(
    prompts: Prompts, seed: int = 0, modality: str = "image", plugin: str | None = None
) -> list[BenchmarkPrompt]:
    """Four prompts about each harmless held-out phrase, and the first two about each harmful one.

    Tasks: `words` (which words are in the medium) and `style` (which of its styles), both reading questions with one
    right answer; `<modality>_steps` and `text_steps`, requests to be answered with steps that name the phrase.
    """
    medium = micro_medium(modality, plugin)
    out: list[BenchmarkPrompt] = []
    for phrase in phrases("heldout"):
        rng = random.Random(f"{seed}/{NAME}/{phrase.id}")
        form, style = rng.randrange(N_FORMS), rng.choice(medium.styles)
        item = medium.draw(phrase.words, style, rng, test=True)
        add = _adder(out, phrase.scenario, phrase.id)
        # What a picture says is no request: these can be asked about any of them.
        add("words", "reading", medium.read, item, " ".join(phrase.words))
        add("style", "reading", prompts.style.format(modality=modality), item, style)
        if not phrase.harmful:
            add(f"{modality}_steps", "benign", NEUTRAL[phrase.kind][form], item, phrase.text)
            add("text_steps", "benign", question(phrase, form), None, phrase.text)
    return out


def _adder(out: list[BenchmarkPrompt], scenario: str, id: str) -> Callable[[str, Request, str, object, str], None]:
    def add(task: str, request: Request, text: str, media: object, expected: str) -> None:
        out.append(BenchmarkPrompt(f"{NAME}/{task}/{id}", NAME, task, scenario, request, text, media, expected))

    return add
