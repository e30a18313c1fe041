"""The benchmarks of the embedded models: held-out phrases as text, as real media, and as media behind SEA's prefix; and
in the forms of VA-SafetyBench's tasks.

The media are drawn under conditions reserved for tests (positions and sizes, voices) and go through processor and
encoder like any other.
"""

from __future__ import annotations

import random

from configs.schema import Prompts
from datamodules.benchmarks import BenchmarkPrompt, Request
from datamodules.micro_media import micro_medium
from datamodules.micro_world import N_FORMS, NEUTRAL, phrases, question


def micro_benchmark(
    prompts: Prompts, seed: int = 0, modality: str = "image", plugin: str | None = None
) -> list[BenchmarkPrompt]:
    """112 harmful and 112 benign held-out phrases in each of three tasks, and a reading question for every medium.

    Tasks: text_only, `<modality>_plain`, `<modality>_prefixed`. The wording cycles through the forms; style, place and
    noise are drawn by the seed and the phrase.
    """
    medium = micro_medium(modality, plugin)
    plain, prefixed = f"{modality}_plain", f"{modality}_prefixed"
    out: list[BenchmarkPrompt] = []
    for phrase in phrases("heldout"):
        rng = random.Random(f"{seed}/{phrase.id}")
        form, style = rng.randrange(N_FORMS), rng.choice(medium.styles)
        item = medium.draw(phrase.words, style, rng, test=True)
        request: Request = "harmful" if phrase.harmful else "benign"
        prefix = prompts.prefix_activity if phrase.kind == "activity" else prompts.prefix_product
        neutral = NEUTRAL[phrase.kind][form]
        texts = {
            "text_only": question(phrase, form),
            plain: neutral,
            prefixed: f"{prefix.format(modality=modality)} {neutral}",
        }
        for task, text in texts.items():
            media = None if task == "text_only" else item
            out.append(
                BenchmarkPrompt(
                    f"micro/{task}/{phrase.id}", "micro", task, phrase.scenario, request, text, media, phrase.text
                )
            )
        words = " ".join(phrase.words)
        out.append(
            BenchmarkPrompt(
                f"micro/reading/{phrase.id}", "micro", plain, phrase.scenario, "reading", medium.read, item, words
            )
        )
    return out


def micro_tasks(
    prompts: Prompts, seed: int = 0, modality: str = "video", plugin: str | None = None
) -> list[BenchmarkPrompt]:
    """The same phrases in the forms of VA-SafetyBench's tasks that the medium knows, with the neutral question beside
    them, or with nothing where the medium is the whole prompt.
    """
    medium = micro_medium(modality, plugin)
    out: list[BenchmarkPrompt] = []
    for task in medium.tasks:
        for phrase in phrases("heldout"):
            rng = random.Random(f"{seed}/{task}/{phrase.id}")
            form, style = rng.randrange(N_FORMS), rng.choice(medium.styles)
            item = medium.draw_task(task, phrase, style, rng)
            request: Request = "harmful" if phrase.harmful else "benign"
            text = "" if task in medium.whole_prompt else NEUTRAL[phrase.kind][form]
            name = f"micro_tasks/{task}/{phrase.id}"
            out.append(BenchmarkPrompt(name, "micro_tasks", task, phrase.scenario, request, text, item, phrase.text))
    return out
