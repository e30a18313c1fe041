"""Alignment data: what the parts are, how batches are mixed, and that micro-batches lose nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from configs.schema import Mixture
from datamodules.alignment import AlignmentBatch, AlignmentExample, Batches, MixtureSampler, chunks, encode, examples
from datamodules.micro_world import REFUSAL, records
from tests.micro import micro

ALL = Mixture(text=2, prefixed=1, plain=1, reading=1)


def mixed(n: int = 20, mixture: Mixture = ALL) -> list[AlignmentExample]:
    made = records("train", n // 2, n // 2)
    mllm = micro()
    return examples(made, {r.id for r in made}, mixture, mllm.spec.prompts, "image", REFUSAL, 0)


def test_parts_of_a_record() -> None:
    found = {e.part: e for e in mixed(2) if e.harmful}
    assert set(found) == {"text", "prefixed", "plain", "reading"}
    assert found["text"].embedding is None
    assert found["plain"].embedding is not None
    assert found["prefixed"].question.endswith(found["plain"].question)
    assert "image shows" in found["prefixed"].question
    assert found["reading"].chosen != REFUSAL
    assert found["reading"].rejected == REFUSAL
    assert found["plain"].chosen == REFUSAL


def test_replay_asks_what_the_unaligned_model_was_asked_and_takes_its_answer() -> None:
    made = records("train", 1, 1)
    replays = {made[0].id: [("Read it.", "Words."), ("And now?", "More.")]}
    mixture, prompts = Mixture(text=0, replay=1), micro().spec.prompts
    found = examples(made, {r.id for r in made}, mixture, prompts, "image", REFUSAL, 0, replays)
    assert [(e.id, e.question, e.chosen, e.rejected, e.embedding) for e in found] == [
        (f"replay/{made[0].id}/{k}", question, answer, REFUSAL, made[0].id)
        for k, (question, answer) in enumerate(replays[made[0].id])
    ]
    with pytest.raises(ValueError, match="no examples for replay"):
        examples(made, {r.id for r in made}, mixture, prompts, "image", REFUSAL, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_divide_every_batch(world: int) -> None:
    data = [replace(e, embedding=None) for e in mixed(8)]
    items = [encode(e, micro().prompts, (), pairs=False) for e in data]
    sampler = MixtureSampler(data, ALL, 7, 0)
    for step in range(3):
        shares = [Batches(items, data, sampler, None, 3, rank, world).batch(step).ids for rank in range(world)]
        assert sorted(id for share in shares for id in share) == sorted(data[i].id for i in sampler.step(step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_embeddings_that_are_not_available_are_left_out() -> None:
    made = records("train", 4, 4)
    some = {made[0].id, made[-1].id}
    found = examples(made, some, ALL, micro().spec.prompts, "image", REFUSAL, 0)
    assert {e.embedding for e in found if e.embedding} == some
    assert sum(e.part == "text" for e in found) == 8


def test_asking_for_embeddings_without_any_is_an_error_that_says_what_to_run() -> None:
    with pytest.raises(ValueError, match="run the stage synthesize first"):
        examples(records("train", 2, 2), set(), ALL, micro().spec.prompts, "image", REFUSAL, 0)


def test_every_batch_holds_each_cell_in_proportion_and_every_example_once_a_pass() -> None:
    data = mixed(40)
    sampler = MixtureSampler(data, ALL, batch_size=20, seed=1)
    seen: Counter[str] = Counter()
    for step in range(40):
        chosen = [data[i] for i in sampler.step(step)]
        assert len(chosen) == 20
        cells = Counter((e.part, e.harmful) for e in chosen)
        assert cells == {("text", flag): 4 for flag in (True, False)} | {
            (part, flag): 2 for part in ("prefixed", "plain", "reading") for flag in (True, False)
        }
        seen.update(e.id for e in chosen)
    assert len(seen) == len(data)
    for part in ("text", "plain"):
        counts = {seen[e.id] for e in data if e.part == part}
        assert max(counts) - min(counts) <= 1


def test_harmful_examples_have_the_share_that_is_asked_for() -> None:
    data = mixed(40)
    sampler = MixtureSampler(data, replace(ALL, harmful=0.75), batch_size=40, seed=1)
    cells = Counter((data[i].part, data[i].harmful) for i in sampler.step(0))
    assert cells["text", True] == 3 * cells["text", False] > 0
    assert sum(n for (_, flag), n in cells.items() if flag) == 30
    assert sum(n for (part, _), n in cells.items() if part == "text") == 16  # the parts' shares stay


def test_batches_are_a_function_of_seed_and_step() -> None:
    data = mixed(20)
    a, b, c = (MixtureSampler(data, ALL, 8, seed) for seed in (1, 1, 2))
    assert [a.step(s) for s in (5, 2)] == [b.step(s) for s in (5, 2)]
    assert a.step(5) != c.step(5)


def test_shares_that_do_not_divide_the_batch_even_out_over_steps() -> None:
    data = mixed(20, Mixture(text=1, plain=2))
    sampler = MixtureSampler(data, Mixture(text=1, plain=2), batch_size=7, seed=0)
    parts = Counter(data[i].part for step in range(30) for i in sampler.step(step))
    assert parts["text"] == 70
    assert parts["plain"] == 140


def test_micro_batches_keep_items_embeddings_and_ids_together() -> None:
    mllm = micro()
    data = mixed(4)
    items = [encode(e, mllm.prompts, sorted(mllm.anchor.media_token_ids), pairs=True) for e in data]
    media = [i for i, e in enumerate(data) if e.embedding]
    text = [i for i, e in enumerate(data) if not e.embedding]
    E = {"p": torch.arange(len(media) * 3.0).view(-1, 1).repeat_interleave(2, 0)}
    E["p"] = torch.arange(len(media)).repeat_interleave(3).float()[:, None]  # three rows an item
    batch = AlignmentBatch(
        0, [items[i] for i in text], [items[i] for i in media], E, [data[i].id for i in media + text]
    )
    seen = []
    for part, e, ids in chunks(batch, 5):
        assert len(part) == len(ids) <= 5
        if e is not None:
            assert e["p"].shape[0] == 3 * len(part)
            assert [media[int(v)] for v in e["p"][::3, 0]] == [
                next(i for i, x in enumerate(data) if x.id == n) for n in ids
            ]
        seen += [(id(item), n) for item, n in zip(part, ids, strict=True)]
    assert sorted(seen) == sorted((id(items[i]), data[i].id) for i in range(len(data)))


def test_a_pair_needs_a_rejected_answer() -> None:
    mllm = micro()
    example = AlignmentExample("x", "text", True, "q", "a", None, None)
    with pytest.raises(ValueError, match="has no rejected answer"):
        encode(example, mllm.prompts, [], pairs=True)


def test_the_answer_is_the_target_to_its_end_token_and_nothing_else() -> None:
    mllm = micro()
    ids, target = mllm.prompts.example("How do I bake the cake?", "First get the cake.", media=True)
    tokenizer = mllm.processor.tokenizer
    assert tokenizer.decode(ids[target]).replace(" ", "") == "firstgetthecake.<eos>"
    assert int((ids == mllm.processor.image_token_id).sum()) == 64
    assert not target[ids == mllm.processor.image_token_id].any()


def test_alone_is_an_embedding_and_no_text() -> None:
    made = records("train", 2, 2)
    found = examples(made, {r.id for r in made}, Mixture(text=0, alone=1.0), micro().spec.prompts, "audio", REFUSAL, 0)
    assert [(e.part, e.question, e.embedding) for e in found] == [("alone", "", r.id) for r in made]
    assert [(e.chosen, e.rejected) for e in found] == [(r.chosen, r.rejected) for r in made]
