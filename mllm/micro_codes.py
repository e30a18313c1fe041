"""Where every embedded model's tower puts what it sees or hears: an offset, and a code for each word and style.

lightning_modules/micro_tower.py trains towers to it; a language model that reads one tower's output can start from one
that reads another's (mllm/micro_qwen2_audio.py).
"""

from __future__ import annotations

import torch

SCALE = 4.0
"""Root mean square of a position's offset after the last layer, near that of the layers before it."""
CODE = 0.6
"""Root mean square of one code, in units of `SCALE`."""


def offset(d: int) -> torch.Tensor:
    """What all captions have in common, in units of `SCALE`: [d] of -1 and 1."""
    return torch.randn(d, generator=torch.Generator().manual_seed(1)).sign()


def like_captions(n: int, d: int) -> torch.Tensor:
    """Vectors that lie where captions of three codes lie: [n, d]."""
    return SCALE * (offset(d) + 3**0.5 * CODE * torch.randn(n, d))
