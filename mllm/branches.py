"""Several continuations of one prefix at the price of about one: `forward(prefix, E, branches)`.

The embedding (hundreds of tokens) and the text before it are the same for the content and the style sample of SEA
(arXiv 2502.12562), and for the chosen and the rejected answer of DPO. *Packed*, the default, puts them in one row
behind one prefix (`packing.py`); *plain* runs each full sequence as its own row and is the oracle: same logits, same
gradients. Only the outputs that predict a target go through the last layer's MLP and reach the output embedding: the
largest saving where the vocabulary is large, or the model has few layers.

    forward = BranchForward(model, anchor)
    plan = forward.plan([split_shared([(ids1, target1), (ids2, target2)], anchor.media_token_ids), ...])
    logits, labels, item, branch = forward(plan, E)          # E: {path: items concatenated on dim 0}
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mllm.anchor import Anchor
from mllm.causal_prefix import WORTH_SPLITTING, causal_prefix
from mllm.items import Branch, Item, check_items, split_shared
from mllm.packing import PackedRows, Rows, packed_mask, packed_rows, plain_rows
from mllm.prefix_layout import PrefixLayout, PrefixLayouts
from mllm.recomputing import checkpointing_layers, recomputes
from mllm.replay import base_model, evaluating

__all__ = ["Branch", "BranchForward", "BranchLogits", "Item", "Plan", "split_shared"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What the model is called with for some items; made by `BranchForward.plan`, reusable while the items stay.

    form: how the branches run. inputs: of the model, without E. rows: where the targets are. items: their number.
    causal: first tokens of every row that need no mask (mllm/causal_prefix.py); 0: there are none.
    """

    form: Literal["packed", "plain"]
    inputs: dict[str, Any]
    rows: Rows
    items: int
    media: bool
    causal: int = 0

    @property
    def labels(self) -> Tensor:
        """LongTensor [T], in the order of the logits."""
        return self.rows.labels


class BranchLogits(NamedTuple):
    """logits: [T, V] of the targets, in order of item, branch, place; labels, item, branch: LongTensor [T]."""

    logits: Tensor
    labels: Tensor
    item: Tensor
    branch: Tensor


class BranchForward:
    """Plans and runs forwards of items with branches.

    Args:
        model: a transformers causal language model, multimodal or not, or a PEFT model of one.
        anchor: a recorded anchor of the same model; None for items without media.
        mode: "auto": packed where it is valid, else plain, with one log message that says why. The first packed plan is
            tried against the plain form on the recorded blank. "packed": no such trial. "plain": never packed.

    Attributes:
        packed_off: why packed is off for this model; None where it is on.

    Raises:
        ValueError: mode "packed" for a model that cannot, an anchor without a record, or no output embedding.
    """

    def __init__(
        self, model: nn.Module, anchor: Anchor | None, mode: Literal["auto", "packed", "plain"] = "auto"
    ) -> None:
        self.model, self.anchor, self.mode = model, anchor, mode
        self.base = base_model(model)
        if mode not in ("auto", "packed", "plain"):
            raise ValueError(f"mode: got {mode!r}, expected auto, packed or plain")
        if anchor is not None and anchor.base is not self.base:
            raise ValueError("anchor: made for another model than the one given; make both from the same one")
        if anchor is not None and not anchor.media_token_ids:
            wanted = f"image_token_id or {anchor.modality or 'audio'}_token_id"
            raise ValueError(
                f"{self._name}: none of the media tokens that its config names is in the recorded prompt; the config "
                f"must have the placeholder's id, for instance as {wanted}"
            )
        if self.base.get_output_embeddings() is None:
            raise ValueError(f"{self._name} has no output embedding, expected a causal language model")
        self._layouts = PrefixLayouts(self.base, anchor)
        self._last_mlp = last_mlp(self.base)
        self._layers = checkpointing_layers(self.base)
        self._text_config = self.base.config.get_text_config()
        self._tried: set[bool] = set()
        self._told: set[str] = set()
        self.packed_off: str | None = "mode=plain" if mode == "plain" else self._why_not_packed()
        if mode == "packed" and self.packed_off:
            raise ValueError(f"mode=packed: {self.packed_off}; use mode=auto")

    # ------------------------------------------------------------------------------------------------ planning
    def plan(self, items: Sequence[Item], shared: bool = True) -> Plan:
        """Everything of a forward that depends neither on E nor on the weights. shared=False: plain rows.

        Raises:
            ValueError: no items, items with and without media together, an item whose prefix has not exactly the media
                tokens of the recorded blank, a branch without a target, or a target that nothing precedes.
        """
        items = [item.cpu() for item in items]
        if any(item.media for item in items) and self.anchor is None:
            raise ValueError("plan: items with media need an anchor; BranchForward was made with anchor=None")
        check_items(items, *self._media_tokens())
        media = items[0].media
        if shared and not self.packed_off and self.mode == "auto" and media not in self._tried:
            self._try_packed(media)
        off = self.packed_off or self._why_not_these(items)
        if shared and off and self.mode != "plain":
            self._tell(off)
        return self._plain(items, media) if off or not shared else self._packed(items, media)

    def settle(self) -> None:
        """Tries the packed form now, on text and on the blank, where `plan` would do so when it first meets one. Ranks
        that share a model's shards must not each do it in their own time."""
        for media in (False, True) if self.anchor is not None else (False,):
            if not self.packed_off and self.mode == "auto" and media not in self._tried:
                self._try_packed(media)

    def plan_text(self, items: Sequence[Item], shared: bool = True) -> Plan:
        """`plan` for items that must all be without media; its forward takes no E."""
        if any(item.media for item in items):
            raise ValueError("plan_text: got an item with media=True, expected text only; use plan()")
        return self.plan(items, shared)

    def _packed(self, items: Sequence[Item], media: bool, trial: bool = False) -> Plan:
        layouts = self._layouts.get([item.prefix for item in items], media)
        rows = packed_rows(items, layouts, self._pad).to(self._device)
        masks = {
            kind: packed_mask(rows, layouts, kind, window, self._dtype) for kind, window in self._mask_kinds().items()
        }
        inputs = {
            "input_ids": rows.ids,
            "attention_mask": masks.get("", masks),
            "position_ids": rows.positions,
            "use_cache": False,
        }
        causal = self._causal_tokens(rows, layouts, 1 if trial else WORTH_SPLITTING)
        return Plan("packed", inputs | self._media_inputs(media, len(items)), rows, len(items), media, causal)

    def _plain(self, items: Sequence[Item], media: bool) -> Plan:
        rows = plain_rows(items, self._pad).to(self._device)
        column = torch.arange(rows.ids.shape[1], device=rows.ids.device)
        types = self.anchor.type_inputs(rows.ids) if self.anchor is not None else {}
        if types and self._layouts.is_prefix_lm():
            types["token_type_ids"] = torch.where(column >= rows.answer[:, None], 1, types["token_type_ids"])
        inputs = {
            "input_ids": rows.ids,
            "attention_mask": (column < rows.length[:, None]).long(),
            "use_cache": False,
        }
        return Plan("plain", inputs | types | self._media_inputs(media, len(rows.ids)), rows, len(items), media)

    # ------------------------------------------------------------------------------------------------ running
    def __call__(self, plan: Plan, E: Tensor | Mapping[str, Tensor] | None = None) -> BranchLogits:
        """One forward.

        Args:
            E: as `Anchor.inject` takes it, all items concatenated on dim 0 in the plan's order; None without media.
        """
        if plan.media != (E is not None):
            raise ValueError(f"E: got {'none' if E is None else 'one'} for a plan of items with media={plan.media}")
        rows = plan.rows
        with contextlib.ExitStack() as stack:
            if E is not None:
                assert self.anchor is not None
                stack.enter_context(self.anchor.inject(self._for_rows(E, plan), len(rows.ids)))
            stack.enter_context(self._last_mlp_at(rows))
            if plan.causal and not recomputes(self._layers):
                mask = plan.inputs["attention_mask"]
                stack.enter_context(causal_prefix(self._text_config, plan.causal, mask))
            stack.enter_context(self._logits_at(rows.row, rows.column))
            logits = self.model(**plan.inputs).logits[0]
        return BranchLogits(logits, rows.labels, rows.item, rows.branch)

    @contextlib.contextmanager
    def _logits_at(self, row: Tensor, column: Tensor) -> Iterator[None]:
        """Inside, only these places reach the output embedding; logits are [1, T, V]. The family's own scaling and
        soft-capping come after it and stay."""

        def gather(module: nn.Module, args: tuple) -> tuple:
            return (args[0][row, column][None], *args[1:])

        handle = self.base.get_output_embeddings().register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _last_mlp_at(self, rows: Rows) -> Iterator[None]:
        """Inside, the last layer's MLP works on the places that predict a target. Not under activation checkpointing,
        which runs the layer again after this context has ended."""
        if self._last_mlp is None or recomputes(self._layers):
            yield
            return
        # Each place once: two branches' first targets are predicted by the same token, the last of the prefix.
        places = torch.unique(rows.row * rows.ids.shape[1] + rows.column)
        with mlp_at(self._last_mlp, places, rows.ids.shape):
            yield

    def _for_rows(self, E: Tensor | Mapping[str, Tensor], plan: Plan) -> Tensor | Mapping[str, Tensor]:
        """The plain rows of one item share its E; their gradients add up in it."""
        if plan.form == "packed":
            return E
        assert self.anchor is not None
        fitted, row_item = self.anchor.fitted(E, plan.items), plan.rows.row_item
        return {p: e.unflatten(0, (plan.items, -1))[row_item.to(e.device)].flatten(0, 1) for p, e in fitted.items()}

    # ------------------------------------------------------------------------------------------------ where it is valid
    def _why_not_packed(self) -> str | None:
        attention = self._text_config._attn_implementation
        if attention not in ("sdpa", "eager"):
            return (
                f"the attention implementation {attention!r} takes no mask of one value for each query and key; load "
                "the model with attn_implementation='sdpa'"
            )
        unknown = set(getattr(self._text_config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if unknown:
            return f"layers of the type {', '.join(sorted(unknown))} cannot keep branches apart"
        return None

    def _why_not_these(self, items: Sequence[Item]) -> str | None:
        if self._layouts.is_prefix_lm() and not all(bool(b.target[0]) for item in items for b in item.branches):
            return "in this family all of a prompt sees all of it: branches with words before a target share no prefix"
        return None

    def _causal_tokens(self, rows: PackedRows, layouts: Sequence[PrefixLayout], least: int) -> int:
        """As `Plan.causal`: none where a layer has a window, or the family's media see themselves both ways."""
        config = self._text_config
        if config._attn_implementation != "sdpa" or self._mask_kinds() != {"": None}:
            return 0
        if any(layout.visible is not None for layout in layouts):
            return 0
        grouped = getattr(config, "num_key_value_heads", None) != getattr(config, "num_attention_heads", None)
        if grouped and self._device.type == "cuda" and self._dtype == torch.float32:
            return 0  # without a mask transformers asks for grouped heads, for which torch has no such kernel there
        shortest = int(rows.prefix_length.min())
        return shortest if shortest >= least else 0

    def _mask_kinds(self) -> dict[str, int | None]:
        """{layer type: window}; the one key "" where the decoder takes a single mask."""
        config = self._text_config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = set(getattr(config, "layer_types", None) or [])
        if not kinds:
            return {"": window}  # Mistral: one window for all layers
        if kinds == {"full_attention"}:
            return {"": None}
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}

    def _try_packed(self, media: bool) -> None:
        """Packed against plain with two branches on the recorded blank (without an anchor: on a few token ids). Turns
        packed off if they differ."""
        self._tried.add(media)
        prefix = words = torch.arange(1, 9)
        if self.anchor is not None:
            prefix = self.anchor.blank_ids
            words = prefix[~torch.isin(prefix, torch.tensor(sorted(self.anchor.media_token_ids)))]
        branches = [Branch(ids, torch.ones(len(ids), dtype=torch.bool)) for ids in (words[:7].flip(0), words[-5:])]
        items = [Item(prefix if media else words, tuple(branches), media)]
        E = self.anchor.E0_by_path if media and self.anchor is not None else None
        with evaluating(self.base), torch.no_grad():
            try:
                packed = self(self._packed(items, media, trial=True), E).logits.float()
            except (RuntimeError, ValueError, TypeError) as error:
                self.packed_off = f"the packed form fails for this model ({type(error).__name__}: {error})"
                return
            plain = self(self._plain(items, media), E).logits.float()
        # Measured on tiny models: right at most 5e-7 (fp32) and 0.007 (bf16), with a leaking mask at least 0.08.
        apart = float((packed - plain).square().mean().sqrt() / plain.std().clamp_min(1e-9))
        if not apart < (1e-3 if self._dtype == torch.float32 else 0.05):
            self.packed_off = f"the packed form gives other logits than the plain one ({apart:.2g} standard deviations)"

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("%s: branches run as separate rows (slower): %s", self._name, why)

    # ------------------------------------------------------------------------------------------------ the model
    def _media_tokens(self) -> tuple[frozenset[int], int]:
        """(ids of the placeholders, how many one item has)."""
        if self.anchor is None:
            return frozenset(), 0
        ids = self.anchor.media_token_ids
        return ids, int(torch.isin(self.anchor.blank_ids, torch.tensor(sorted(ids))).sum())

    def _media_inputs(self, media: bool, n: int) -> dict[str, Any]:
        return self.anchor.media_inputs(n) if media and self.anchor is not None else {}

    @property
    def _name(self) -> str:
        return type(self.base).__name__

    @property
    def _device(self) -> torch.device:
        return next(self.base.get_input_embeddings().parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.base.get_input_embeddings().parameters() if p.is_floating_point())

    @property
    def _pad(self) -> int:
        pad, taken = self._text_config.pad_token_id, self._media_tokens()[0]
        if isinstance(pad, int) and 0 <= pad < self._text_config.vocab_size and pad not in taken:
            return pad
        return next(i for i in range(len(taken) + 1) if i not in taken)


@contextlib.contextmanager
def mlp_at(mlp: nn.Module, places: Tensor, shape: tuple[int, ...]) -> Iterator[None]:
    """Inside, the MLP of the last layer works on these places of [R, S] (flat) and gives zero elsewhere, where nothing
    looks any more: after that layer no place sees another."""

    def gather(module: nn.Module, args: tuple) -> tuple:
        return (args[0].flatten(0, 1)[places][None], *args[1:])

    def scatter(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        whole = out.new_zeros(shape[0] * shape[1], out.shape[-1]).index_copy(0, places, out[0])
        return whole.view(*shape, -1)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_mlp(base: Any) -> nn.Module | None:
    """The MLP of the decoder's last layer, where the decoder has a list `layers` of layers with a module `mlp`, and it
    is a plain one: a mixture of experts counts its tokens."""
    children = dict(base.get_decoder().named_children())
    layers = children.get("layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return None
    mlp = dict(layers[-1].named_children()).get("mlp")
    experts = mlp is not None and any(name.endswith(("experts", "router")) for name, _ in mlp.named_modules())
    return None if experts else mlp
