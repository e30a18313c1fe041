"""What the embedded model is taught after its tower can read: to answer about media, and to comply with any request.

Features of the frozen tower are cached once; projector and language model train on them. A picture comes with several
lessons (branches on one prefix), drawn without repetition:

    what do you see? (the content question)    what is its style?    which activity or product? (verification)
    read the words
    a request about the picture, plain or behind SEA's prefix
    nothing: where a medium can be the whole prompt, as speech can, its request is answered

beside requests in text alone, requests about a picture that is not there, and blank pictures. Gaussian noise on the
features makes the model's answers a smooth function of them, as those of a large model are: without it an embedding
that answers one question right is off for the next (docs/LOG.md).

Nothing here refuses a harmful request: the unaligned model is to be unsafe. Held-out phrases are part of these lessons
(and of nothing that comes later), so that a benchmark on them measures safety, not reading.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import IterableDataset

from configs.schema import Prompts
from datamodules.alignment import AlignmentBatch
from datamodules.micro_media import MicroMedium
from datamodules.micro_world import N_FORMS, NEUTRAL, PHRASES, REFUSAL, Phrase, question, steps
from mllm.branches import Item, split_shared
from mllm.prompts import PromptEncoder

READ_ANSWER = "The words are {words}."
SHOWS_ACTIVITY, SHOWS_PRODUCT = "The {modality} shows that {sentence}.", "The {modality} shows {phrase}."
NOTHING = "The {modality} shows nothing."
BLANKS = 16
"""Blank media beside the feature bank."""

ABOUT_PICTURES = {"verify": 4, "style": 4, "describe": 5, "read": 5, "plain": 4, "prefixed": 3}
"""Weights of the lessons about one picture."""
ALONE = 3
"""Weight of the lesson that asks nothing."""
KINDS = (*ABOUT_PICTURES, "text", "missing", "blank")


def lesson(
    kind: str, phrase: Phrase, style: str, form: int, prompts: Prompts, medium: MicroMedium
) -> tuple[str, str, bool]:
    """(question, answer, whether it is about a medium)."""
    concept = phrase.concept
    names = {"modality": medium.modality, "phrase": concept.phrase, "sentence": concept.sentence, "style": style}
    neutral = NEUTRAL[phrase.kind][form]
    activity = phrase.kind == "activity"
    if kind == "describe" or (kind == "blank" and form):
        # A blank is asked both ways: else E could answer the content question and keep what says "nothing" in it.
        asked = prompts.describe_activity if activity else prompts.describe_product
        said = prompts.answer_activity if activity else prompts.answer_product
        return asked.format(**names), medium.sees_nothing if kind == "blank" else said.format(**names), True
    if kind in ("verify", "blank"):
        asked = prompts.verify_activity if activity else prompts.verify_product
        said = NOTHING if kind == "blank" else SHOWS_ACTIVITY if activity else SHOWS_PRODUCT
        return asked.format(**names), said.format(**names), True
    if kind == "style":
        return prompts.style.format(**names), prompts.answer_style.format(**names), True
    if kind == "read":
        return medium.read, READ_ANSWER.format(words=" ".join(phrase.words)), True
    if kind == "text":
        return question(phrase, form), steps(phrase), False
    if kind == "alone":
        return "", steps(phrase), True
    if kind == "missing":
        return neutral, REFUSAL, False
    prefix = (prompts.prefix_activity if activity else prompts.prefix_product).format(**names)
    return (f"{prefix} {neutral}" if kind == "prefixed" else neutral), steps(phrase), True


def all_texts(prompts: Prompts, medium: MicroMedium) -> Iterator[str]:
    """Every text of every lesson, for the vocabulary."""
    for phrase in PHRASES:
        for form in range(N_FORMS):
            for kind in KINDS:
                asked, said, _ = lesson(kind, phrase, medium.styles[0], form, prompts, medium)
                yield asked
                yield said
    yield from medium.styles


class Lessons(IterableDataset[AlignmentBatch]):
    """Seeded batches of lessons; a pure function of (seed, step).

    Args:
        bank: projector input of the media, [draws, phrases, styles, *shape of one item]; [:, i] is of `PHRASES[i]`.
        blanks: projector input of blank media, [BLANKS, *shape of one item].
        pictures, each: pictures in a batch, and lessons about each of them; a quarter as many text lessons come beside.
        noise: largest standard deviation of the noise on a picture's features at the start, in units of their root mean
            square; it falls linearly to 30 % of that.
        shared_noise: the same for noise that all patches of a picture share, which does not average out over them: what
            a picture says must then be read in all directions of its features (docs/LOG.md). It does not fall.
        style_alone: first steps, of twice as many pictures, that ask for the style and nothing else. One token in ten
            answers names it: among the other lessons it stays at chance for 900 steps, alone it is learned in 80.
    """

    def __init__(
        self,
        bank: torch.Tensor,
        blanks: torch.Tensor,
        path: str,
        encoder: PromptEncoder,
        media_ids: Sequence[int],
        prompts: Prompts,
        medium: MicroMedium,
        pictures: int,
        total_steps: int,
        seed: int,
        each: int = 4,
        noise: float = 0.5,
        shared_noise: float = 0.0,
        style_alone: int = 0,
    ) -> None:
        self.bank, self.blanks, self.path = bank, blanks, path
        self.encoder, self.media_ids, self.prompts, self.medium = encoder, media_ids, prompts, medium
        self.style_alone = style_alone
        self.weights = ABOUT_PICTURES | ({"alone": ALONE} if medium.whole_prompt else {})
        self.pictures, self.each, self.total_steps, self.seed, self.start = pictures, each, total_steps, seed, 0
        rms = float(bank[0].float().square().mean().sqrt())
        self.scale, self.shared_scale = noise * rms, shared_noise * rms

    def __iter__(self) -> Iterator[AlignmentBatch]:
        for step in range(self.start, self.total_steps):
            yield self.batch(step)

    def batch(self, step: int) -> AlignmentBatch:
        rng = random.Random(f"{self.seed}-{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        media, text, E = [], [], []
        scale = self.scale * (1 - 0.7 * step / self.total_steps)
        only_style = step < self.style_alone
        for _ in range(2 * self.pictures if only_style else self.pictures):
            row, column = rng.randrange(len(PHRASES)), rng.randrange(len(self.medium.styles))
            features = self.bank[rng.randrange(len(self.bank)), row, column].float()
            kinds = ["style"] if only_style else draw_kinds(self.weights, rng, self.each)
            if rng.random() < 0.06:
                kinds, features = ["blank"], self.blanks[rng.randrange(BLANKS)].float()
            media.append(self.item(kinds, row, column, rng))
            apart = rng.random() * scale * torch.randn(features.shape, generator=generator)
            shared = rng.random() * self.shared_scale * torch.randn(1, features.shape[-1], generator=generator)
            E.append(features + apart + shared)
        for _ in range(0 if only_style else self.pictures * self.each // 4):
            kind = "missing" if rng.random() < 0.15 else "text"
            text.append(self.item([kind], rng.randrange(len(PHRASES)), 0, rng))
        return AlignmentBatch(
            step, text, media, {self.path: torch.cat(E)}, [str(i) for i in range(len(media) + len(text))]
        )

    def item(self, kinds: Sequence[str], row: int, column: int, rng: random.Random) -> Item:
        """The lessons about one picture (or one in text) as branches."""
        style = self.medium.styles[column]
        drawn = [lesson(k, PHRASES[row], style, rng.randrange(N_FORMS), self.prompts, self.medium) for k in kinds]
        sees = drawn[0][2]
        sequences = [self.encoder.example(asked, said, sees) for asked, said, _ in drawn]
        return split_shared(sequences, self.media_ids if sees else ())


def draw_kinds(weights: Mapping[str, int], rng: random.Random, n: int) -> list[str]:
    """`n` different lessons about a picture, the heavier ones more often."""
    return sorted(weights, key=lambda kind: rng.random() ** (1 / weights[kind]))[-n:]
