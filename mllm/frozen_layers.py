"""The frozen lower layers of a text model: their output is computed once for each text and never again.

    lower = LowerLayers(model, 20)              # the first 20 layers of a decoder or encoder
    bank = lower.features(texts)                # once over the data
    with lower.replaced():                      # the model now begins at layer 20
        lower.feed(bank[...])                   # ... with these hidden states, whatever ids it is given
        model(input_ids=ids, attention_mask=mask)

No family is special-cased: the layers are the one `ModuleList` as long as the configuration says, and what is replaced
is the first argument of the first layer that stays. `features` compares both ways on one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


class _Reached(Exception):
    """The first layer that stays was reached: nothing behind it needs to run."""


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name in it.

    Raises:
        ValueError: there is not exactly one list of that length.
    """
    n = model.config.get_text_config().num_hidden_layers
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == n
    ]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: {len(found)} lists of {n} layers, expected one; set frozen_layers=0")
    return found[0]


def text_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder or encoder. Raises ValueError as `layers_of` does."""
    owner, name = layers_of(model)
    return list(getattr(owner, name))


def freeze_lower(model: PreTrainedModel, n: int) -> None:
    """Embeddings and the first `n` layers get no gradient; everything else does.

    Raises:
        ValueError: the model has no `n` layers.
    """
    owner, name = layers_of(model)
    layers = getattr(owner, name)
    if not 0 <= n < len(layers):
        raise ValueError(
            f"backbone.frozen_layers={n}: the model has {len(layers)} layers, one at least must be trained"
        )
    model.requires_grad_(True)
    if n:
        for part in (model.get_input_embeddings(), *layers[:n]):
            part.requires_grad_(False)
        embeddings = getattr(model.base_model, "embeddings", None)  # encoders: positions and normalisation too
        if isinstance(embeddings, nn.Module):
            embeddings.requires_grad_(False)


class LowerLayers:
    """See above. `n`: how many layers are below."""

    def __init__(self, model: PreTrainedModel, n: int) -> None:
        self.model, self.n = model, n
        self.owner, self.name = layers_of(model)
        self._fed: torch.Tensor | None = None

    @property
    def remaining(self) -> list[nn.Module]:
        """The layers that run: inside `replaced`, those from layer n on."""
        return list(getattr(self.owner, self.name))

    def features(self, texts: Sequence[Sequence[int]], pad_id: int, batch_size: int = 64) -> list[torch.Tensor]:
        """Hidden states that enter layer n, for each text [T, d], on the CPU in the model's dtype.

        The caller sees to it that the model is in evaluation mode and unchanged below layer n ever after.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out: list[Any] = [None] * len(texts)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            hidden = self._hidden(*self._padded([texts[i] for i in part], pad_id))
            for row, i in zip(hidden, part, strict=True):
                out[i] = row[: len(texts[i])].clone().cpu()
        self._prove([texts[i] for i in order[:2]], [out[i] for i in order[:2]], pad_id)
        return out

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside, the model begins at layer n."""
        whole = getattr(self.owner, self.name)
        hook = whole[self.n].register_forward_pre_hook(self._replace, with_kwargs=True)
        setattr(self.owner, self.name, whole[self.n :])
        try:
            yield
        finally:
            hook.remove()
            setattr(self.owner, self.name, whole)
            self._fed = None

    def feed(self, features: Sequence[torch.Tensor]) -> None:
        """The hidden states of the next forward, one [T, d] for each row."""
        self._fed = pad_sequence(list(features), batch_first=True).to(self.model.device)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._fed is not None, "feed() before each forward"
        fed, self._fed = self._fed, None
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        assert fed.shape == given.shape, f"fed {tuple(fed.shape)}, expected {tuple(given.shape)}"
        fed = fed.to(given.dtype)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": fed}
        return (fed, *args[1:]), kwargs

    @torch.no_grad()
    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            raise _Reached

        hook = getattr(self.owner, self.name)[self.n].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model.base_model(input_ids=ids, attention_mask=mask)
        except _Reached:
            pass
        finally:
            hook.remove()
        return caught[0]

    @torch.no_grad()
    def _prove(self, texts: Sequence[Sequence[int]], features: Sequence[torch.Tensor], pad_id: int) -> None:
        ids, mask = self._padded(texts, pad_id)
        expected = self.model.base_model(input_ids=ids, attention_mask=mask)[0]
        with self.replaced():
            self.feed(features)
            found = self.model.base_model(input_ids=ids, attention_mask=mask)[0]
        kept = mask.bool()
        apart = float((found[kept] - expected[kept]).abs().max() / expected[kept].abs().max().clamp(min=1e-6))
        if apart > 0.02:  # one bfloat16 rounding; a real mistake is of order one
            raise ValueError(
                f"{type(self.model).__name__}: beginning at layer {self.n} gives other results ({apart:.2g} apart); "
                "set cache_frozen=false"
            )

    def _padded(self, texts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(list(ids)) for ids in texts]
        device = self.model.device
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device), mask.to(device)
