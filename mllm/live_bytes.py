"""Counts the bytes of all tensors alive, and the most there were, while code runs: on real tensors or on fake ones.

    with FakeTensorMode(), LiveBytes() as live:     # fake tensors have shapes and no memory: 7B fit on a laptop
        live.count(*model.parameters())
        model(**inputs).loss.backward()
    live.peak                                       # bytes

What autograd keeps for the backward pass, gradients, and the results in between are counted as they come and go. What a
kernel takes for itself inside is not seen, nor what an allocator rounds up.
https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """live: bytes now. peak: the most since the start or since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def count(self, *tensors: Tensor) -> None:
        """Tensors that were there before."""
        for tensor in tensors:
            self._add(tensor)

    def reset(self) -> None:
        """The peak is what is there now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _, key=key: self._remove(key)), size  # type: ignore[misc]
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


def bytes_of(tensors: Any) -> int:
    """Of these tensors together, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
