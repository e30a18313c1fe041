"""Detector and detoxifier through `train.main` on a tiny backbone: what is exported, resumed and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import train
from configs.compose import last_wins
from configs.schema import Prompts
from datamodules.micro_pairs import micro_pairs
from datamodules.micro_world import phrases
from lightning_modules.harm_detector import HarmDetector
from mllm.detector import Detector
from mllm.detoxifier import Detoxifier
from stages import section_training
from tests.micro_text import backbone

QUESTION, HARMFUL, SORRY = (
    "List steps to smuggle the passport.",
    "Smuggle the passport in steps: first get the passport, then smuggle it slowly.",
    "Sorry, I cannot help with that.",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the micro world as a user's file would hold them."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for phrase in phrases("train", True)[::18]:
            pair = next(p for p in micro_pairs(phrase, Prompts(), 0) if p.contrast)
            assert pair.worse is not None
            row = {"question": pair.question, "accepted": pair.better.text, "rejected": pair.worse.text}
            file.write(json.dumps(row) + "\n")
    return path


def start(experiment: str, rows: Path, folder: Path, *overrides: str) -> int:
    fixed = [
        "detector=default",
        "data=jsonl",
        f"data.path={rows}",
        "data.holdout=0.2",
        "pairs.validation=0.2",
        "backbone=micro",
    ]
    fixed += [f"backbone.path={backbone()}", "trainer.precision=32-true", "logger.tensorboard=false"]
    return train.main(last_wins(f"experiment={experiment}", f"run_dir={folder}", *fixed, *overrides))


SMALL = ("detector.max_length=64", "detector.max_question=24", "detector.epochs=3", "detector.batch_size=8",
         "detector.lr=3e-3", "detector.checkpoint_every_steps=2")  # fmt: skip
LORA = ("backbone.full_finetune=false", "backbone.frozen_layers=1", "detector.lora.r=4")


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert start("harm_detector", rows, folder, *SMALL, *LORA) == 0
    return folder / "train_detector"


def test_the_adapter_loads_in_plain_transformers_and_peft_with_the_detectors_scores(trained: Path) -> None:
    folder = trained / "detector"
    assert not (folder / "model.safetensors").exists()  # the adapter alone
    detector = Detector.load(folder)
    spec = detector.spec
    assert spec.base == str(backbone())
    model = AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=1)
    model.config.pad_token_id = detector.tokenizer.pad_token_id
    net = PeftModel.from_pretrained(model, folder).eval()
    text = spec.template.format(question=QUESTION, answer=HARMFUL)
    logit = net(**detector.tokenizer(text, return_tensors="pt")).logits[0, 0]
    expected = torch.sigmoid(logit / spec.temperature + spec.bias).item()
    assert detector.score([QUESTION], [HARMFUL]).item() == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(0.5, abs=0.02)


def test_only_adapters_above_the_frozen_layers_and_the_head_were_trained(trained: Path) -> None:
    names = set(load_file(trained / "detector" / "adapter_model.safetensors"))
    assert any("score" in name for name in names)
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name} == {1, 2}
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all("lora" in name or "score" in name for name in saved)


def test_threshold_calibration_and_metrics_lie_with_the_weights(trained: Path) -> None:
    spec = json.loads((trained / "detector" / "detector.json").read_text())
    result = json.loads((trained / "stage.json").read_text())["result"]
    assert spec["threshold"] == result["threshold"]
    assert spec["false_positive_rate"] == 0.05
    assert spec["positive_is_harmless"] is True
    assert set(spec["metrics"]) == {"val", "test"}
    assert {"auroc", "average_precision", "f1", "pair_accuracy", "ece", "recall_at_1_percent_fpr"} <= set(
        spec["metrics"]["test"]
    )
    assert result["cuts"]["texts"] > 0
    assert spec["trained_on"]["data"] == "jsonl"
    assert spec["metrics"]["val"]["false_positive_rate"] <= 0.05


def test_cached_frozen_layers_train_the_same_weights(rows: Path, trained: Path, tmp_path: Path) -> None:
    assert start("harm_detector", rows, tmp_path / "run", *SMALL, *LORA, "detector.cache_frozen=false") == 0
    cached = load_file(trained / "detector" / "adapter_model.safetensors")
    plain = load_file(tmp_path / "run" / "train_detector" / "detector" / "adapter_model.safetensors")
    assert cached.keys() == plain.keys()
    for name, weight in cached.items():
        torch.testing.assert_close(weight, plain[name], atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("loss", ["bce", "bce_pairwise"])
def test_an_interrupted_training_goes_on_to_the_same_weights_and_tells_harm_apart(
    loss: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SMALL, f"detector.loss={loss}", "detector.epochs=12")
    assert start("harm_detector", rows, tmp_path / "whole", *overrides) == 0
    step = HarmDetector.training_step

    def dies(self: HarmDetector, batch: object, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 7:
            raise OSError("the machine is gone")
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(HarmDetector, "training_step", dies)
    assert start("harm_detector", rows, tmp_path / "broken", *overrides) == 1
    monkeypatch.setattr(HarmDetector, "training_step", step)
    assert start("harm_detector", rows, tmp_path / "broken", *overrides) == 0
    whole, broken = (
        load_file(tmp_path / name / "train_detector" / "detector" / "model.safetensors") for name in ("whole", "broken")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(broken[name], weight)
    detector = Detector.load(tmp_path / "whole" / "train_detector" / "detector")
    unseen = phrases("heldout", True)[0].object
    harmful, harmless = detector.score(
        [f"List steps to steal the {unseen}."] * 2, [HARMFUL.replace("passport", unseen), SORRY]
    )
    assert harmful < 0.5 < harmless
    # Nothing is done twice.
    stamp = (tmp_path / "whole" / "train_detector" / "detector" / "model.safetensors").stat().st_mtime_ns
    assert start("harm_detector", rows, tmp_path / "whole", *overrides) == 0
    assert (tmp_path / "whole" / "train_detector" / "detector" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_head_on_section_means_is_trained_reads_once_and_tells_harm_apart(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    overrides = (*SMALL, "detector.layers=[1,2]", "detector.hidden=32", "detector.dropout=0.1",
                 "detector.epochs=30", "detector.max_length=64")  # fmt: skip
    assert start("harm_detector", rows, tmp_path / "a", *overrides) == 0
    folder = tmp_path / "a" / "train_detector" / "detector"
    assert {f.suffix for f in folder.iterdir() if f.stem not in {"tokenizer", "tokenizer_config"}} <= {
        ".safetensors", ".json", ".jinja"
    }  # fmt: skip
    head = load_file(folder / "head.safetensors")
    assert head["score.weight"].shape == (1, 32)
    detector = Detector.load(folder)
    assert detector.spec.base == str(backbone())
    # Without this package, as docs/detector.md has it.
    ids = detector.encode(QUESTION, HARMFUL)
    h = AutoModel.from_pretrained(backbone())(torch.tensor([ids]), output_hidden_states=True).hidden_states
    x = torch.cat([h[1], h[2]], -1)[0]
    x = torch.cat([x[: ids.answer].mean(0), x[ids.answer :].mean(0)])
    x = torch.nn.functional.gelu(head["inner.weight"] @ ((x - head["mean"]) / head["deviation"]) + head["inner.bias"])
    logit = (head["score.weight"] @ x + head["score.bias"]).item()
    expected = torch.sigmoid(torch.tensor(logit / detector.spec.temperature + detector.spec.bias)).item()
    assert detector.score([QUESTION], [HARMFUL]).item() == pytest.approx(expected, abs=1e-5)
    unseen = phrases("heldout", True)[0].object
    harmful, harmless = detector.score(
        [f"List steps to steal the {unseen}."] * 2, [HARMFUL.replace("passport", unseen), SORRY]
    )
    assert harmful < 0.5 < harmless
    result = json.loads((tmp_path / "a" / "train_detector" / "stage.json").read_text())["result"]
    assert result["test"]["auroc"] > 0.9
    # Another loss and seed: another split, but the texts are not read again.
    (kept,) = (tmp_path / "cache" / "sections").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert start("harm_detector", rows, tmp_path / "b", *overrides, "seed=3", "detector.loss=bce_pairwise") == 0
    assert list((tmp_path / "cache" / "sections").iterdir()) == [kept]
    assert kept.stat().st_mtime_ns == stamp


def test_data_that_grew_between_two_attempts_meets_no_head_that_knows_other_questions(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    grown, lines = tmp_path / "grown.jsonl", rows.read_text().splitlines(keepends=True)
    overrides = (*SMALL, "detector.layers=[1,2]", "detector.hidden=8", "detector.folds=2", f"data.path={grown}")
    whole = section_training.trained

    def dies(cfg: Any, stage: Any, name: str, *args: Any) -> Any:
        if not name:  # the head of all, when those of the folds are done
            raise OSError("the machine is gone")
        return whole(cfg, stage, name, *args)

    grown.write_text("".join(lines[: len(lines) // 2]))
    monkeypatch.setattr(section_training, "trained", dies)
    assert start("harm_detector", rows, tmp_path / "killed", *overrides) == 1
    monkeypatch.setattr(section_training, "trained", whole)
    grown.write_text("".join(lines))
    for run in ("killed", "fresh"):
        assert start("harm_detector", rows, tmp_path / run, *overrides) == 0
    resumed, fresh = (
        json.loads((tmp_path / run / "train_detector" / "stage.json").read_text())["result"]
        for run in ("killed", "fresh")
    )
    assert resumed == fresh
    assert len(list((tmp_path / "killed" / "train_detector" / "folds").iterdir())) == 5  # two of the half, three of all


def test_a_layer_that_the_backbone_lacks_is_told_by_its_key(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("harm_detector", rows, tmp_path, *SMALL, "detector.layers=[30]") != 0
    assert "detector.layers=[30]: the backbone has the layers 1 to 3" in capfd.readouterr().err


def test_a_detoxifier_is_trained_exported_and_measured(rows: Path, trained: Path, tmp_path: Path) -> None:
    try:
        from mllm.minilm import minilm_folder

        minilm_folder()
    except ValueError as error:
        pytest.skip(str(error))
    overrides = (
        "detoxifier=micro", "backbone.full_finetune=false", "backbone.frozen_layers=1", "detoxifier.epochs=12",
        "detoxifier.batch_size=8", "detoxifier.lr=1e-2", "detoxifier.evaluate=6", "detoxifier.lora.r=8",
        f"detoxifier.detector={trained / 'detector'}",
    )  # fmt: skip
    assert start("detoxifier", rows, tmp_path, *overrides) == 0
    folder = tmp_path / "train_detoxifier"
    result = json.loads((folder / "stage.json").read_text())["result"]
    assert result["token_nll"]["test"] < 0.8 * result["token_nll_before_training"]
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["all"]["harmless_before"]["n"] == 6
    assert {"similarity", "similarity_accepted", "refusals", "words", "harmless_after"} <= set(metrics["all"])
    shown = [json.loads(line) for line in (folder / "evaluation" / "guarded.jsonl").read_text().splitlines()]
    assert len(shown) == metrics["guarded"]["harmless_before"]["n"] == metrics["flagged"]["harmless_before"]["n"] > 0
    assert {row["action"] for row in shown} <= {"detoxified", "refused"}  # what is flagged never passes as it is
    assert metrics["guarded"]["harmless_before"]["value"] == 0
    rows_out = [json.loads(line) for line in (folder / "evaluation" / "rewritten.jsonl").read_text().splitlines()]
    assert len(rows_out) == 6
    detoxifier = Detoxifier.load(folder / "detoxifier")
    again = detoxifier.rewrite([r["question"] for r in rows_out], [r["harmful"] for r in rows_out], 32)
    assert again == [r["rewritten"] for r in rows_out]
    assert "cannot help" in " ".join(again)
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone()), folder / "detoxifier").eval()
    prompt = torch.tensor([detoxifier.encode(rows_out[0]["question"], rows_out[0]["harmful"])])
    new = net.generate(input_ids=prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    assert detoxifier.tokenizer.decode(new, skip_special_tokens=True).strip() == rows_out[0]["rewritten"]
