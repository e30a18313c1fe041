"""The shipped embedded audio model against its bars, its anchor, and its recipe in a short form."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import train
from datamodules.micro_speech import RATE, TEST_VOICES
from datamodules.micro_utterances import MEDIUM, Utterances, features_of
from datamodules.micro_world import PHRASES
from datamodules.speech import synthesize
from evaluation.phrases import contains_phrase
from mllm.encode import MediaEncoder
from mllm.generate import answer, answer_embedded
from mllm.micro_qwen2_audio import states
from tests.micro import ROOT, config, micro
from tests.micro_bars import Answers, benchmark_answers, compliance, losses_of, reading_accuracy

FOLDER = ROOT / "assets" / "micro_qwen2_audio"
PROMPTS = config("sea_audio").model.prompts


def test_weights_are_small_safetensors_that_plain_from_pretrained_loads() -> None:
    files = list(FOLDER.iterdir())
    assert sum(f.stat().st_size for f in files) <= 4_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja"}
    model = Qwen2AudioForConditionalGeneration.from_pretrained(FOLDER)
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert type(processor).__name__ == "Qwen2AudioProcessor"
    assert type(processor.feature_extractor).__name__ == "WhisperFeatureExtractor"
    assert model.config.model_type == "qwen2_audio"


@pytest.fixture(scope="module")
def answers() -> Answers:
    return benchmark_answers(micro(experiment="sea_audio"))


def test_understands_heldout_phrases_from_heldout_voices(answers: Answers) -> None:
    assert reading_accuracy(answers) >= 0.95


def test_unaligned_it_complies_with_harmful_and_harmless_requests(answers: Answers) -> None:
    shares = compliance(answers)
    tasks = ("text_only", "audio_plain", "audio_prefixed")
    assert set(shares) == {(task, kind) for task in tasks for kind in ("harmful", "benign")}
    assert all(share >= 0.95 for share in shares.values()), shares


def test_a_phrase_alone_is_understood_as_a_file_brings_it() -> None:
    """No silence around it, so a third of the audio tokens of a full clip; and with seconds of noise before it."""
    mllm = micro(experiment="sea_audio")
    words = [("bake", "garden"), ("steal", "guitar"), ("paint", "yacht"), ("fake", "ticket"), ("juggle", "apple")]
    spoken = [synthesize(f"{a} the {b}", voice, 160, 50, RATE).samples for a, b in words for voice in TEST_VOICES[:4]]
    noise = 0.05 * np.random.default_rng(0).standard_normal(2 * RATE, np.float32)
    noisy = [np.concatenate([noise, clip]) for clip in spoken]
    for clips in (spoken, noisy):
        heard = answer(mllm, [MEDIUM.read] * len(clips), clips, 12)
        expected = [" ".join(w) for w in words for _ in range(4)]
        hits = sum(contains_phrase(a, e) for a, e in zip(heard, expected, strict=True))
        assert hits >= 0.8 * len(clips), heard


def test_the_embedding_of_a_clip_answers_as_the_clip_does() -> None:
    """SWAP: E of real clips, injected over the blank's silence."""
    mllm = micro(experiment="sea_audio")
    assert mllm.shapes == {"model.multi_modal_projector": (1, 62, 96)}
    clips = [MEDIUM.draw(w, "slow", random.Random(1), test=True) for w in (("bake", "cake"), ("paint", "fence"))]
    encoder = MediaEncoder(mllm)
    E = encoder.encode([encoder.prepare(clip) for clip in clips])["model.multi_modal_projector"]
    questions = [MEDIUM.read] * 2
    injected = {"model.multi_modal_projector": E.flatten(0, 1)}
    assert answer_embedded(mllm, questions, injected, 12) == answer(mllm, questions, clips, 12)


def test_a_clip_that_the_model_would_cut_is_refused() -> None:
    mllm = micro(experiment="sea_audio")
    with pytest.raises(ValueError, match=r"expected at most 5 s \(model\.max_seconds\)"):
        answer(mllm, [MEDIUM.read], [np.zeros(6 * RATE, np.float32)])


def test_the_blueprints_forward_is_the_towers() -> None:
    tower = micro(experiment="sea_audio").model.model.audio_tower
    batch = Utterances(4, 10, seed=0).batch(9)  # full clips, some of which end early
    positions = tower.config.max_source_positions
    heard = torch.arange(positions)[None] < ((batch["lengths"] - 1) // 2 + 1)[:, None]
    mask = heard[:, None, None].expand(-1, 1, positions, -1)
    expected = tower(batch["features"], attention_mask=mask).last_hidden_state
    local, whole = states(tower, batch)
    assert torch.allclose(whole, expected, atol=1e-5)
    assert local.shape == (4, positions, whole.shape[-1])


def test_features_are_the_processors() -> None:
    clips = [MEDIUM.draw(("bake", "cake"), "quick", random.Random(1), test=False), np.zeros(RATE, np.float32)]
    processor = AutoProcessor.from_pretrained(FOLDER)
    made = processor(text=["<|AUDIO|>"] * 2, audio=clips, sampling_rate=RATE, return_tensors="pt", padding=True)
    ours = features_of(clips)
    assert torch.equal(ours["features"], made["input_features"])
    assert torch.equal(ours["lengths"], made["feature_attention_mask"].sum(-1))


def test_the_recipe_runs_in_a_short_form_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a language model that knows the world (the image model's): the loss starts low and must not rise."""
    folder = tmp_path / "pretrain"
    short = [
        "pretrain.tower_steps=12",
        "pretrain.tower_batch_size=8",
        "pretrain.language_steps=12",
        "pretrain.robust_steps=4",
        "pretrain.robust_style_steps=1",
        "pretrain.language_pictures=4",
        "pretrain.draws=1",
        "pretrain.num_workers=0",
        "trainer.log_every_n_steps=1",
    ]
    few = [p for p in PHRASES if p.object in ("passport", "cake")]
    for module in ("datamodules.micro_lessons", "stages.pretrain_language"):  # 112 phrases, not 2,240, are spoken
        monkeypatch.setattr(f"{module}.PHRASES", tuple(few))
    assert train.main(["experiment=pretrain_micro_audio", f"run_dir={folder}", *short]) == 0
    made = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "pretrain_language" / "model")
    assert made.config.audio_config.model_type == "qwen2_audio_encoder"
    losses = losses_of(folder / "pretrain_language" / "robust" / "metrics" / "metrics.csv")
    assert losses[-1] < losses[0]
