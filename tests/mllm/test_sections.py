"""A head on section means: what it averages, that padding and batches change nothing, that what is cut off is."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, LlamaConfig

from mllm.detector import HEAD, Detector
from mllm.qa_text import QAIds
from mllm.sections import SectionClassifier, SectionHead
from tests.mllm.guard_world import SHAPE, section_detector, tokenizer, words

QUESTIONS = ["w1 w2 ?", "w3 ?", "", "w4 " * 20]
ANSWERS = [words(20), words(3, 1), words(9, 2), ""]


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_score_is_made_of_the_means_of_the_whole_models_hidden_states(family: str) -> None:
    torch.manual_seed(0)
    tok, shape = tokenizer(), {**SHAPE, "num_hidden_layers": 3, "vocab_size": len(tokenizer()), "pad_token_id": 0}
    config = LlamaConfig(**shape) if family == "decoder" else BertConfig(**shape)
    whole = AutoModel.from_config(config).eval()
    again = AutoModel.from_config(copy.deepcopy(config)).eval()
    again.load_state_dict(whole.state_dict())
    model = SectionClassifier(again, [1, 2], SectionHead(4 * 48, 8)).eval()
    ids = QAIds(tok("Question : w1 w2 Answer : w3 w4 w5")["input_ids"], 5)
    with torch.no_grad():
        states = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states
    h = torch.cat([states[1], states[2]], dim=-1)[0]
    expected = torch.cat([h[:5].mean(0), h[5:].mean(0)])
    torch.testing.assert_close(model.pooled_texts([ids], 0)[0], expected)
    longer = QAIds([*ids, *ids, *ids], 5)
    torch.testing.assert_close(model.pooled_texts([longer, ids], 0)[1], expected, atol=1e-5, rtol=1e-4)
    assert model.config.num_hidden_layers == 2
    assert sum("layer" in name for name, _ in model.backbone.named_parameters()) < sum(
        "layer" in name for name, _ in whole.named_parameters()
    )


def test_standardised_means_have_mean_0_and_deviation_1() -> None:
    pooled = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    head = SectionHead(6, 4)
    head.standardise(pooled)
    x = (pooled - head.mean) / head.deviation
    torch.testing.assert_close(x.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(6))
    constant = torch.ones(50, 6)
    head.standardise(constant)
    assert head(constant).isfinite().all()


def test_scores_do_not_depend_on_the_batch_and_an_empty_answer_has_one() -> None:
    d = section_detector()
    together = d.score(QUESTIONS, ANSWERS)
    alone = torch.cat([d.score([q], [a]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 1e-3
    assert together.isfinite().all()


def test_the_same_words_as_question_or_answer_score_differently() -> None:
    d = section_detector()
    first, second = d.score(["w1 w2 ?", "w7 w8 w9"], ["w7 w8 w9", "w1 w2 ?"])
    assert abs(first - second) > 1e-4


def test_threads_may_share_a_model() -> None:
    d = section_detector()
    expected = d.score(QUESTIONS, ANSWERS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: d.score(QUESTIONS, ANSWERS), range(24)):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layers", [[], [0], [4], [1, 9]])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers: list[int]) -> None:
    backbone = AutoModel.from_config(LlamaConfig(vocab_size=20, **{**SHAPE, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="layers 1 to 3"):
        SectionClassifier(backbone, layers, SectionHead(10, 4))


def test_a_head_made_for_another_backbone_is_refused_before_anything_is_scored() -> None:
    backbone = AutoModel.from_config(LlamaConfig(vocab_size=20, **{**SHAPE, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"takes 192 means, layers=\[1\] of the backbone give 96"):
        SectionClassifier(backbone, [1], SectionHead(192, 4))


def test_a_saved_detector_loads_with_the_same_scores_and_a_broken_head_is_named(tmp_path: Path) -> None:
    d = section_detector()
    assert isinstance(d.model, SectionClassifier)
    base = tmp_path / "base"
    d.model.backbone.save_pretrained(base)  # cut off already: it has two layers
    d.tokenizer.save_pretrained(base)
    folder = tmp_path / "detector"
    folder.mkdir()
    d.tokenizer.save_pretrained(folder)
    save_file(dict(d.model.head.state_dict()), folder / HEAD)
    type(d.spec)(**{**vars(d.spec), "base": str(base)}).save(folder)
    loaded = Detector.load(folder)
    torch.testing.assert_close(loaded.score(QUESTIONS, ANSWERS), d.score(QUESTIONS, ANSWERS))
    type(d.spec)(**{**vars(d.spec), "base": str(base), "hidden": 17}).save(folder)
    with pytest.raises(ValueError, match=r"head\.safetensors: does not fit"):
        Detector.load(folder)
    (folder / HEAD).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"head\.safetensors: cannot be read"):
        Detector.load(folder)
