"""The micro world as speech: what is held out, what a clip contains, and that labels lie where words sound."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from configs.schema import Prompts
from datamodules.micro_benchmark import micro_benchmark
from datamodules.micro_media import IGNORE, caption_sizes, micro_medium
from datamodules.micro_speech import RATE, SAMPLES, STYLES, TEMPI, TEST_VOICES, TRAIN_VOICES, band, utterance
from datamodules.micro_utterances import MEDIUM, Utterances, frame_labels, whole_words
from datamodules.micro_world import FIRST_WORDS, OBJECTS, WORDS
from datamodules.speech import synthesize
from mllm.micro_qwen2_audio import FRAMES, MELS

PHRASE = ("measure", "elephant")


def test_test_voices_are_in_no_training_clip() -> None:
    assert not set(TRAIN_VOICES) & set(TEST_VOICES)
    speakers = {v.partition("+")[2] or v for v in TRAIN_VOICES}
    assert not speakers & {v.partition("+")[2] or v for v in TEST_VOICES}
    rng = random.Random(0)
    for style in STYLES:
        trained = {utterance("a", style, rng, TRAIN_VOICES).speed for _ in range(100)}
        tested = {utterance("a", style, rng, TEST_VOICES, test=True).speed for _ in range(100)}
        assert not trained & tested


@pytest.mark.parametrize("voice", [*TRAIN_VOICES, *TEST_VOICES])
def test_the_longest_phrase_fits_into_a_clip_in_every_voice(voice: str) -> None:
    speech = synthesize("a measure elephant", voice, TEMPI["slow"][0] - 2, 50, RATE)
    assert 0.5 < speech.seconds < 2.9
    assert [w.text for w in speech.words] == ["a", *PHRASE]


def test_a_clip_is_full_repeats_with_its_seed_and_differs_by_style() -> None:
    clips = {style: MEDIUM.draw(PHRASE, style, random.Random(3), test=True) for style in STYLES}
    for style, clip in clips.items():
        assert clip.shape == (SAMPLES,)
        assert clip.dtype == np.float32
        assert 0.02 < float(np.abs(clip).max()) <= 1
        assert np.array_equal(clip, MEDIUM.draw(PHRASE, style, random.Random(3), test=True))
    assert len({clip.tobytes() for clip in clips.values()}) == len(STYLES)


def test_a_telephone_has_nothing_above_its_band() -> None:
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(band(noise, 300, 3400)))
    frequency = np.fft.rfftfreq(RATE, 1 / RATE)
    outside = (frequency < 295) | (frequency > 3405)
    assert spectrum[outside].max() < 1e-3 * spectrum[~outside].mean()


def test_frame_labels_name_the_word_that_is_spoken() -> None:
    speech = synthesize("measure the elephant", "en", 150, 50, RATE)
    lead = RATE
    labels = frame_labels(speech, lead, FRAMES // 2)
    assert labels.shape == (FRAMES // 2,)
    found = [WORDS[i] for i in dict.fromkeys(labels.tolist()) if i < len(WORDS)]
    assert found == list(PHRASE)
    assert (labels[:25] == len(WORDS)).all()  # the second of lead, 40 ms a frame
    elephant = np.flatnonzero(labels == WORDS.index("elephant"))
    assert elephant[0] * 0.04 == pytest.approx(1 + speech.words[2].start, abs=0.05)


def test_words_that_do_not_fit_whole_are_left_out_with_their_samples() -> None:
    speech = synthesize("bank cake garden", "en", 150, 50, RATE)
    cut = whole_words(speech, len(speech.samples) - 100)
    assert [w.text for w in cut.words] == ["bank", "cake"]
    assert len(cut.samples) == round(speech.words[1].end * RATE)
    assert whole_words(speech, len(speech.samples)) is speech


def test_batches_are_a_function_of_seed_and_step_and_grow_to_full_clips() -> None:
    stream, again = Utterances(6, 20, seed=0), Utterances(6, 20, seed=0)
    early, late = stream.batch(0), stream.batch(19)
    assert all(torch.equal(late[key], value) for key, value in again.batch(19).items())
    assert early["features"].shape[2] < late["features"].shape[2] == FRAMES
    for batch in (early, late):
        frames = batch["features"].shape[2]
        assert batch["features"].shape == (6, MELS, frames)
        assert batch["words"].shape == (6, frames // 2)
        assert (batch["lengths"] <= frames).all()
    assert (early["first"][early["first"] != len(FIRST_WORDS)] == IGNORE).all()
    sizes = caption_sizes(MEDIUM)
    assert sizes == (len(FIRST_WORDS) + 1, len(OBJECTS) + 1, len(STYLES) + 1)
    many = Utterances(48, 20, seed=0).batch(12)
    assert (many["first"] >= 0).any()
    assert all(int(many[key].max()) < size for key, size in zip(("first", "object", "style"), sizes, strict=True))


def test_the_benchmark_speaks_every_heldout_phrase() -> None:
    prompts = micro_benchmark(Prompts(styles=list(STYLES)), modality="audio")
    assert {p.task for p in prompts} == {"text_only", "audio_plain", "audio_prefixed"}
    spoken = [p for p in prompts if p.task == "audio_prefixed"]
    assert len(spoken) == 224
    assert all("audio" in p.text and "image" not in p.text for p in spoken)
    assert all(p.media.shape == (SAMPLES,) for p in spoken)


def test_a_modality_without_a_micro_world_is_named() -> None:
    with pytest.raises(ValueError, match="the micro world has image"):
        micro_medium("smell")
