"""Branches on one prefix, on tiny random models of every family: packed equals plain equals every full sequence alone,
in logits and in the gradients to E and to LoRA weights. The control: a mask that leaks moves the logits.
"""

import copy
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

import mllm.branches
import mllm.causal_prefix
from mllm.anchor import Anchor
from mllm.branches import Branch, BranchForward, BranchLogits, Item, split_shared
from mllm.recomputing import checkpointing_layers, recompute_activations
from tests.mllm.families import BY_NAME, FAMILIES, Family, near, random_words, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's
NO_CHECKPOINTING = {"granite_speech"}  # transformers: "does not support activation checkpointing"


@dataclass
class Case:
    family: Family
    model: Any
    anchor: Anchor

    def items(self, media: bool = True) -> list[Item]:
        """Three items with 2, 3 and 1 ragged branches; in PaliGemma a branch is only an answer."""
        made = []
        for i, k in enumerate((2, 3, 1)):
            prefix = (
                self.family.prefix(4 + 3 * i, 2 + i, seed=i)
                if media
                else random_words(5 + 2 * i, torch.Generator().manual_seed(i))
            )
            made.append(Item(prefix, tuple(self.branch(i, j) for j in range(k)), media))
        return made

    def branch(self, i: int, j: int) -> Branch:
        length = 5 + 2 * j + i
        whole = self.family.types == "prefix" or (i, j) == (0, 1)
        target = torch.ones(length, dtype=torch.bool) if whole else torch.arange(length) >= length - 3
        return Branch(random_words(length, torch.Generator().manual_seed(10 * i + j)), target)

    def embeddings(self, n: int) -> list[dict[str, Tensor]]:
        return [near(self.anchor, seed) for seed in range(n)]

    def alone(self, items: list[Item], Es: list[dict[str, Tensor]] | None) -> BranchLogits:
        """The oracle, apart from the code under test: one ordinary forward of each full sequence, all logits."""
        found: list[list[Tensor]] = [[], [], [], []]
        for i, item in enumerate(items):
            for j, branch in enumerate(item.branches):
                ids = torch.cat([item.prefix, branch.ids])[None]
                inputs = self.family.text(ids)
                first = len(item.prefix) + int(branch.target.int().argmax())
                if self.family.types == "prefix":
                    inputs["token_type_ids"][:, first:] = 1
                if Es is None:
                    logits = self.model(**inputs).logits[0]
                else:
                    with self.anchor.inject(Es[i]):
                        logits = self.model(**inputs, **self.family.media(1)).logits[0]
                at = len(item.prefix) + branch.target.nonzero()[:, 0]
                parts = logits[at - 1], ids[0, at], torch.full_like(at, i), torch.full_like(at, j)
                for row, x in zip(found, parts, strict=True):
                    row.append(x)
        return BranchLogits(*(torch.cat(x) for x in found))

    def gradients(self, result: BranchLogits, Es: list[dict[str, Tensor]]) -> list[Tensor]:
        leaves = [e for E in Es for e in E.values()] + [p for p in self.model.parameters() if p.requires_grad]
        loss = F.cross_entropy(result.logits.float(), result.labels, reduction="sum")
        return list(torch.autograd.grad(loss, leaves))


def assert_same(got: BranchLogits, expected: BranchLogits, atol: float = 2e-4) -> None:
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.item, expected.item)
    assert torch.equal(got.branch, expected.branch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=atol)


def concatenate(Es: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {path: torch.cat([E[path] for E in Es]) for path in Es[0]}


@pytest.fixture(
    scope="module", params=[(f, a) for f in FAMILIES for a in ("sdpa", "eager")], ids=lambda p: f"{p[0].name}-{p[1]}"
)
def case(request: pytest.FixtureRequest) -> Case:
    """With a LoRA adapter on the language model."""
    family, attention = request.param
    model, anchor = family.recorded(attention)
    return Case(family, with_lora(model), anchor)


@pytest.fixture(scope="module")
def llava() -> Case:
    return Case(BY_NAME["llava"], *BY_NAME["llava"].recorded())


def test_a_prefix_that_needs_no_mask_attends_apart(llava: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which families do is found out; that it is right is compared below, for each."""
    forward, items = BranchForward(llava.model, llava.anchor), llava.items()
    assert forward.plan(items).causal == 0  # too short to be worth it
    monkeypatch.setattr(mllm.branches, "WORTH_SPLITTING", 1)
    plan = forward.plan(items)
    assert plan.causal == min(len(item.prefix) for item in items)
    seen: list[tuple[int, int]] = []
    inner = mllm.causal_prefix.sdpa_attention_forward

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        seen.append((query.shape[2], 0 if mask is None else mask.shape[2]))
        return inner(module, query, key, value, mask, **more)

    monkeypatch.setattr(mllm.causal_prefix, "sdpa_attention_forward", noted)
    forward(plan, concatenate(llava.embeddings(3)))
    S = plan.inputs["input_ids"].shape[1]
    assert set(seen) == {(plan.causal, 0), (S - plan.causal, S - plan.causal)}
    assert llava.model.config.get_text_config()._attn_implementation == "sdpa"  # as it was


def test_a_mask_of_a_layers_own_is_kept(llava: Case) -> None:
    """Only the mask of whole rows may be taken apart: another one says something else of the first tokens, too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 8, generator=generator)
    rows = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)[None, None].repeat(2, 1, 1, 1)
    own = rows + torch.randn(rows.shape, generator=generator)
    module, config = torch.nn.Identity(), llava.model.config.get_text_config()
    for mask in (rows, own):
        expected, _ = mllm.causal_prefix.attention(module, q, k, v, mask)
        with mllm.causal_prefix.causal_prefix(config, 8, rows):
            got, _ = mllm.causal_prefix.attention(module, q, k, v, mask)
        torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------ every family
def test_packed_equals_plain_equals_every_sequence_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, items, Es = BranchForward(case.model, case.anchor), case.items(), case.embeddings(3)
    expected = case.alone(items, Es)
    gradients = case.gradients(expected, Es)
    for shared, form, in_two_parts in ((True, "packed", True), (True, "packed", False), (False, "plain", False)):
        monkeypatch.setattr(mllm.branches, "WORTH_SPLITTING", 1 if in_two_parts else 10**6)
        plan = forward.plan(items, shared=shared)
        assert plan.form == form
        assert plan.causal == 0 or in_two_parts
        got = forward(plan, concatenate(Es))
        assert_same(got, expected)
        for g, want in zip(case.gradients(got, Es), gradients, strict=True):
            torch.testing.assert_close(g, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-6)
            assert want.abs().max() > 0


@torch.no_grad()
def test_a_mask_that_leaks_is_noticed(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: every branch also sees those before it. The comparison above fails, and mode="auto" finds out."""
    items, E = case.items(), concatenate(case.embeddings(3))
    expected = BranchForward(case.model, case.anchor, "plain")
    expected = expected(expected.plan(items), E)
    right = mllm.branches.packed_mask

    def leaking(rows: Any, *rest: Any) -> Tensor:
        return right(replace(rows, segment_start=torch.minimum(rows.segment_start, rows.prefix_length[:, None])), *rest)

    monkeypatch.setattr(mllm.branches, "packed_mask", leaking)
    packed = BranchForward(case.model, case.anchor, "packed")
    first = expected.branch == 0  # the first branch has none before it
    got = packed(packed.plan(items), E).logits
    assert (got - expected.logits)[~first].abs().max() > 0.3
    torch.testing.assert_close(got[first], expected.logits[first], rtol=0, atol=2e-4)
    auto = BranchForward(case.model, case.anchor)
    with caplog.at_level(logging.WARNING, logger="mllm.branches"):
        assert auto.plan(items).form == auto.plan(items).form == "plain"
    assert caplog.text.count("other logits than the plain one") == 1


def test_items_without_media_need_no_E(case: Case) -> None:
    forward, items = BranchForward(case.model, case.anchor), case.items(media=False)
    expected = case.alone(items, None)
    for shared, form in ((True, "packed"), (False, "plain")):
        plan = forward.plan_text(items, shared=shared)
        assert plan.form == form
        assert_same(forward(plan), expected)


def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    if case.family.name in NO_CHECKPOINTING:
        pytest.skip("transformers: the family does not support activation checkpointing")
    forward, items, Es = BranchForward(case.model, case.anchor), case.items(), case.embeddings(3)
    plan = forward.plan(items)
    expected = forward(plan, concatenate(Es))
    gradients = case.gradients(expected, Es)
    recompute_activations(case.model)
    runs: list[object] = []
    layer = next(m for m in reversed(checkpointing_layers(case.model)) if any(p.requires_grad for p in m.parameters()))
    inside = [m for m in layer.modules() if m is not layer]
    handles = [m.register_forward_hook(lambda module, *_: runs.append(module)) for m in inside]
    try:
        got = forward(plan, concatenate(Es))
        assert_same(got, expected)
        once = len(runs)
        for g, want in zip(case.gradients(got, Es), gradients, strict=True):
            torch.testing.assert_close(g, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-6)
        assert 1.5 * once < len(runs) <= 2 * once  # it ran again, up to the last tensor that is needed
        assert not any(m.training for m in inside if isinstance(m, torch.nn.Dropout))  # nor would dropout be on
    finally:
        for handle in handles:
            handle.remove()
        case.model.get_base_model().activation_checkpointing_disable()
        case.model.eval()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl_video", "gemma3", "smolvlm", "qwen2_audio"])
@torch.no_grad()
def test_packed_equals_plain_in_bf16(name: str) -> None:
    family = BY_NAME[name]
    model = family.model().bfloat16()
    anchor = Anchor(model, family.projector)
    anchor.record(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in family.blank().items()})
    case = Case(family, model, anchor)
    forward, E = BranchForward(model, anchor), concatenate(case.embeddings(3))
    packed, plain = (forward(forward.plan(case.items(), shared=shared), E) for shared in (True, False))
    assert forward.packed_off is None
    assert (packed.logits - plain.logits).abs().mean() < 0.05 * plain.logits.float().std()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl_image", "gemma3", "idefics3"])
@torch.no_grad()
def test_branches_run_with_the_encoder_offloaded(name: str) -> None:
    case = Case(BY_NAME[name], *BY_NAME[name].recorded())
    items, E = case.items(), concatenate(case.embeddings(3))
    forward = BranchForward(case.model, case.anchor)
    expected = forward(forward.plan(items), E)
    case.anchor.offload_encoder()
    forward = BranchForward(case.model, case.anchor)
    assert_same(forward(forward.plan(items), E), expected, atol=0)


# ------------------------------------------------------------------------------------------------ where packed is off
def test_prompts_that_differ_cannot_share_a_prefix_where_a_prompt_sees_itself_both_ways(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = Case(BY_NAME["paligemma"], *BY_NAME["paligemma"].recorded())
    words = random_words(9, torch.Generator().manual_seed(1))
    items = [Item(case.family.prefix(), (Branch(words, torch.arange(9) >= 5), Branch(words[2:], torch.arange(7) >= 3)))]
    forward, Es = BranchForward(case.model, case.anchor), case.embeddings(1)
    with caplog.at_level(logging.WARNING, logger="mllm.branches"):
        plans = [forward.plan(items), forward.plan(items)]
    assert [plan.form for plan in plans] == ["plain", "plain"]
    assert caplog.text.count("share no prefix") == 1
    assert_same(forward(plans[0], Es[0]), case.alone(items, Es))
    assert forward.plan(case.items()).form == "packed"  # answers of one prompt can


def test_attention_without_a_mask_for_each_query_falls_back(llava: Case, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(llava.model)
    anchor = Anchor(model, llava.family.projector)
    anchor.record(**llava.family.blank())
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    forward = BranchForward(model, anchor)
    with caplog.at_level(logging.WARNING, logger="mllm.branches"):
        assert forward.plan(llava.items()).form == "plain"
    assert "attn_implementation='sdpa'" in caplog.text
    with pytest.raises(ValueError, match="mode=packed: the attention implementation 'flash_attention_2'"):
        BranchForward(model, anchor, "packed")


SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SMALL, intermediate_size=48), None),
    "mistral_with_a_window": (
        hf.MistralForCausalLM,
        hf.MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4),
        None,
    ),
    "learned_positions": (hf.GPT2LMHeadModel, hf.GPT2Config(**SMALL), None),
    "learned_positions_with_an_offset": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
        None,
    ),
    "soft_capped_logits": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4),
        None,
    ),
    "positions_as_a_bias": (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=200, hidden_size=32, n_layer=2, n_head=4),
        "packed form",
    ),
    "chunked_attention": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **SMALL,
            intermediate_size=48,
            intermediate_size_mlp=48,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            attention_chunk_size=8,
        ),
        "layers of the type chunked_attention",
    ),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_without_an_anchor(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, config, off = TEXT_MODELS[name]
    torch.manual_seed(0)
    model = build(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.2)
    case = Case(BY_NAME["llava"], model, None)
    items, forward = case.items(media=False), BranchForward(model, None)
    with caplog.at_level(logging.WARNING, logger="mllm.branches"):
        plan = forward.plan(items)
    assert plan.form == ("plain" if off else "packed"), forward.packed_off
    assert (off or "") in caplog.text
    assert bool(caplog.text) == bool(off)
    assert_same(forward(plan), case.alone(items, None))


# ------------------------------------------------------------------------------------------------ planning
def test_split_shared_cuts_before_targets_and_after_media() -> None:
    def sequence(ids: list[int], answer: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(ids), torch.arange(len(ids)) >= len(ids) - answer

    item = split_shared([sequence([1, 150, 150, 7, 8, 9], 2), sequence([1, 150, 150, 7, 5], 1)], {150})
    assert item.media
    assert item.prefix.tolist() == [1, 150, 150, 7]
    assert [b.ids.tolist() for b in item.branches] == [[8, 9], [5]]
    assert all(b.target.all() for b in item.branches)
    item = split_shared(
        [sequence([1, 4, 7, 8, 9], 2), sequence([1, 4, 7, 8, 6], 1)], {150}
    )  # 8 is a target of the first
    assert not item.media
    assert item.prefix.tolist() == [1, 4, 7]
    item = split_shared(
        [sequence([1, 4, 7], 1), sequence([1, 4, 7, 8], 1), sequence([1, 4, 7], 1)]
    )  # one is the start of another
    assert item.prefix.tolist() == [1, 4]
    assert [b.ids.tolist() for b in item.branches] == [[7], [7, 8], [7]]
    assert split_shared([sequence([1, 4, 7], 1)]).prefix.tolist() == [1, 4]
    errors = {
        "no sequences": [],
        "sequence 1 of 2 tokens has no target": [sequence([1, 2], 1), sequence([1, 2], 0)],
        "1 media tokens of sequence 0 lie after the common prefix of 1": [
            sequence([1, 3, 150, 4], 1),
            sequence([1, 2, 150, 4], 1),
        ],
        "no common first token": [sequence([1, 2], 1), sequence([2, 2], 1)],
    }
    for message, sequences in errors.items():
        with pytest.raises(ValueError, match=message):
            split_shared(sequences, {150})


def test_what_cannot_be_planned_is_an_error_that_names_the_item(llava: Case) -> None:
    good, branch = llava.items()[0], Branch(torch.tensor([5, 6]), torch.tensor([False, True]))
    no_target = Branch(branch.ids, torch.zeros(2, dtype=torch.bool))
    first = Branch(branch.ids, torch.ones(2, dtype=torch.bool))
    forward = BranchForward(llava.model, llava.anchor)
    errors = {
        "no items": [],
        "with and without media together": [good, Item(torch.tensor([3]), (branch,), media=False)],
        "item 1 has no branches": [good, replace(good, branches=())],
        "item 0 branch 1 has no target": [replace(good, branches=(branch, no_target))],
        "item 0 branch 0: nothing precedes its first target": [
            Item(torch.tensor([], dtype=torch.long), (first,), media=False)
        ],
        "expected two vectors of one length": [
            replace(good, branches=(Branch(branch.ids, torch.ones(3, dtype=torch.bool)),))
        ],
        r"item 1 has 15 media tokens in its prefix, expected 16.*truncated": [
            good,
            replace(good, prefix=torch.cat([good.prefix[:5], good.prefix[6:]])),
        ],
        "media tokens in a branch": [
            replace(good, branches=(Branch(torch.tensor([150, 3]), torch.tensor([False, True])),))
        ],
    }
    for message, items in errors.items():
        with pytest.raises(ValueError, match=message):
            forward.plan(items)
    with pytest.raises(ValueError, match="need an anchor"):
        BranchForward(llava.model, None).plan([good])
    with pytest.raises(ValueError, match="E: got none for a plan of items with media=True"):
        forward(forward.plan([good]))
    with pytest.raises(ValueError, match="E: got one for a plan of items with media=False"):
        forward(forward.plan(llava.items(media=False)), llava.anchor.E0)
    for shared in (True, False):
        with pytest.raises(ValueError, match=r"shape \(1, 16, 24\), expected \(3, 16, 24\)"):
            forward(forward.plan(llava.items(), shared), llava.anchor.E0)


def test_an_empty_prefix_is_fine_if_no_first_token_is_a_target(llava: Case) -> None:
    ids, target = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
    items = [
        Item(torch.tensor([], dtype=torch.long), (Branch(ids, target), Branch(ids.flip(0), target)), media=False),
        *llava.items(media=False),
    ]
    forward = BranchForward(llava.model, llava.anchor)
    plan = forward.plan(items)
    assert plan.form == "packed"
    assert_same(forward(plan), llava.alone(items, None))


def test_only_targets_reach_the_output_embedding(llava: Case) -> None:
    forward, seen = BranchForward(llava.model, llava.anchor), []
    plan = forward.plan(llava.items())
    handle = llava.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    try:
        result = forward(plan, concatenate(llava.embeddings(3)))
    finally:
        handle.remove()
    assert seen == [(1, len(plan.labels), 200)]
    assert result.logits.shape == seen[0][1:]


def test_a_plan_outlives_its_forward_and_the_encoder_never_runs_for_it(llava: Case) -> None:
    forward, runs = BranchForward(llava.model, llava.anchor), []
    inside = next(llava.model.model.vision_tower.children())
    handle = inside.register_forward_hook(lambda *_: runs.append(True))
    try:
        plan, E = forward.plan(llava.items()), concatenate(llava.embeddings(3))
        assert torch.equal(forward(plan, E).logits, forward(plan, E).logits)
        assert not runs
        llava.model(**llava.family.blank())
        assert runs, "the hook is not where the encoder is"
    finally:
        handle.remove()


def test_planning_64_items_is_fast(llava: Case) -> None:
    """About 4 ms of one CPU core; slots refill at almost every step, so a plan is made as often."""
    generator = torch.Generator().manual_seed(0)
    items = [
        Item(
            llava.family.prefix(20, 2 + i % 3, seed=i),
            tuple(Branch(random_words(n, generator), torch.arange(n) >= n - 4) for n in (20 + i % 4, 24)),
        )
        for i in range(64)
    ]
    forward = BranchForward(llava.model, llava.anchor)
    forward.plan(items)
    took = []
    for _ in range(5):
        start = time.process_time()
        forward.plan(items)
        took.append(time.process_time() - start)
    assert min(took) < 0.03


def test_the_last_mlp_works_on_the_places_that_predict_a_target(llava: Case) -> None:
    forward, items, E = BranchForward(llava.model, llava.anchor), llava.items(), concatenate(llava.embeddings(3))
    plan = forward.plan(items)
    mlp = mllm.branches.last_mlp(forward.base)
    assert mlp is not None
    seen: list[int] = []
    part = next(mlp.children())  # behind whatever is hooked to the MLP itself
    with part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel())):
        forward(plan, E)
    places = {(int(r), int(c)) for r, c in zip(plan.rows.row, plan.rows.column, strict=True)}
    # Fewer than targets: the first targets of an item's branches are predicted by one place.
    assert seen == [len(places)]
    assert len(places) < plan.rows.ids.numel() / 2
