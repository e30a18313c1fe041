"""The key-value cache of a causal model, by the name that the installed transformers has for it.

5.20 calls it `past_key_values`, in and out; 5.24 `cache`, and warns of the old name until 5.40 takes it away.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def given(cache: Any) -> dict[str, Any]:
    """The argument of a forward that reads on from `cache` (None: from nothing) and makes it longer."""
    return {NAME: cache}


def kept(out: Any) -> Any:
    """The cache that a forward with `use_cache=True` returned; None if the model keeps none."""
    return out.get(NAME)
