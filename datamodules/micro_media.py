"""The micro world in a medium: what pretraining, lessons and benchmark have to know of one, and nothing of a family.

A phrase of the micro world (datamodules/micro_world.py) is put into a medium in one of four named styles: drawn into an
image, spoken, shown as a clip. Each medium has two splits of its own: `test=True` renders under conditions that no
training medium has (positions and sizes, voices), so that the benchmark never shows what was trained on.

To add a medium: a module `datamodules/micro_<medium>.py` whose `MEDIUM` satisfies `MicroMedium`; its line in
`_MODULES`; and the model that reads it, as `mllm/micro_<family>.py` (mllm/micro_blueprints.py). Outside of the project
both stand in the user's plugin (mllm/plugins.py).
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from datamodules.micro_stream import Stream
from datamodules.micro_world import FIRST_WORDS, OBJECTS, Phrase
from mllm.plugins import has_parts, load_plugin

_MODULES = {
    "image": "datamodules.micro_pages",
    "video": "datamodules.micro_clip_pages",
    "audio": "datamodules.micro_utterances",
}

IGNORE = -100
"""A label that no loss counts."""


@dataclass(frozen=True)
class LocalLabel:
    """What every position of the tower (patch, frame) learns to name, before the last layer; for reading, not kept.

    name: key in the tower's batches, int64 [B, positions], IGNORE where nobody can say.
    classes: how many; background: the one that says "nothing here", which is most positions and so counts less.
    weight: of its loss.
    """

    name: str
    classes: int
    background: int
    weight: float = 1.0


class MicroMedium(Protocol):
    """One medium of the micro world."""

    modality: str
    """As `model.modality` and `{modality}` in the prompts have it."""
    styles: tuple[str, ...]
    """One word each: what the style question is answered with; `model.prompts.styles` of the embedded model."""
    read: str
    """The question that asks for the words of the medium."""
    sees_nothing: str
    """The answer to the content question about a blank."""
    local: tuple[LocalLabel, ...]
    tasks: tuple[str, ...]
    """The tasks of VA-SafetyBench or MM-SafetyBench that it can be put into (benchmark `micro_tasks`)."""
    whole_prompt: tuple[str, ...]
    """Those of `tasks` with no text beside the medium. With any, the model is taught to answer a medium alone."""

    def draw(self, words: Sequence[str], style: str, rng: random.Random, test: bool) -> Any:
        """The words in one of `styles`, as mllm/media.py wants the modality's media; all draws are `rng`'s."""

    def draw_task(self, task: str, phrase: Phrase, style: str, rng: random.Random) -> Any:
        """The phrase as one of `tasks` has it, under test conditions; of no use to a medium that has none."""

    def blanks(self, n: int) -> list[Any]:
        """`n` different media that show nothing; the first need not be the blank of `model.blank_*`."""

    def tower_stream(self, batch_size: int, total_steps: int, seed: int) -> Stream:
        """Batches for the tower, each a dictionary of tensors with

        - what the blueprint's `states` reads (pixels, features),
        - every label of `local`,
        - first, object, style: int64 [B], classes of the whole medium, `caption_sizes` of them; the last of each is
          "nothing there" or "no known style"; first = IGNORE where the medium is not one phrase.
        """

    def tower_inputs(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """What the blueprint's `states` reads, of drawn media."""


def caption_sizes(medium: MicroMedium) -> tuple[int, int, int]:
    """Classes of (first word, object, style), the last of each "nothing there"."""
    return len(FIRST_WORDS) + 1, len(OBJECTS) + 1, len(medium.styles) + 1


def micro_medium(modality: str, plugin: str | None = None) -> MicroMedium:
    """Raises ValueError for a modality that the micro world is not rendered in."""
    if modality not in _MODULES and plugin is None:
        raise ValueError(f"model.modality={modality}: the micro world has {', '.join(_MODULES)}")
    if modality in _MODULES:
        module = importlib.import_module(_MODULES[modality])
    else:
        assert plugin is not None
        module = load_plugin(plugin)
        has_parts(module, plugin, ("MEDIUM",), "the micro world (evaluate.benchmarks=[micro], data=micro)")
    medium: MicroMedium = module.MEDIUM
    if medium.modality != modality:
        raise ValueError(f"model.plugin={plugin}: its MEDIUM is of modality {medium.modality}, the model of {modality}")
    return medium
