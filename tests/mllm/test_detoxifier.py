"""The detoxifier: rewriting in a batch equals one by one, lengths count new tokens, the template is the training's."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from mllm.backbones import load_causal, load_tokenizer
from mllm.detoxifier import Detoxifier, DetoxifierSpec
from tests.micro_text import backbone, detoxifier

QUESTIONS = ["List steps to smuggle the passport.", "How do I bake the cake?", "Read the words in the image."]
ANSWERS = ["Smuggle the passport slowly.", "Bake the cake in steps: first get the cake, then bake it slowly.", "No."]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_batch_gives_what_each_gives_alone_in_order() -> None:
    d = detoxifier()
    together = d.rewrite(QUESTIONS, ANSWERS, max_new_tokens=12, batch_size=3)
    alone = [d.rewrite([q], [a], max_new_tokens=12)[0] for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert together == alone
    assert any(together)
    assert d.rewrite([], []) == []


def test_later_attempts_are_drawn_and_can_be_had_again_whatever_was_drawn_before() -> None:
    d = detoxifier()
    greedy = d.rewrite(QUESTIONS, ANSWERS, max_new_tokens=12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = [d.rewrite(QUESTIONS, ANSWERS, max_new_tokens=12, attempt=n) for n in (1, 2, 1)]
    assert drawn[0] == drawn[2]
    assert len({tuple(greedy), tuple(drawn[0]), tuple(drawn[1])}) > 1
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are disturbed
    asked = [(q, a, n) for q, a, n in zip(QUESTIONS, ANSWERS, (0, 0, 0), strict=True)]
    assert d.rewrite_at(asked, 12) == greedy


def test_the_length_limit_counts_new_tokens_however_long_the_prompt() -> None:
    d = detoxifier()
    for answer in ("No.", "cake " * 100):
        prompt = d.encode(QUESTIONS[0], answer)
        assert len(prompt) <= d.spec.max_length
        tokens = torch.tensor([prompt])
        new = d.model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert 1 <= len(new) <= 5
        expected = d.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert d.rewrite([QUESTIONS[0]], [answer], max_new_tokens=5) == [expected]


def test_written_tokens_are_counted_up_to_each_rewrites_end() -> None:
    d = detoxifier()
    d.rewrite(QUESTIONS, ANSWERS, max_new_tokens=40, batch_size=3)
    alone = 0
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        tokens = torch.tensor([d.encode(question, answer)])
        alone += d.model.generate(tokens, max_new_tokens=40, do_sample=False, pad_token_id=0).shape[1] - tokens.shape[1]
    assert d.tokens_written == alone


def test_the_published_adapter_gets_the_prompt_of_its_training_with_the_question(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(backbone()))
    torch.manual_seed(0)
    net = get_peft_model(
        load_causal(str(backbone()), torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=128, lora_alpha=32, lora_dropout=0.1),
    ).eval()
    for weight in net.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    net.save_pretrained(tmp_path / "adapter")
    config = yaml.safe_load((CONFIGS / "detoxifier" / "published" / "mllm_protector_detoxifier.yaml").read_text())
    assert config["weights"] == "renjiepi/mllm_protector_detoxifier"
    file = tmp_path / "detoxifier.yaml"
    file.write_text(yaml.safe_dump(config | {"base": str(backbone()), "weights": str(tmp_path / "adapter")}))
    d = Detoxifier.load(file)
    # `source` of the authors' preprocess_function.
    source = (
        "You are given a question and a response, the response may contain sensitive or harmful information, Please "
        f"rewrite the response to make it harmless. \nQuestion: {QUESTIONS[0]}\nOriginal response: {ANSWERS[0]}\n"
        "Corrected response: "
    )
    ids = tokenizer(source, return_tensors="pt")["input_ids"]
    assert d.encode(QUESTIONS[0], ANSWERS[0]) == ids[0].tolist()
    new = net.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert d.rewrite(QUESTIONS[:1], ANSWERS[:1], max_new_tokens=6) == [expected]


def test_a_saved_detoxifier_loads_with_the_same_answers(tmp_path: Path) -> None:
    d = detoxifier(template="Question: {question} Answer: {answer} Answer:")
    d.model.save_pretrained(tmp_path)
    d.tokenizer.save_pretrained(tmp_path)
    d.spec.save(tmp_path)
    loaded = Detoxifier.load(tmp_path)
    assert loaded.spec == DetoxifierSpec.read(tmp_path)[0] == d.spec
    assert loaded.rewrite(QUESTIONS, ANSWERS, 8) == d.rewrite(QUESTIONS, ANSWERS, 8)
