"""Media in memory: what is silently cut, dropped or misread by a feature extractor is an error here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Model
from mllm.blank import Blank
from mllm.media import blank_medium, check_array, check_clip, media_arguments
from mllm.micro_llava import build_processor as image_processor
from mllm.micro_qwen2_audio import RATE, build_processor

AUDIO = Model(name="a", path="a", modality="audio", blank_seconds=5, max_seconds=5)
WAVE = np.zeros(RATE, np.float32)


def test_a_clip_as_the_model_wants_it_goes_to_the_processor_with_its_rate() -> None:
    arguments = media_arguments(AUDIO, build_processor(["a"]), [WAVE, WAVE])
    assert list(arguments) == ["audio", "sampling_rate"]
    assert (len(arguments["audio"]), arguments["sampling_rate"]) == (2, RATE)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(5 * RATE + 1, np.float32), r"clip 1 of 1: 5\.00 s at 16000 Hz, expected at most 5 s"),
        (np.zeros(640, np.float32), r"640 samples are 0\.040 s at 16000 Hz, expected 0\.1 s or more"),
        (np.zeros(0, np.float32), r"0 samples"),
        (np.zeros((2, RATE), np.float32), r"float32 of shape \(2, 16000\), expected a mono waveform"),
        (np.zeros(RATE, np.int16), "int16"),
        ([0.0] * RATE, "list, expected a mono waveform"),
        (np.full(RATE, np.nan, np.float32), "not all samples are finite"),
    ],
)
def test_other_clips_are_refused_with_what_is_wrong(clip: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        media_arguments(AUDIO, build_processor(["a"]), [clip])


def test_a_short_clip_gets_silence_at_its_end_where_the_model_says_so() -> None:
    padded = dataclasses.replace(AUDIO, pad_seconds=2)
    clips = [np.full(n, 0.5, np.float32) for n in (RATE, 3 * RATE)]
    short, long = media_arguments(padded, build_processor(["a"]), clips)["audio"]
    assert (len(short), len(long)) == (2 * RATE, 3 * RATE)
    assert short[:RATE].all()
    assert not short[RATE:].any()


def test_a_clip_of_exactly_the_longest_length_is_taken_and_without_a_limit_any() -> None:
    check_clip(np.zeros(5 * RATE, np.float32), RATE, 5, "x.wav")
    check_clip(np.zeros(50 * RATE, np.float32), RATE, None, "x.wav")


def test_the_shortest_clip_that_is_taken_is_heard() -> None:
    """The bound is not lower than what makes an audio token."""
    processor = build_processor(["a"])
    made = processor(text=["<|AUDIO|>"], **media_arguments(AUDIO, processor, [np.zeros(RATE // 10, np.float32)]))
    assert made["input_ids"][0].count(processor.audio_token_id) >= 1


def test_blanks_are_grey_and_silent() -> None:
    silence = blank_medium(AUDIO, build_processor(["a"]))
    assert silence.shape == (5 * RATE,)
    assert not silence.any()
    grey = blank_medium(dataclasses.replace(AUDIO, modality="image", blank_size=[64, 48]), image_processor(["a"]))
    assert isinstance(grey, Image.Image)
    assert grey.size == (64, 48)


OTHER = Model(name="s", path="s", modality="scent", plugin="own.py", blank_shape=[3, 8], blank_level=0.5)


def test_another_modality_has_a_constant_array_for_a_blank_and_its_name_for_the_processor() -> None:
    blank = blank_medium(OTHER, image_processor(["a"]))
    assert (blank.shape, blank.dtype) == ((3, 8), np.float32)
    assert (blank == 0.5).all()
    longer = np.zeros((3, 20), np.float32)
    assert media_arguments(OTHER, image_processor(["a"]), [blank, longer]) == {"scent": [blank, longer]}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8)), r"scent 1 of 1: float64 of shape \(3, 8\), expected float32 of shape \(3, \.\.\.\)"),
        ([[0.0] * 8] * 3, "scent 1 of 1: list, expected float32"),
        (np.zeros((8, 3), np.float32), r"shape \(8, 3\), expected float32 of shape \(3, \.\.\.\), as the blank"),
        (np.zeros((3, 8, 1), np.float32), r"shape \(3, 8, 1\)"),
        (np.zeros((3, 0), np.float32), r"shape \(3, 0\)"),
        (np.full((3, 8), np.inf, np.float32), "not all of its values are finite"),
    ],
)
def test_other_arrays_are_refused_with_what_is_wrong(array: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        media_arguments(OTHER, image_processor(["a"]), [array])


def test_an_array_of_three_axes_keeps_its_channels() -> None:
    check_array(np.zeros((2, 5, 9), np.float32), [2, 4, 4], "x")


def test_the_placeholder_of_another_modality_is_known_by_its_word_and_no_other_token_is_taken_for_one() -> None:
    names = ("pad", "bos", "eos", "scent_start", "my_scent", "scent", "image", "video_start")
    config = SimpleNamespace(**{f"{name}_token_id": i for i, name in enumerate(names)}, scent_token_index=20)
    inputs = {"input_ids": torch.tensor([[*range(len(names)), 20]])}
    assert Blank(inputs, config, "scent").media_token_ids == {names.index("scent"), names.index("image"), 20}
    assert Blank(inputs, config).media_token_ids == {names.index("image")}
