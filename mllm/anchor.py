"""The anchor: where the modality encoder M ends and the projector P begins, in any model, without family code.

SEA (arXiv 2502.12562, section 3) optimises E, a tensor in the output space of M, in place of M(image | video | audio).
Only the module path of the projector has to be known:

    anchor = Anchor(model, "model.multi_modal_projector")
    anchor.record(**processor(text=..., images=blank))       # once: learns E0 and what the model calls before P
    with anchor.inject(E, batch_size=3):                     # E = three items, concatenated on dim 0
        loss = model(**inputs, **anchor.media_inputs(3)).loss
    loss.backward()                                          # the gradient reaches E, the encoder has not run

*Recording* is one ordinary forward on ONE blank item. E0 is the projector's first argument; the modules to bypass are
the maximal modules that run before the projector without containing it. *Injecting* lets those modules return at once
something shaped like what they returned for the blank, and swaps the projector's first argument for E. All that the
family does in between and after (reshaping, token scatter, masks, multimodal positions) is the model's own code.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.blank import TYPE_INPUTS, Blank
from mllm.replay import Replay, Trace, base_model, evaluating, first_argument, logits_of, swap_first_argument

logger = logging.getLogger(__name__)


class Anchor:
    """Records one blank item, then injects E at the projector of `model` (a transformers model or a PEFT model of one).

    Args:
        model: a multimodal causal language model. It may be wrapped by PEFT before or after the anchor is made.
        projector: module path of the projector from the transformers model on, e.g. `model.multi_modal_projector`; a
            list of paths where several modules read the encoder (Qwen3-VL: the merger and every deepstack merger).
        modality: where it is not image, video, audio or speech: the config's `<modality>_token_id` counts as well.

    Raises:
        ValueError: a path names no module (the message lists close matches).
    """

    def __init__(self, model: nn.Module, projector: str | Sequence[str], modality: str = "") -> None:
        self.base: Any = base_model(model)
        self.projectors = (projector,) if isinstance(projector, str) else tuple(projector)
        self.modality = modality
        self._bare = isinstance(projector, str)  # a str: E0 is a tensor; a list: a mapping from path to tensor
        if not self.projectors or len(set(self.projectors)) < len(self.projectors):
            raise ValueError(f"projector: got {list(self.projectors)}, expected one or more different module paths")
        for path in self.projectors:
            require_module(self.base, path)
        self.E0_by_path: dict[str, Tensor] = {}
        self._blank: Blank | None = None
        self._replays: dict[str, Replay] = {}
        self._injecting = False
        self._offloaded = False

    # ------------------------------------------------------------------------------------------------ recording
    def record(self, **blank_inputs: Any) -> Any:
        """Runs the model on ONE blank item (batch size 1) and learns the boundary from it.

        Use a blank that is not exactly zero after preprocessing: SmolVLM and Idefics3 take all-zero images for padding.

        Args:
            blank_inputs: everything the processor returned for a prompt with one blank image, video or silence.

        Returns:
            The model's output for the blank.

        Raises:
            ValueError: no or more than one row of `input_ids`, token types missing, a projector that was never called
                or called more than once, or an encoder that cannot be bypassed there.
        """
        self._require_encoder("record")
        for name in TYPE_INPUTS:
            if name in inspect.signature(self.base.forward).parameters and name not in blank_inputs:
                raise ValueError(
                    f"record: {type(self.base).__name__} reads {name}, but got only {sorted(blank_inputs)}; "
                    "pass everything that the processor returns"
                )
        blank = Blank(blank_inputs, self.base.config, self.modality)
        trace = Trace(self.base, self.projectors)
        with evaluating(self.base), torch.no_grad(), trace:
            output = self.base(**blank_inputs)
        self._forget_positions()
        for path in self.projectors:
            if trace.calls[path] != 1:
                how = "never called" if not trace.calls[path] else f"called {trace.calls[path]} times"
                raise ValueError(
                    f"record: the projector {path!r} was {how}, expected once; got the inputs {sorted(blank_inputs)}: "
                    "pass ONE blank item of the one modality that this projector reads"
                )
        self.E0_by_path = {path: trace.first_argument[path] for path in self.projectors}
        self._blank = blank
        self._prove_bypass(trace.outputs, blank, logits_of(output))
        return output

    @property
    def E0(self) -> Tensor | dict[str, Tensor]:
        """What the encoder made of the blank: a tensor if `projector` was a str, else {path: tensor}."""
        self._recorded("E0")
        return self.E0_by_path[self.projectors[0]] if self._bare else self.E0_by_path

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        """The modules that do not run under injection, by path."""
        self._recorded("encoder_modules")
        return {path: self.base.get_submodule(path) for path in self._replays}

    @property
    def blank_ids(self) -> Tensor:
        """LongTensor [S] on the CPU: the recorded prompt."""
        return self._recorded("blank_ids").ids

    @property
    def media_token_ids(self) -> frozenset[int]:
        """The placeholder token ids of the recorded modality, e.g. the id of `<image>`."""
        return self._recorded("media_token_ids").media_token_ids

    def media_inputs(self, n: int) -> dict[str, Any]:
        """The recorded inputs that describe the media, tiled for `n` items on dim 0, for calls under `inject`.

        Pixels and the like are views of one number and take no memory: what would read them is bypassed.
        """
        return self._recorded("media_inputs").media_inputs(n, self.device)

    def type_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The token types (`mm_token_type_ids`, `token_type_ids`) that the family reads for prompts [B, S], or {}."""
        return self._recorded("type_inputs").type_inputs(input_ids)

    # ------------------------------------------------------------------------------------------------ injecting
    @contextlib.contextmanager
    def inject(self, E: Tensor | Mapping[str, Tensor], batch_size: int = 1) -> Iterator[None]:
        """Inside, the model sees `E` where the encoder's output would be, in forward and in generate, and the encoder
        does not run. Rows without media may be in the batch: `batch_size` counts the media items.

        Args:
            E: [batch_size * E0.shape[0], *E0.shape[1:]], items concatenated on dim 0, floating point; it is cast to the
                dtype of E0 and the gradient flows back to it. With several projectors: {path: tensor}.
            batch_size: number of media items in every model call inside.

        Raises:
            ValueError: nothing recorded yet, or E does not fit E0 (the message has both shapes).
            RuntimeError: inject inside inject.
        """
        if self._injecting:
            raise RuntimeError("inject: already inside inject() of this anchor; leave it first")
        given, device = self.fitted(E, batch_size), self.device
        handles, shadowed = [], []
        self._injecting = True
        try:
            for path, replay in self._replays.items():
                module = self.base.get_submodule(path)
                shadowed.append((module, module.__dict__.get("forward")))  # accelerate puts one there as well
                module.forward = replay.bind(batch_size, device)
            for path, e in given.items():
                swap = functools.partial(swap_first_argument, e)
                handles.append(self.base.get_submodule(path).register_forward_pre_hook(swap, with_kwargs=True))
            yield
        finally:
            self._injecting = False
            for handle in handles:
                handle.remove()
            for module, forward in shadowed:
                del module.forward
                if forward is not None:
                    module.forward = forward
            self._forget_positions()

    def fitted(self, E: Tensor | Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """E as {path: tensor of E0's dtype on the projector's device}; ValueError if it does not fit E0."""
        self._recorded("inject")
        if isinstance(E, Tensor):
            if len(self.projectors) > 1:
                raise ValueError(
                    f"inject: got one tensor for {len(self.projectors)} projectors, expected a mapping with the keys "
                    f"{list(self.projectors)}"
                )
            E = {self.projectors[0]: E}
        if set(E) != set(self.projectors):
            raise ValueError(f"inject: E has the paths {sorted(E)}, expected {sorted(self.projectors)}")
        fitted = {}
        for path, e0 in self.E0_by_path.items():
            e, expected = E[path], (batch_size * e0.shape[0], *e0.shape[1:])
            if tuple(e.shape) != expected:
                raise ValueError(
                    f"inject: E for {path!r} has the shape {tuple(e.shape)}, expected {expected}: {batch_size} item(s) "
                    f"of the recorded shape {tuple(e0.shape)}, concatenated on dim 0"
                )
            if not e.is_floating_point():
                raise ValueError(
                    f"inject: E for {path!r} is of {e.dtype}, expected a floating point type, e.g. {e0.dtype}"
                )
            weight = next(self.base.get_submodule(path).parameters(), None)
            fitted[path] = e.to(device=self.device if weight is None else weight.device, dtype=e0.dtype)
        return fitted

    # ------------------------------------------------------------------------------------------------ the encoder
    def observe(self, **inputs: Any) -> dict[str, Tensor]:
        """Runs M on real media and returns {path: projector input}; stops before the last projector runs. Any batch
        size: items are concatenated on dim 0.

        Raises:
            ValueError: a projector was not reached.
            RuntimeError: inside inject(), or after offload_encoder().
        """
        self._require_encoder("observe")
        seen: dict[str, Tensor] = {}

        def note(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[path] = first_argument(path, args, kwargs).detach()
            if len(seen) == len(self.projectors):
                raise _Reached

        handles = []
        try:
            for path in self.projectors:
                hook = functools.partial(note, path)
                handles.append(self.base.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
            with evaluating(self.base), torch.no_grad(), contextlib.suppress(_Reached):
                self.base(**inputs)
        finally:
            for handle in handles:
                handle.remove()
            self._forget_positions()
        missed = [path for path in self.projectors if path not in seen]
        if missed:
            raise ValueError(
                f"observe: the projector {missed[0]!r} was never called; got the inputs {sorted(inputs)}: are the "
                "media among them?"
            )
        return {path: seen[path] for path in self.projectors}

    def offload_encoder(self) -> int:
        """Frees the weights of the bypassed modules, for good; returns the bytes freed. Injection goes on as before.

        Each weight becomes a tensor of no elements, of its dtype and on its device. (On the `meta` device Idefics3 and
        Qwen2Audio break, because `model.device` then says `meta`, and the model can be moved no more.) An adapter can
        be saved after this; to save or merge the whole model, or to encode real media, load it again.
        """
        inside = {id(p) for module in self.encoder_modules.values() for p in module.parameters()}
        bypassed = tuple(path + "." for path in self._replays)
        named = self.base.named_parameters(remove_duplicate=False)
        tied = {id(p) for name, p in named if not name.startswith(bypassed)}
        freed = 0
        for parameter in self.base.parameters():
            if id(parameter) in inside - tied:
                freed += parameter.numel() * parameter.element_size()
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = parameter.data.new_empty(0)
        self._offloaded = True
        return freed

    @property
    def device(self) -> torch.device:
        return next(self.base.get_input_embeddings().parameters()).device

    # ------------------------------------------------------------------------------------------------ helpers
    def _prove_bypass(self, outputs: dict[str, list[Any]], blank: Blank, logits: Tensor) -> None:
        """Injects E0 while every bypassed module replays NaN and the media inputs are constants. If that gives the
        blank's logits, nothing of the encoder gets round the projectors and none of these values has to be kept, tiled
        or moved. Otherwise keeps those that matter, and says so."""

        def same(without_values: Collection[str], constant_media: bool) -> bool:
            self._replays = {path: Replay(outs, path not in without_values) for path, outs in outputs.items()}
            blank.make_media_constant(constant_media)
            try:
                with evaluating(self.base), torch.no_grad(), self.inject(self.E0_by_path):
                    got = logits_of(self.base(**blank.text, **self.media_inputs(1)))
            except (RuntimeError, IndexError, ValueError) as error:  # NaN read as a size or an index, a view of a view
                logger.debug("replay without the values of %s: %s", list(without_values), error)
                return False
            return bool((got - logits).abs().max() <= 0.02 * logits.std())  # False for NaN

        if same(outputs, True) or same(outputs, False):
            return
        blind = [path for path in outputs if same([path], False)]
        if not same(blind, False) and not same([], False):
            raise ValueError(
                f"record: {type(self.base).__name__} gives other logits for the blank's own E0 than for the blank; the "
                f"encoder cannot be bypassed at {list(self.projectors)}"
            )
        logger.warning(
            "%s: the output of %s reaches the language model round the projector(s) %s; the blank's is used for it. "
            "If these are projectors too, name them all.",
            type(self.base).__name__,
            [path for path, replay in self._replays.items() if replay.keep],
            list(self.projectors),
        )

    def _forget_positions(self) -> None:
        """Qwen models keep the last prompt's `rope_deltas`, which misleads later calls."""
        for module in (self.base, getattr(self.base, "model", self.base)):
            if getattr(module, "rope_deltas", None) is not None:
                module.rope_deltas = None

    def _recorded(self, what: str) -> Blank:
        if self._blank is None:
            raise ValueError(f"{what}: nothing recorded yet; call anchor.record(**blank_inputs) first")
        return self._blank

    def _require_encoder(self, what: str) -> None:
        if self._injecting:
            raise RuntimeError(f"{what}: inside inject() the encoder does not run; leave it first")
        if self._offloaded:
            raise RuntimeError(
                f"{what}: the encoder's weights were freed by offload_encoder(); load the model again to encode media"
            )


class _Reached(Exception):
    """Ends a forward whose rest is not needed."""


def require_module(base: nn.Module, path: str) -> None:
    """Raises ValueError, with close matches, unless the model has a module of that path."""
    try:
        base.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in base.named_modules() if name]
        last = [name for name in names if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
        close = list(dict.fromkeys([*last, *difflib.get_close_matches(path, names, n=3, cutoff=0.5)]))[:4]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"projector: {type(base).__name__} has no module {path!r}; {hint}") from None
