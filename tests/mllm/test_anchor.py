"""The anchor on tiny random models of every family. The decisive test is the swap: E of a random real input, injected
over a blank, gives exactly the ordinary forward of that input. (Injecting the blank's own E over it proves nothing.)
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm.anchor import Anchor
from mllm.branches import Branch, BranchForward, Item
from tests.mllm.families import BY_NAME, FAMILIES, Family, near, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's
NO_CHECKPOINTING = {"granite_speech"}  # transformers: "does not support activation checkpointing"


@dataclass
class Case:
    family: Family
    model: Any
    anchor: Anchor

    def prompts(self, n: int, seed: int = 7) -> dict[str, Tensor]:
        return self.family.text(torch.stack([self.family.prefix(seed=seed + i) for i in range(n)]))

    def blanks(self, n: int) -> dict[str, Tensor]:
        return self.family.media(n)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, *request.param.recorded())


@pytest.fixture(scope="module")
def llava() -> Case:
    return Case(BY_NAME["llava"], *BY_NAME["llava"].recorded())


def poison(anchor: Anchor) -> list[tuple[Tensor, Tensor]]:
    """Fills the weights of the bypassed modules with NaN; returns what they were."""
    weights = [(p, p.data.clone()) for module in anchor.encoder_modules.values() for p in module.parameters()]
    for parameter, _ in weights:
        parameter.data.fill_(float("nan"))
    return weights


def concatenate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {path: torch.cat([item[path] for item in items]) for path in items[0]}


# ------------------------------------------------------------------------------------------------ every family
@torch.no_grad()
def test_real_media_injected_over_a_blank_give_the_logits_of_the_real_media(case: Case) -> None:
    prompt, real = case.prompts(1), case.family.real()
    expected, blank = case.model(**prompt, **real).logits, case.model(**prompt, **case.blanks(1)).logits
    E = case.anchor.observe(**prompt, **real)
    with case.anchor.inject(E):
        got = case.model(**prompt, **case.blanks(1)).logits
        assert torch.equal(case.model(**prompt, **case.anchor.media_inputs(1)).logits, got)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (expected - blank).abs().max() > 1e-2


@torch.no_grad()
def test_the_encoder_does_not_run_under_injection(case: Case) -> None:
    E, inputs = near(case.anchor, 1), case.prompts(1) | case.blanks(1)
    with case.anchor.inject(E):
        expected = case.model(**inputs).logits
    weights = poison(case.anchor)
    try:
        with case.anchor.inject(E):
            assert torch.equal(case.model(**inputs).logits, expected)
        assert weights
        assert not torch.isfinite(case.model(**inputs).logits).all(), "the poison is not where the encoder is"
    finally:
        for parameter, data in weights:
            parameter.data = data


def test_only_E_gets_a_gradient_and_all_of_it(case: Case) -> None:
    E = near(case.anchor, 2)
    encoder = [p.requires_grad_() for module in case.anchor.encoder_modules.values() for p in module.parameters()]
    try:
        with case.anchor.inject(E):
            case.model(**case.prompts(1), **case.blanks(1)).logits.logsumexp(-1).sum().backward()
        assert all(p.grad is None for p in case.model.parameters())
    finally:
        for parameter in encoder:
            parameter.requires_grad_(False)
    for path, e in E.items():
        assert torch.isfinite(e.grad).all(), path
        assert (e.grad.abs().flatten(1).sum(1) > 0).all(), f"{path}: a slice of E is not used"


@torch.no_grad()
def test_three_items_in_a_batch_equal_three_alone(case: Case) -> None:
    prompts, Es = case.prompts(3), [near(case.anchor, seed) for seed in range(3)]
    alone = []
    for i, E in enumerate(Es):
        with case.anchor.inject(E):
            alone.append(
                case.model(**{k: v[i : i + 1] for k, v in prompts.items()}, **case.anchor.media_inputs(1)).logits
            )
    with case.anchor.inject(concatenate(Es), batch_size=3):
        together = case.model(**prompts, **case.anchor.media_inputs(3)).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@torch.no_grad()
def test_rows_without_media_may_be_in_the_batch(case: Case) -> None:
    prompts, Es = case.prompts(3), [near(case.anchor, seed) for seed in range(2)]
    prompts["input_ids"][1, prompts["input_ids"][1] >= 100] = 50
    prompts = case.family.text(prompts["input_ids"])
    text = case.model(**{k: v[1:2] for k, v in prompts.items()}).logits
    with case.anchor.inject(Es[1]):
        third = case.model(**{k: v[2:] for k, v in prompts.items()}, **case.anchor.media_inputs(1)).logits
    with case.anchor.inject(concatenate(Es), batch_size=2):
        mixed = case.model(**prompts, **case.anchor.media_inputs(2)).logits
    torch.testing.assert_close(mixed[1:], torch.cat([text, third]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_under_injection_equals_the_ordinary_one(case: Case) -> None:
    prompts, real, how = case.prompts(2), case.family.real(2), {"max_new_tokens": 6, "do_sample": False}
    expected = case.model.generate(**prompts, **real, **how)
    E = case.anchor.observe(**prompts, **real)
    with case.anchor.inject(E, batch_size=2):
        got = case.model.generate(**prompts, **case.anchor.media_inputs(2), **how)
    assert got.tolist() == expected.tolist()
    after = case.model(**prompts, **real).logits
    assert torch.isfinite(after).all()


@torch.no_grad()
def test_observe_gives_the_projector_input_without_running_the_projector(case: Case) -> None:
    prompts, real = case.prompts(2), case.family.real(2)
    seen = []
    handle = case.model.get_submodule(case.anchor.projectors[-1]).register_forward_hook(lambda *_: seen.append(True))
    try:
        for path, e in case.anchor.observe(**case.family.blank()).items():
            assert torch.equal(e, case.anchor.E0_by_path[path])
        assert not seen
    finally:
        handle.remove()
    both = case.anchor.observe(**prompts, **real)
    for path, e0 in case.anchor.E0_by_path.items():
        assert both[path].shape == (2 * e0.shape[0], *e0.shape[1:])
        assert not torch.equal(*both[path].chunk(2))


def test_under_peft_only_E_and_the_adapter_learn(case: Case) -> None:
    bare = copy.deepcopy(case.model)
    before = Anchor(bare, case.family.projector)
    before.record(**case.family.blank())
    model = with_lora(bare)
    after = Anchor(model, case.family.projector)
    after.record(**case.family.blank())
    grads = []
    for anchor in (before, after):
        model.zero_grad()
        E = near(anchor, 3)
        with anchor.inject(E):
            model(**case.prompts(1), **anchor.media_inputs(1)).logits.logsumexp(-1).sum().backward()
        learning = {name for name, p in model.named_parameters() if p.grad is not None}
        assert learning
        assert all("lora_" in name for name in learning)
        grads.append(E)
    for path, e in grads[0].items():
        assert e.grad.abs().max() > 0
        assert torch.equal(e.grad, grads[1][path].grad)


def test_bf16_model_with_an_fp32_master_of_E(case: Case) -> None:
    model = copy.deepcopy(case.model).bfloat16()
    anchor = Anchor(model, case.family.projector)
    prompt = case.prompts(1)
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.family.blank().items()}
    real = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.family.real().items()}
    anchor.record(**halved)
    assert all(e.dtype == torch.bfloat16 for e in anchor.E0_by_path.values())
    E = {path: e.float().requires_grad_() for path, e in anchor.observe(**prompt, **real).items()}
    with torch.no_grad():
        expected = model(**prompt, **real).logits
    with anchor.inject(E):
        got = model(**prompt, **anchor.media_inputs(1)).logits
    assert torch.equal(got, expected)
    got.float().logsumexp(-1).sum().backward()
    assert all(e.grad.dtype == torch.float32 and e.grad.abs().max() > 0 for e in E.values())


def test_offloaded_encoder_with_gradient_checkpointing_gives_the_same_gradient(case: Case) -> None:
    def gradient(model: Any, anchor: Anchor) -> list[Tensor]:
        E = near(anchor, 4)
        with anchor.inject(E):
            model(**case.prompts(1), **anchor.media_inputs(1)).logits.logsumexp(-1).sum().backward()
        return [e.grad for e in E.values()]

    expected = gradient(case.model, case.anchor)
    model = copy.deepcopy(case.model)
    anchor = Anchor(model, case.family.projector)
    anchor.record(**case.family.blank())
    size = sum(p.numel() * p.element_size() for module in anchor.encoder_modules.values() for p in module.parameters())
    assert anchor.offload_encoder() == size > 0
    assert sum(p.numel() for module in anchor.encoder_modules.values() for p in module.parameters()) == 0
    assert anchor.offload_encoder() == 0
    if case.family.name not in NO_CHECKPOINTING:
        model.train()
        model.activation_checkpointing_enable()
    for got, want in zip(gradient(model, anchor), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), anchor.inject(near(anchor, 4)):
        how = {"max_new_tokens": 3, "do_sample": False}
        assert (
            model.eval().generate(**case.prompts(1), **anchor.media_inputs(1), **how).shape[1]
            > case.prompts(1)["input_ids"].shape[1]
        )
    for call in (anchor.record, anchor.observe):
        with pytest.raises(RuntimeError, match="load the model again"):
            call(**case.family.blank())


# ------------------------------------------------------------------------------------------------ recording
def test_a_wrong_projector_path_lists_close_matches(llava: Case) -> None:
    with pytest.raises(
        ValueError, match=r"no module 'multi_modal_projector'; did you mean 'model.multi_modal_projector'"
    ):
        Anchor(llava.model, "multi_modal_projector")
    with pytest.raises(ValueError, match=r"did you mean 'model.multi_modal_projector'"):
        Anchor(with_lora(copy.deepcopy(llava.model)), ["model.multimodal_projector"])


def test_a_projector_that_is_never_called_is_an_error(llava: Case) -> None:
    anchor = Anchor(llava.model, llava.family.projector)
    with pytest.raises(ValueError, match=r"'model.multi_modal_projector' was never called.*attention_mask"):
        anchor.record(**llava.prompts(1) | {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)})
    with pytest.raises(ValueError, match="nothing recorded yet"):
        anchor.E0  # noqa: B018


def test_a_projector_that_is_called_twice_is_an_error() -> None:
    family = BY_NAME["onevision_image"]
    model = family.model()
    ids = torch.cat([family.prefix(), BY_NAME["onevision_video"].prefix()])[None]
    media = family.media(1) | BY_NAME["onevision_video"].media(1)
    with pytest.raises(ValueError, match=r"called 2 times, expected once.*ONE blank item of the one modality"):
        Anchor(model, family.projector).record(**family.text(ids), **media)


def test_recording_takes_one_item(llava: Case) -> None:
    with pytest.raises(ValueError, match=r"one blank item; got \(2, 24\)"):
        Anchor(llava.model, llava.family.projector).record(**llava.prompts(2), **llava.blanks(2))


def test_missing_token_types_are_an_error_where_the_family_reads_them() -> None:
    family = BY_NAME["gemma3"]
    inputs = {k: v for k, v in family.blank().items() if k != "token_type_ids"}
    with pytest.raises(ValueError, match="reads token_type_ids"):
        Anchor(family.model(), family.projector).record(**inputs)


@pytest.mark.parametrize("name", ["qwen2_vl_video", "gemma3", "paligemma", "llava"])
def test_token_types_are_learnt_from_the_blank(name: str) -> None:
    family = BY_NAME[name]
    _, anchor = family.recorded()
    ids = torch.stack([family.prefix(seed=8), family.prefix(seed=9)])
    expected = {k: v for k, v in family.text(ids).items() if k.endswith("type_ids")}
    got = anchor.type_inputs(ids)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in got)


def test_what_gets_round_the_projector_is_kept_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Qwen3-VL has three projectors; with one of them the blank is still the blank, and the log names the others."""
    family = BY_NAME["qwen3_vl_image"]
    model = family.model()
    anchor = Anchor(model, "model.visual.merger")
    with caplog.at_level(logging.WARNING, logger="mllm.anchor"):
        expected = anchor.record(**family.blank()).logits
    assert "model.visual.deepstack_merger_list.0" in caplog.text
    assert "blocks" not in caplog.text
    with torch.no_grad(), anchor.inject(anchor.E0):
        torch.testing.assert_close(model(**family.blank()).logits, expected, rtol=0, atol=1e-5)


def test_recording_twice_and_in_training_mode_changes_nothing(llava: Case) -> None:
    model = copy.deepcopy(llava.model).train()
    model.model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    anchor = Anchor(model, llava.family.projector)
    for _ in range(2):
        anchor.record(**llava.family.blank())
        assert torch.equal(anchor.E0, llava.anchor.E0)
    assert [m.training for m in model.modules()] == modes


# ------------------------------------------------------------------------------------------------ injecting
def test_E_that_does_not_fit_is_an_error_with_both_shapes(llava: Case) -> None:
    E0 = llava.anchor.E0
    wrong = {
        r"shape \(1, 15, 24\), expected \(1, 16, 24\)": (E0[:, :-1], 1),
        r"shape \(3, 16, 24\), expected \(2, 16, 24\)": (torch.cat([E0] * 3), 2),
        r"shape \(16, 24\), expected \(1, 16, 24\)": (E0[0], 1),
        r"torch.int64, expected a floating point": (E0.long(), 1),
        r"has the paths \['other'\], expected \['model.multi_modal_projector'\]": ({"other": E0}, 1),
    }
    for message, (E, n) in wrong.items():
        with pytest.raises(ValueError, match=message), llava.anchor.inject(E, n):
            pass
    _, deep = BY_NAME["qwen3_vl_image"].recorded()
    with pytest.raises(ValueError, match="one tensor for 3 projectors"), deep.inject(next(iter(deep.E0.values()))):
        pass
    with pytest.raises(ValueError, match="has the paths"), deep.inject(dict(list(deep.E0.items())[:2])):
        pass


def test_inject_inside_inject_is_an_error_and_leaves_the_outer_one_whole(llava: Case) -> None:
    E, inputs = near(llava.anchor, 5), llava.prompts(1) | llava.blanks(1)
    with torch.no_grad(), llava.anchor.inject(E):
        expected = llava.model(**inputs).logits
        for call in (lambda: llava.anchor.record(**inputs), lambda: llava.anchor.observe(**inputs)):
            with pytest.raises(RuntimeError, match="inside inject"):
                call()
        with pytest.raises(RuntimeError, match="already inside inject"), llava.anchor.inject(E):
            pass
        assert torch.equal(llava.model(**inputs).logits, expected)


def test_hooks_are_gone_after_an_error_in_the_forward(llava: Case) -> None:
    inputs = llava.prompts(1) | llava.blanks(1)

    def hooks() -> list[tuple]:
        return [(*m._forward_pre_hooks, *m._forward_hooks, "forward" in m.__dict__) for m in llava.model.modules()]

    expected, before = llava.model(**inputs).logits, hooks()
    with pytest.raises(ValueError, match="do not match"), llava.anchor.inject(near(llava.anchor, 6)):
        llava.model(**inputs | {"input_ids": torch.full_like(inputs["input_ids"], 150)})
    assert torch.equal(llava.model(**inputs).logits, expected)
    assert hooks() == before
    assert not any(own_forward for *_, own_forward in before)


def test_a_forward_that_another_library_put_on_the_encoder_is_put_back(llava: Case) -> None:
    tower = llava.model.model.vision_tower
    tower.forward = ours = tower.forward
    try:
        with llava.anchor.inject(llava.anchor.E0):
            assert tower.forward is not ours
        assert tower.forward is ours
    finally:
        del tower.forward


def test_injecting_does_not_walk_the_model(llava: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(*_: object, **__: object) -> None:
        raise AssertionError("walked over all modules for one injection")

    for name in ("named_modules", "modules"):
        monkeypatch.setattr(llava.model, name, walk)
    with llava.anchor.inject(llava.anchor.E0):
        assert "forward" in vars(llava.model.model.vision_tower)  # E is in place of the tower's output
    assert "forward" not in vars(llava.model.model.vision_tower)


def test_media_inputs_of_many_items_take_no_memory(llava: Case) -> None:
    pixels = llava.anchor.media_inputs(64)["pixel_values"]
    assert pixels.shape == (64, 3, 16, 16)
    assert pixels.untyped_storage().nbytes() == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_recorded_on_the_cpu_and_injected_on_the_gpu(name: str) -> None:
    """Also the branch forward, which plans on the CPU; in fp32, so that both devices must agree."""
    family = BY_NAME[name]
    model, anchor = family.recorded()
    target = torch.ones(4, dtype=torch.bool)
    branches = tuple(Branch(torch.tensor(ids), target) for ids in ([5, 6, 7, 8], [9, 8, 7, 6]))
    items = [Item(family.prefix(seed=seed), branches) for seed in range(2)]
    E = concatenate([near(anchor, seed) for seed in range(2)])
    logits = []
    for device in ("cpu", "cuda"):
        forward = BranchForward(model.to(device), anchor)
        plan = forward.plan(items)
        assert plan.form == "packed"
        logits.append(forward(plan, E).logits.cpu())
        logits[-1].logsumexp(-1).sum().backward()
        ids = family.prefix()[None].to(device)
        with torch.no_grad(), anchor.inject(near(anchor, 1)):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=3,
                do_sample=False,
                **anchor.type_inputs(ids),
                **anchor.media_inputs(1),
            )
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-3)
