"""Real media through M: equal to the model's own forward, and refused where the blank's description does not fit."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from datamodules.micro_images import draw
from datamodules.micro_world import phrases
from mllm.encode import MediaEncoder
from mllm.generate import answer, answer_embedded
from mllm.loading import MLLM
from tests.micro import config, micro
from tests.tiled import tiled


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    return micro()


def pictures(n: int) -> list[Image.Image]:
    rng = random.Random(0)
    return [draw(p.words, "bright", rng, test=False) for p in phrases("train")[:n]]


def test_an_injected_real_embedding_is_answered_like_the_picture_itself(mllm: MLLM) -> None:
    chosen, encoder = pictures(3), MediaEncoder(mllm)
    E = encoder.encode([encoder.prepare(p) for p in chosen])
    assert {path: tuple(e.shape[1:]) for path, e in E.items()} == mllm.shapes
    questions = [config().model.prompts.describe_activity] * 3
    answers = answer(mllm, questions, chosen, 24)
    assert len(set(answers)) == 3, "the pictures must be told apart, or the comparison proves nothing"
    assert answer_embedded(mllm, questions, {path: e.flatten(0, 1) for path, e in E.items()}, 24) == answers


def test_items_of_a_batch_are_encoded_as_alone(mllm: MLLM) -> None:
    encoder = MediaEncoder(mllm)
    prepared = [encoder.prepare(p) for p in pictures(3)]
    together = encoder.encode(prepared)
    for i, one in enumerate(prepared):
        for path, e in encoder.encode([one]).items():
            torch.testing.assert_close(together[path][i], e[0], rtol=0, atol=1e-5)


def test_pixels_follow_the_dtype_of_the_weights() -> None:
    encoder = MediaEncoder(micro(dtype=torch.bfloat16))
    E = encoder.encode([encoder.prepare(pictures(1)[0])])
    assert {e.dtype for e in E.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((64, 64), ""),
        ((128, 64), r"pixel_values of shape \(1, 3, 3, 64, 64\) of it, expected \(1, 2, 3, 64, 64\)"),  # a tile more
        ((32, 32), r"the image_sizes \[\[32, 32\]\], expected \[\[64, 64\]\]"),  # as many tiles, read as another size
    ],
)
def test_a_picture_that_is_cut_into_other_tiles_than_the_blank_is_refused(size: tuple[int, int], reason: str) -> None:
    mllm = tiled()
    encoder, image = MediaEncoder(mllm), Image.new("RGB", size, (90, 9, 9))
    if reason:
        with pytest.raises(ValueError, match=reason):
            encoder.prepare(image)
    else:
        E = encoder.encode([encoder.prepare(image)] * 2)
        assert {path: tuple(e.shape) for path, e in E.items()} == {p: (2, *s) for p, s in mllm.shapes.items()}
