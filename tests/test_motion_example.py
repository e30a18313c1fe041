"""examples/motion: a modality that no package of the project knows, from its own folder, with random weights."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

import train
from configs.compose import compose, last_wins
from configs.schema import Model
from datamodules.embedding_store import EmbeddingStore
from datamodules.micro_lessons import all_texts
from datamodules.micro_media import micro_medium
from datamodules.micro_world import PHRASES, phrases, question, steps
from evaluation.phrases import words_of as words_in
from mllm.encode import MediaEncoder
from mllm.generate import answer, answer_embedded
from mllm.loading import MLLM, load
from mllm.micro_blueprints import blueprint
from mllm.micro_tokenizer import words_of
from mllm.plugins import load_plugin
from tests.conftest import ROOT
from tests.pictures import row, write_rows

FOLDER = ROOT / "examples" / "motion"
PATH = "model.multi_modal_projector"
WORD = re.compile(r"\b(motion|gestures?|accelero\w*|gyro\w*)\b", re.IGNORECASE)


def spec() -> Model:
    return compose(["experiment=sea_motion"], [FOLDER], check_paths=False).config.model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pretraining would begin with: a random encoder, the image model's language model."""
    s, folder = spec(), tmp_path_factory.mktemp("motion") / "model"
    made = blueprint("motion", s.plugin)
    processor = made.build_processor(words_of(all_texts(s.prompts, micro_medium("motion", s.plugin))))
    torch.manual_seed(0)
    made.build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mllm(checkpoint: Path) -> MLLM:
    return load(dataclasses.replace(spec(), path=str(checkpoint)))


def recordings(n: int) -> list[np.ndarray]:
    medium, rng = micro_medium("motion", spec().plugin), random.Random(0)
    return [medium.draw(p.words, "smooth", rng, test=True) for p in phrases("heldout")[:n]]


def test_no_package_of_the_project_knows_of_motion() -> None:
    packages = ("callbacks", "configs", "datamodules", "evaluation", "lightning_modules", "mllm", "stages")
    files = [p for package in packages for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".yaml")]
    assert len(files) > 100
    told = [f"{p}: {line}" for p in files for line in p.read_text().splitlines() if WORD.search(line)]
    # A clip may be shot in slow motion; the placeholder of "another modality" needs an example.
    assert not [line for line in told if "slow motion" not in line and "motion_token_id" not in line]


def test_the_missing_checkpoint_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--config-dir", str(FOLDER), "experiment=sea_motion"]
    assert train.main([*start, "--cfg"]) == 0
    assert "modality: motion" in capsys.readouterr().out
    assert train.main(["--config-dir", str(FOLDER)]) == 0
    assert re.search(r"sea_motion +SEA for motion", capsys.readouterr().out)
    assert train.main([*start, f"run_dir={tmp_path}/run", "model.path=runs/nothing/here"]) == 2
    told = capsys.readouterr().err
    assert "make it with `python train.py --config-dir examples/motion experiment=pretrain_motion run=mine`" in told


def test_transformers_alone_loads_the_checkpoint_once_the_plugin_is_imported(checkpoint: Path) -> None:
    load_plugin(str(FOLDER))
    config = AutoConfig.from_pretrained(checkpoint)
    assert (config.model_type, config.vision_config.model_type) == ("llava", "motion_encoder")
    assert type(AutoModelForMultimodalLM.from_pretrained(checkpoint).model.vision_tower).__name__ == "MotionEncoder"
    assert type(AutoProcessor.from_pretrained(checkpoint)).__name__ == "MotionProcessor"
    assert sum(f.stat().st_size for f in checkpoint.iterdir()) < 5_000_000


def test_the_boundary_is_found_and_E_takes_the_encoders_place(mllm: MLLM) -> None:
    """SWAP: E of real recordings, injected over the blank, gives the logits of these recordings."""
    assert mllm.shapes == {PATH: (1, 32, 96)}
    assert list(mllm.anchor.encoder_modules) == ["model.vision_tower"]
    media, questions = recordings(3), ["Read the words in the motion."] * 3
    encoder = MediaEncoder(mllm)
    E = encoder.encode([encoder.prepare(each) for each in media])[PATH].flatten(0, 1)
    assert answer_embedded(mllm, questions, {PATH: E}, 12) == answer(mllm, questions, media, 12)
    ids = mllm.prompts.prompt(questions[0], True)[None]
    with torch.no_grad():
        blank, swapped = (_logits(mllm, ids, e) for e in (mllm.anchor.E0_by_path[PATH], E[:1]))
        inputs = mllm.processor(text=[mllm.prompts.text(questions[0], True)], motion=media[:1], return_tensors="pt")
        expected = mllm.model(**inputs).logits
    assert torch.allclose(swapped, expected, atol=1e-4)
    assert (swapped - blank).abs().max() > 0.01


def _logits(mllm: MLLM, ids: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
    with mllm.anchor.inject({PATH: E}):
        logits: torch.Tensor = mllm.model(input_ids=ids, **mllm.anchor.media_inputs(1)).logits
    return logits


def test_it_talks_as_the_image_model_does_before_any_training(mllm: MLLM) -> None:
    chosen = phrases("heldout")[::20]
    said = answer(mllm, [question(p, 0) for p in chosen], None, 24)
    hits = [words_in(a) == words_in(steps(p)) for a, p in zip(said, chosen, strict=True)]
    assert sum(hits) >= 0.9 * len(hits)


def test_a_short_recording_is_filled_with_rest_and_a_long_one_refused(mllm: MLLM) -> None:
    short = np.ones((6, 100), np.float32)
    padded = np.pad(short, ((0, 0), (0, 28)))
    asked = ["Read the words in the motion."]
    assert answer(mllm, asked, [short], 8) == answer(mllm, asked, [padded], 8)
    with pytest.raises(ValueError, match="129 samples, expected at most 128"):
        answer(mllm, asked, [np.zeros((6, 129), np.float32)])
    with pytest.raises(ValueError, match="1 recordings for 2 placeholders"):
        mllm.processor(text=["<motion> <motion>"], motion=[short])


def test_wearers_of_the_tests_are_outside_of_all_ranges_of_the_training() -> None:
    wearer = load_plugin(str(FOLDER)).gestures.wearer
    rng = random.Random(0)
    train_, test = ([wearer(rng, test=flag) for _ in range(300)] for flag in (False, True))
    for name in ("strength", "tempo"):
        low, high = (f([getattr(w, name) for w in train_]) for f in (min, max))
        assert not [w for w in test if low < getattr(w, name) < high]
    tilts = [[np.degrees(np.arccos((np.trace(w.tilt) - 1) / 2)) for w in each] for each in (train_, test)]
    assert max(tilts[0]) < min(tilts[1])


def test_synthesis_files_and_training_run_through_the_ordinary_command(checkpoint: Path, tmp_path: Path) -> None:
    """A few steps of every stage, with recordings from .npy files among the embeddings and in the benchmark."""
    media = recordings(2)
    (tmp_path / "m").mkdir()
    for i, each in enumerate(media):
        np.save(tmp_path / "m" / f"{i}.npy", each)
    listed = write_rows(tmp_path, [row(p, f"m/{i}.npy") for i, p in enumerate(phrases("heldout")[:2])])
    (tmp_path / "prompts.csv").write_text(
        "id,media,text,request,scenario,task,expected\n1,m/0.npy,Read the words in the motion.,reading,,,x\n"
    )
    few = [
        "experiment=sea_motion", f"model.path={checkpoint}", f"run_dir={tmp_path}/run", f"real.path={listed}",
        "stages=[synthesize,encode,align,evaluate]", "synthesis.harmful=2", "synthesis.harmless=2", "synthesis.slots=4",
        "synthesis.max_steps=3", "synthesis.retries=0", "synthesis.include_failed=true", "align.variants=[sea_dpo]",
        "variants.sea_dpo.steps=2", "variants.sea_dpo.batch_size=8", "evaluate.benchmarks=[micro,folder]",
        f"evaluate.folder={tmp_path}", "evaluate.limit=2", "evaluate.max_new_tokens=8", "logger.tensorboard=false",
    ]  # fmt: skip
    assert train.main(["--config-dir", str(FOLDER), *few]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["modality"] == "motion"
    tasks = {r["task"] for r in report["results"]}
    assert {"text_only", "motion_plain", "motion_prefixed", "media"} <= tasks
    store = EmbeddingStore.open(tmp_path / "run" / "synthesize" / "store")
    assert (len(store.ids(source="synthetic")), len(store.ids(source="real"))) == (4, 2)
    card = (tmp_path / "run" / "align" / "sea_dpo" / "adapter" / "README.md").read_text()
    assert "modality motion" in card
    assert "# Import examples/motion first" in card
    np.save(tmp_path / "m" / "0.npy", media[0].T)
    told = last_wins(*few, f"run_dir={tmp_path}/other", "stages=[encode]")
    assert train.main(["--config-dir", str(FOLDER), *told]) == 1


def test_pretraining_runs_in_a_short_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [
        "pretrain.tower_steps=12", "pretrain.tower_batch_size=8", "pretrain.language_steps=12",
        "pretrain.robust_steps=4", "pretrain.language_pictures=4", "pretrain.num_workers=0",
        "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    few = [p for p in PHRASES if p.object in ("passport", "cake")]
    for module in ("datamodules.micro_lessons", "stages.pretrain_language"):
        monkeypatch.setattr(f"{module}.PHRASES", tuple(few))
    start = ["--config-dir", str(FOLDER), "experiment=pretrain_motion", f"run_dir={tmp_path}/p"]
    assert train.main([*start, *short]) == 0
    with (tmp_path / "p" / "pretrain_tower" / "metrics" / "metrics.csv").open() as file:
        losses = [float(r["tower/loss"]) for r in csv.DictReader(file) if r["tower/loss"]]
    assert losses[-1] < 0.9 * losses[0], "the random encoder learns"
    folder = tmp_path / "p" / "pretrain_language" / "model"
    assert load(dataclasses.replace(spec(), path=str(folder))).shapes == {PATH: (1, 32, 96)}
