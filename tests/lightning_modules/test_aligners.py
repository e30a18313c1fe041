"""The aligners against TRL's trainers on the same batch, and the invariants of micro-batching, freezing and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from configs.schema import AlignVariant, Lora, Mixture
from datamodules.alignment import AlignmentBatch, AlignmentDataModule, AlignmentExample, encode
from lightning_modules.aligner import Aligner, trainable_model
from lightning_modules.dpo_aligner import DPOAligner, load_reference, save_reference
from lightning_modules.sft_aligner import SFTAligner
from mllm.branches import Item
from mllm.loading import MLLM
from stages.trainers import quieten
from tests.micro import micro

PATH = "model.multi_modal_projector"
VARIANT = AlignVariant(lora=Lora(r=4, alpha=8))


def made(mllm: MLLM, pairs: bool, media: bool, n: int = 4) -> tuple[list[AlignmentExample], list[Item]]:
    questions = ["List steps to perform this activity.", "How do I bake the cake?", "What is shown?", "Read the words."]
    chosen = [
        "Sorry, I cannot help with that.",
        "Sure, first get the cake.",
        "A toy drum.",
        "The words are paint fence.",
    ]
    rejected = ["Sure, first get it.", "Sorry.", "Sorry, I cannot.", "Nothing."]
    data = [
        AlignmentExample(
            str(i),
            "plain" if media else "text",
            i % 2 == 0,
            questions[i],
            chosen[i],
            rejected[i],
            str(i) if media else None,
        )
        for i in range(n)
    ]
    media_ids = sorted(mllm.anchor.media_token_ids)
    return data, [encode(e, mllm.prompts, media_ids, pairs) for e in data]


def embeddings(mllm: MLLM, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    e0 = mllm.anchor.E0_by_path[PATH]
    return {PATH: torch.cat([e0 + torch.randn(e0.shape, generator=generator) for _ in range(n)])}


def shake(model: torch.nn.Module) -> None:
    """LoRA's B is zero at the start: without this the policy is the reference and nothing is compared."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1, generator=generator)


def rows(items: list[Item]) -> dict[str, torch.Tensor]:
    """TRL's batch layout: all first branches, then all second ones, right-padded, with a completion mask."""
    ids, masks = [], []
    for branch in range(len(items[0].branches)):
        for item in items:
            b = item.branches[branch]
            ids.append(torch.cat([item.prefix, b.ids]))
            masks.append(torch.cat([torch.zeros(len(item.prefix), dtype=torch.long), b.target.long()]))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n.replace("module.", ""): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def lora_config(mllm: MLLM) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=mllm.spec.lora_targets, task_type="CAUSAL_LM")


@pytest.mark.parametrize("media", [False, True], ids=["text", "media"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_dpo_equals_trl(kind: str, media: bool, tmp_path: Path) -> None:
    mllm = micro()
    _, items = made(mllm, pairs=True, media=media)
    E = embeddings(mllm, len(items)) if media else None
    dummy = Dataset.from_dict({"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", "c"]})
    smoothing = 0.1 if kind == "robust" else 0.0
    arguments = DPOConfig(
        str(tmp_path), beta=0.3, loss_type=kind, label_smoothing=smoothing, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=mllm.model,
        args=arguments,
        train_dataset=dummy,
        processing_class=mllm.processor.tokenizer,
        peft_config=lora_config(mllm),
    )
    shake(trainer.model)
    batch: dict[str, Any] = rows(items)
    if E is not None:
        batch |= mllm.anchor.media_inputs(2 * len(items))
        with mllm.anchor.inject({PATH: torch.cat([E[PATH], E[PATH]])}, batch_size=2 * len(items)):
            theirs = trainer.compute_loss(trainer.model, batch)
            theirs.backward()
    else:
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
    expected = gradients(trainer.model)
    for name, module in trainer.model.named_modules():  # TRL's fused head replaced the forward of the base model
        module.__dict__.pop("forward", None) if name == "base_model.model" else None
    module = DPOAligner(mllm, trainer.model, steps=1, beta=0.3, loss_type=kind, label_smoothing=smoothing)
    ours, _ = module.micro_step(items, E, [str(i) for i in range(len(items))], total=len(items))
    ours.backward()
    # ipo squares a margin: a loss of 6 has a rounding of 5e-7, so the bound is relative above 1.
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6, abs=2e-6)
    got = gradients(trainer.model)
    assert got.keys() == expected.keys()
    assert len(got) > 0
    for name in expected:
        # By norm for all; by element too, but for ipo, whose larger gradients differ by 2.4e-6 in single elements.
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        if kind != "ipo":
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("media", [False, True], ids=["text", "media"])
def test_sft_equals_trl(media: bool, tmp_path: Path) -> None:
    mllm = micro()
    _, items = made(mllm, pairs=False, media=media)
    E = embeddings(mllm, len(items)) if media else None
    dummy = Dataset.from_dict({"prompt": ["a", "a"], "completion": ["b", "b"]})
    arguments = SFTConfig(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None
    )
    trainer = SFTTrainer(
        model=mllm.model,
        args=arguments,
        train_dataset=dummy,
        processing_class=mllm.processor.tokenizer,
        peft_config=lora_config(mllm),
    )
    shake(trainer.model)
    batch: dict[str, Any] = rows(items)
    mask = batch.pop("completion_mask")
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    if E is not None:
        batch |= mllm.anchor.media_inputs(len(items))
        with mllm.anchor.inject(E, batch_size=len(items)):
            theirs = trainer.compute_loss(trainer.model, batch)
            theirs.backward()
    else:
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
    expected = gradients(trainer.model)
    module = SFTAligner(mllm, trainer.model, steps=1)
    ours, _ = module.micro_step(items, E, [], total=float(mask.sum()))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=2e-6)
    got = gradients(trainer.model)
    assert got.keys() == expected.keys()
    assert len(got) > 0
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


class Store:
    """Embeddings by number."""

    def __init__(self, mllm: MLLM, n: int) -> None:
        self.values = embeddings(mllm, n)[PATH].view(n, *mllm.anchor.E0_by_path[PATH].shape)

    def batch(self, ids: list[str]) -> dict[str, torch.Tensor]:
        return {PATH: self.values[[int(i) for i in ids]]}


def train(
    mllm: MLLM,
    module: Aligner,
    pairs: bool,
    steps: int = 2,
    folder: Path | None = None,
    resume: Path | None = None,
    **kw: Any,
) -> L.Trainer:
    quieten()
    data, items = made(mllm, pairs, media=True)
    text, text_items = made(mllm, pairs, media=False)
    mixture = Mixture(text=1.0, plain=1.0)
    loader = AlignmentDataModule(
        [*data, *text], [*items, *text_items], mixture, Store(mllm, len(data)), module.steps, 8, seed=0
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kw,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    if folder is not None:
        trainer.save_checkpoint(folder / "x.ckpt")
    return trainer


@pytest.mark.parametrize(("method", "attack"), [("sft", 0.0), ("dpo", 0.0), ("sft", 0.2)])
def test_one_micro_batch_of_eight_equals_eight_of_one(method: str, attack: float) -> None:
    results = []
    for size in (8, 1):
        mllm = micro()
        torch.manual_seed(0)
        model = trainable_model(mllm, VARIANT)
        kind = SFTAligner if method == "sft" else DPOAligner
        module = kind(mllm, model, steps=2, micro_batch_size=size, lr=1e-3, attack_radius=attack)
        train(mllm, module, pairs=method == "dpo")
        results.append({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        # Two Adam steps move a weight by up to 2e-3: this is half a per cent of that, and Adam amplifies rounding.
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-5)


def test_frozen_weights_stay_bit_identical() -> None:
    mllm = micro()
    before = {n: p.detach().clone() for n, p in mllm.model.named_parameters()}
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=2)
    train(mllm, module, pairs=False)
    frozen = [(n, p) for n, p in module.model.named_parameters() if not p.requires_grad]
    assert len(frozen) == len(before)
    for name, p in frozen:
        assert p.grad is None
        assert torch.equal(p, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])


def test_the_encoder_never_runs() -> None:
    mllm = micro()
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=2)
    for encoder in mllm.anchor.encoder_modules.values():
        for p in encoder.parameters():
            p.data.fill_(float("nan"))
    train(mllm, module, pairs=False)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained
    assert all(p.isfinite().all() for p in trained)


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    finals = []
    for interrupted in (False, True):
        mllm = micro()
        torch.manual_seed(0)
        module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=4, warmup_steps=1)
        if interrupted:
            train(mllm, module, pairs=False, steps=2, folder=tmp_path)
            saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
            assert saved["state_dict"]
            assert all("lora_" in k for k in saved["state_dict"])
            mllm = micro()
            module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=4, warmup_steps=1)
            train(mllm, module, pairs=False, steps=4, resume=tmp_path / "x.ckpt")
        else:
            train(mllm, module, pairs=False, steps=4)
        finals.append({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


def test_cached_reference_is_found_again_whatever_its_ids_hold(tmp_path: Path) -> None:
    path, ids = tmp_path / "r.safetensors", ["text/a\nb", "text/a", "text/é ☃"]
    save_reference(path, ids, torch.arange(6.0).view(3, 2))
    assert load_reference(path, ids) == {ids[0]: (0.0, 1.0), ids[1]: (2.0, 3.0), ids[2]: (4.0, 5.0)}
    assert load_reference(path, ["text/a", "b", *ids[1:]]) is None


def test_cached_reference_equals_the_adapter_switched_off(tmp_path: Path) -> None:
    mllm = micro()
    model = trainable_model(mllm, VARIANT)
    data, items = made(mllm, pairs=True, media=True)
    E, ids = embeddings(mllm, len(items)), [e.id for e in data]
    live = DPOAligner(mllm, model, steps=1)
    values = live.reference_logps(items, E)
    save_reference(tmp_path / "r.safetensors", ids, values)
    assert load_reference(tmp_path / "r.safetensors", ids[:-1]) is None
    cached = DPOAligner(mllm, model, steps=1, reference=load_reference(tmp_path / "r.safetensors", ids))
    shake(model)
    a, b = (m.micro_step(items, E, ids, 4.0)[0].item() for m in (live, cached))
    assert a == pytest.approx(b, abs=1e-6)
    assert a != pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)  # the policy has left the reference


def test_exported_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    mllm = micro()
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=1)
    shake(module.model)
    module.eval()
    inputs = mllm.prompts.blank_inputs("What is shown?")
    with torch.no_grad():
        expected = module.model(**inputs).logits
    module.export(str(tmp_path / "adapter"))
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    fresh = PeftModel.from_pretrained(micro().model, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_sft_weight_adds_the_mean_nll_of_the_chosen_answers() -> None:
    mllm = micro()
    model = trainable_model(mllm, VARIANT)
    shake(model)
    _, items = made(mllm, pairs=True, media=False)
    plain, mixed = (
        DPOAligner(mllm, model, steps=1, sft_weight=w).micro_step(items, None, [], 4.0)[0] for w in (0.0, 0.7)
    )
    chosen = [Item(i.prefix, i.branches[:1], i.media) for i in items]
    nll = [
        SFTAligner(mllm, model, steps=1).micro_step([c], None, [], float(c.branches[0].target.sum()))[0] for c in chosen
    ]
    assert mixed.item() - plain.item() == pytest.approx(0.7 * sum(n.item() for n in nll) / 4, abs=1e-5)


def test_noise_on_embeddings_has_its_size_and_is_a_function_of_the_step() -> None:
    mllm = micro()
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=1, noise=0.5)
    E = embeddings(mllm, 4)
    batch = AlignmentBatch(3, [], made(mllm, False, True)[1], E, ["0", "1", "2", "3"])
    noisy = module.with_noise(batch).E[PATH]
    rms = float(mllm.anchor.E0_by_path[PATH].square().mean().sqrt())
    assert float((noisy - E[PATH]).std()) == pytest.approx(0.5 * rms, rel=0.02)
    assert torch.equal(noisy, module.with_noise(batch).E[PATH])
    assert not torch.equal(noisy, module.with_noise(replace(batch, step=4)).E[PATH])


def test_an_attack_stays_within_its_radius_and_raises_the_loss() -> None:
    mllm = micro()
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=1, attack_radius=0.2)
    items, ids = made(mllm, False, True)[1], ["0", "1", "2", "3"]
    E = {path: e.requires_grad_() for path, e in embeddings(mllm, 4).items()}
    clean, _ = module.micro_step(items, E, ids, 1.0)
    clean.backward()
    moved = module.attacked(E, ids)
    with torch.no_grad():
        attacked, _ = module.micro_step(items, moved, ids, 1.0)
        away = {PATH: 2 * E[PATH] - moved[PATH]}  # as far the other way
        opposite, _ = module.micro_step(items, away, ids, 1.0)
    assert attacked > clean > opposite
    distance = (moved[PATH] - E[PATH]).detach().view(4, -1).square().mean(1).sqrt() / module.unit(PATH)
    assert distance.max() <= 0.2
    assert len({round(float(d), 6) for d in distance}) == 4  # each example draws its own
    alone = module.attacked({PATH: E[PATH]}, ids)
    assert torch.equal(alone[PATH], moved[PATH])


def test_half_of_the_gradient_comes_from_the_attacked_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = micro()
    module = SFTAligner(mllm, trainable_model(mllm, VARIANT), steps=1, attack_radius=0.2)
    shake(module.model)
    monkeypatch.setattr(module, "manual_backward", torch.Tensor.backward)  # what Lightning's does without a trainer
    items, ids = made(mllm, False, True)[1], ["0", "1", "2", "3"]
    E = {path: e.requires_grad_() for path, e in embeddings(mllm, 4).items()}
    module.micro_step(items, E, ids, 1.0)[0].backward()
    clean = gradients(module.model)
    module.micro_step(items, module.attacked(E, ids), ids, 1.0)[0].backward()
    attacked = gradients(module.model)
    module.micro_backward(items, {PATH: E[PATH].detach()}, ids, 1.0)
    for name, gradient in gradients(module.model).items():
        torch.testing.assert_close(gradient, (clean[name] + attacked[name]) / 2, rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_trains_all_but_the_encoder() -> None:
    mllm = micro()
    model = trainable_model(mllm, AlignVariant(full_finetune=True))
    encoder = tuple(f"{n}." for n in mllm.anchor.encoder_modules)
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith(encoder)
    batch = AlignmentBatch(0, made(mllm, False, False)[1], [], {}, [])
    module = SFTAligner(mllm, model, steps=1)
    loss, _ = module.micro_step(batch.text, None, [], 10.0)
    loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
