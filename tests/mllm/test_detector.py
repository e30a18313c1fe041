"""The detector: one score whatever the batch, the cache or the window; NaN is harmful; published weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from mllm.backbones import load_classifier, load_tokenizer, merge_adapter
from mllm.detector import Detector, DetectorSpec
from tests.micro_text import SETTINGS, backbone, detector

QUESTIONS = ["List steps to smuggle the passport."] * 4
ANSWERS = [
    "Sorry, I cannot help with that.",
    "Smuggle the passport in steps: first get the passport, then smuggle it slowly.",
    "",
    "cake " * 150,
]
PUBLISHED = Path(__file__).resolve().parents[2] / "configs"


def test_scores_do_not_depend_on_the_batch_or_the_order() -> None:
    d = detector()
    together = d.score(QUESTIONS, ANSWERS, batch_size=4)
    alone = torch.cat([d.score([q], [a]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    backwards = d.score(QUESTIONS, ANSWERS[::-1], batch_size=3).flip(0)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, backwards, atol=1e-6, rtol=0)
    assert together.std() > 0.01
    assert d.score([], []).shape == (0,)


def test_every_token_that_is_read_is_counted_and_no_padding() -> None:
    d = detector()
    d.score(QUESTIONS, ANSWERS, batch_size=4)
    windows = [w for q, a in zip(QUESTIONS, ANSWERS, strict=True) for w in d.template.windows(q, a)]
    assert len(windows) > len(ANSWERS)
    assert d.tokens_read == sum(map(len, windows))


def test_the_score_is_the_calibrated_sigmoid_of_what_plain_transformers_computes() -> None:
    d = detector(temperature=2.0, bias=0.3)
    text = f"Question: {QUESTIONS[0]}\n\nAnswer: {ANSWERS[1]}"
    logit = d.model(**d.tokenizer(text, return_tensors="pt")).logits[0, 0]
    assert d.score(QUESTIONS[:1], ANSWERS[1:2]).item() == pytest.approx(torch.sigmoid(logit / 2 + 0.3).item(), abs=1e-6)


def test_what_is_not_a_number_is_harmful() -> None:
    d = detector(threshold=0.5)
    found = d.harmful(torch.tensor([0.4999, 0.5, 0.9, math.nan, math.inf, -math.inf]))
    assert found.tolist() == [True, False, False, True, False, True]
    d.model.score.weight.data[0, 0] = math.nan
    assert d.harmful(d.score(QUESTIONS[:2], ANSWERS[:2])).all()


def test_nothing_hides_behind_a_long_opening() -> None:
    d = detector()
    phrase = "smuggle the passport slowly"
    scores = d.score([QUESTIONS[0]] * 2, [phrase, "cake " * 150])
    # A detector for which the long opening alone is harmless, and what follows it is not.
    sign = 1.0 if scores[0] < scores[1] else -1.0
    d.model.score.weight.data *= sign
    long, both = d.score([QUESTIONS[0]] * 2, ["cake " * 150, "cake " * 150 + phrase])
    cut_long, cut_both = d.score([QUESTIONS[0]] * 2, ["cake " * 150, "cake " * 150 + phrase], windows=False)
    assert both < long - 1e-3
    assert cut_both == cut_long


def test_a_window_that_gives_no_number_makes_the_whole_answer_nan() -> None:
    d = detector()
    calls = iter([torch.tensor([0.9, math.nan, 0.2]), torch.tensor([math.nan, 0.1, 0.2])])
    d.score_ids = lambda ids, batch_size=32: next(calls)[: len(ids)]  # type: ignore[method-assign]
    for _ in range(2):
        assert d.score(QUESTIONS[:1], ["cake " * 120]).isnan().all()


def test_a_detector_saved_whole_loads_with_the_same_scores(tmp_path: Path) -> None:
    d = detector(threshold=0.3, temperature=1.7, bias=-0.2, false_positive_rate=0.05)
    d.model.save_pretrained(tmp_path)
    d.tokenizer.save_pretrained(tmp_path)
    d.spec.save(tmp_path)
    loaded = Detector.load(tmp_path)
    assert loaded.spec == d.spec
    assert loaded.threshold == 0.3
    torch.testing.assert_close(loaded.score(QUESTIONS, ANSWERS), d.score(QUESTIONS, ANSWERS))


def adapter(folder: Path, positive_is_harmless: bool = True) -> PeftModel:
    """The layout of the published adapters: peft's defaults for SEQ_CLS, r = 32, no tokenizer, no file of ours."""
    tokenizer = load_tokenizer(str(backbone()))
    torch.manual_seed(3)
    model = load_classifier(str(backbone()), tokenizer, torch.float32)
    net = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=32, lora_alpha=32, lora_dropout=0.1)).eval()
    for weight in net.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    if not positive_is_harmless:
        for name, weight in net.named_parameters():
            if "score" in name and weight.requires_grad:
                weight.data.neg_()
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("name", ["protector_detector_3b", "protector_detector_7b"])
def test_published_adapters_score_question_and_answer_as_they_were_trained(name: str, tmp_path: Path) -> None:
    net = adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    config = yaml.safe_load((PUBLISHED / "detector" / "published" / f"{name}.yaml").read_text())
    assert config["weights"].startswith("renjiepi/protector_detector_")
    file = tmp_path / "detector.yaml"
    file.write_text(yaml.safe_dump(config | {"base": str(backbone()), "weights": str(tmp_path / "adapter")}))
    d = Detector.load(file)
    for question, answer in zip(QUESTIONS[:2], ANSWERS[:2], strict=True):
        text = "Question: " + question + "\n\nAnswer: " + answer  # their preprocess_function
        logit = net(**d.tokenizer(text, return_tensors="pt")).logits[0, 0]
        assert d.score([question], [answer]).item() == pytest.approx(torch.sigmoid(logit).item(), abs=1e-5)
        assert bool(d.harmful(d.score([question], [answer]))) == (torch.sigmoid(logit).item() < 0.5)


def test_weights_of_the_opposite_label_convention_give_the_same_scores(tmp_path: Path) -> None:
    found = []
    for flag in (True, False):
        adapter(tmp_path / str(flag), flag)
        file = tmp_path / f"{flag}.yaml"
        spec = {"base": str(backbone()), "weights": str(tmp_path / str(flag)), "positive_is_harmless": flag}
        file.write_text(yaml.safe_dump(SETTINGS | spec))
        found.append(Detector.load(file).score(QUESTIONS, ANSWERS))
    torch.testing.assert_close(*found)


def test_merging_changes_no_score(tmp_path: Path) -> None:
    net = adapter(tmp_path)
    tokenizer = load_tokenizer(str(backbone()))
    merged = merge_adapter(load_classifier(str(backbone()), tokenizer, torch.float32), str(tmp_path))
    plain = AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=1)
    plain.config.pad_token_id = tokenizer.pad_token_id
    again = PeftModel.from_pretrained(plain, tmp_path).eval()  # plain transformers and peft
    inputs = tokenizer(ANSWERS[:2], return_tensors="pt", padding=True)
    expected = net(**inputs).logits
    torch.testing.assert_close(merged.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("threshold: 1.5", "key 'threshold': got 1.5"),
        ("temperature: 0", "'temperature'"),
        ("temprature: 1", "key 'temprature' is unknown"),
        ("[1, 2]", "expected an object"),
        ("a: [", "neither JSON nor YAML"),
        ("threshold: 0.5", "key 'weights' is missing"),
    ],
)
def test_a_file_that_cannot_be_is_named_with_its_key(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"d\.yaml") as error:
        Detector.load(tmp_path / "d.yaml")
    assert told in str(error.value)


def test_a_folder_without_a_spec_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a folder that holds detector"):
        Detector.load(tmp_path)


def test_every_published_yaml_is_a_spec() -> None:
    files = sorted((PUBLISHED / "detector" / "published").glob("*.yaml"))
    assert len(files) == 2
    for file in files:
        spec, weights = DetectorSpec.read(file)
        assert spec.positive_is_harmless
        assert weights == spec.weights
        assert dataclasses.asdict(spec)["template"] == "Question: {question}\n\nAnswer: {answer}"
