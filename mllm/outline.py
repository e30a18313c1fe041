"""A multimodal model without its weights: parameters, media tokens and the shape of E from the configuration alone.

The model is built on the meta device (shapes, no memory, nothing read but config.json and the processor's files). What
the encoder makes of the blank is found as the anchor finds it (mllm/anchor.py), by a forward that ends at the
projector; for it the encoder alone gets weights, all of them zero. For a step all weights become fake tensors on the
CPU, which every kernel takes for real ones but which have no memory, and the real code runs on them
(mllm/rehearsal.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, GenerationConfig, ProcessorMixin

from configs.schema import Model
from mllm.anchor import require_module
from mllm.live_bytes import bytes_of
from mllm.loading import checkpoint, end_ids
from mllm.media import blank_medium, media_arguments
from mllm.plugins import load_plugin
from mllm.prompts import PromptEncoder
from mllm.replay import Trace
from mllm.video_processing import register


@dataclass(frozen=True)
class Outline:
    """What is known of a model that is not there.

    model: weights on the meta device, to be used under `faked` and `mode`. shapes: of one item's E, by projector.
    encoder: paths of the modules that do not run in training. media_ids, media_tokens: ids of the placeholder tokens,
    and how many one item has.
    """

    model: Any
    mode: FakeTensorMode
    prompts: PromptEncoder
    spec: Model
    shapes: dict[str, tuple[int, ...]]
    encoder: tuple[str, ...]
    media_ids: frozenset[int]
    media_tokens: int

    def parameters(self) -> int:
        """Weights, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def weight_bytes(self) -> int:
        return bytes_of([*self.model.parameters(), *self.model.buffers()])


def outline(spec: Model) -> Outline:
    """Builds it. Reads config.json and the processor's files (tokenizer, preprocessing), no weights.

    Raises:
        ValueError: they are not there; says how to give them.
    """
    if spec.plugin:
        load_plugin(spec.plugin)
    register()
    source = checkpoint(spec.path)
    config, processor = _read(spec, source)
    model = _empty(spec, source, config)
    blank = media_arguments(spec, processor, [blank_medium(spec, processor)])
    prompts = PromptEncoder(processor, spec.modality, blank, end_ids(model, processor), spec.system_prompt)
    inputs = prompts.blank_inputs(spec.prompts.style.format(modality=spec.modality))
    media_ids, tokens = _media_tokens(spec, config, inputs["input_ids"][0])
    try:
        with _shallow(model) as lists:
            shapes, seen = _observed(model, spec, inputs)
    except (ValueError, IndexError, RuntimeError, TypeError):  # a projector reads a deeper layer
        model = _empty(spec, source, config)  # transformers has hooked the few layers of the first one
        lists, (shapes, seen) = {}, _observed(model, spec, inputs)
    cut = [f"{path}.{i}" for path, n in lists.items() for i in range(SHALLOW, n) if f"{path}.0" in seen]
    encoder = (*seen, *cut)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return Outline(model, mode, prompts, spec, shapes, encoder, media_ids, tokens)


@contextlib.contextmanager
def faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, every weight and buffer is a fake tensor on the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    before: list[tuple[Any, str, Tensor]] = []
    with mode:
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is None:
                        continue
                    before.append((kind, name, tensor))
                    if id(tensor) not in made:
                        new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if weight else new
                    kind[name] = made[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for kind, name, tensor in before:
            kind[name] = tensor


def _read(spec: Model, source: str) -> tuple[Any, ProcessorMixin]:
    how = (
        "a plan needs config.json and the small files of the processor and the tokenizer, no weights: put them into a "
        "folder and set model.path to it (`hf download OWNER/NAME --include '*.json' '*.jinja' '*.txt' '*.model' "
        "--local-dir FOLDER` fetches them)"
    )
    try:
        config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(
            source, revision=spec.revision, trust_remote_code=False, **spec.processor
        )
    except (OSError, ValueError) as error:
        there = "" if Path(source).is_dir() else " (no such folder here, and the hub did not give it)"
        raise ValueError(f"model.path={spec.path}{there}: {str(error).splitlines()[0]}\n{how}") from error
    return config, processor


def _empty(spec: Model, source: str, config: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForMultimodalLM.from_config(
            config, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attn_implementation
        )
    model.tie_weights()  # making them empty has torn them apart
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source, revision=spec.revision)
    return model.eval().requires_grad_(False)


def _media_tokens(spec: Model, config: Any, ids: Tensor) -> tuple[frozenset[int], int]:
    """As mllm/blank.py: ids that the config names and that are in the blank's prompt, and how many there are."""
    names = {
        f"{word}_token_{end}"
        for word in ("image", "video", "audio", "speech", spec.modality)
        for end in ("id", "index")
    }
    named = {value for name, value in vars(config).items() if name in names and isinstance(value, int)}
    found = frozenset(named & set(ids.tolist()))
    return found, int(torch.isin(ids, torch.tensor(sorted(found), dtype=torch.long)).sum())


SHALLOW, LARGE = 3, 50_000_000
"""Layers that are run of an encoder with more weights than that: all of it would take minutes on a laptop."""


@contextlib.contextmanager
def _shallow(model: Any) -> Iterator[dict[str, int]]:
    """Inside, lists of layers outside of the decoder have three, and their configurations say so (transformers counts
    hidden states from the end by them): what a layer puts out has the shape of what it reads.
    Gives {path: number of layers} of those that were cut."""
    decoder = {id(m) for m in model.get_decoder().modules()}
    long = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) not in decoder}
    large = sum(p.numel() for m in long.values() for p in m.parameters()) > LARGE
    long = {name: module for name, module in long.items() if large and len(module) > SHALLOW and "." in name}
    configs: dict[int, tuple[Any, int]] = {}
    for name, module in long.items():
        for owner, m in model.named_modules():
            c: Any = getattr(m, "config", None)
            inside = owner and name.startswith(f"{owner}.")  # the model itself counts its decoder's layers
            if inside and getattr(c, "num_hidden_layers", None) == len(module):
                configs[id(c)] = c, len(module)
    try:
        for name, module in long.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module[:SHALLOW])
        for c, _ in configs.values():
            c.num_hidden_layers = SHALLOW
        yield {name: len(module) for name, module in long.items()}
    finally:
        for c, n in configs.values():
            c.num_hidden_layers = n
        for name, module in long.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)


class _Reached(Exception):
    """Ends a forward whose rest is not needed."""


def _observed(model: Any, spec: Model, inputs: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Shapes of the projectors' inputs and the modules before them, from a forward of the blank on weights of zero.

    Raises:
        ValueError: a projector is not there, or was not reached.
    """

    def note(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(trace.first_argument) == len(spec.projector):
            raise _Reached

    for path in spec.projector:
        require_module(model, path)
    idle = {id(m) for m in model.get_decoder().layers.modules()} | {id(model.get_output_embeddings())}
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, p in module._parameters.items() if id(module) not in idle else ():
            if p is not None:  # zeros that nobody writes to take no memory
                before.append((module, name, p))
                module._parameters[name] = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=False)
    floats = {name: v.to(model.dtype) for name, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    given = {**inputs, **floats}
    trace = Trace(model, spec.projector)
    with torch.no_grad(), trace, contextlib.ExitStack() as stack:
        for path in spec.projector:
            handle = model.get_submodule(path).register_forward_pre_hook(
                functools.partial(note, path), with_kwargs=True
            )
            stack.callback(handle.remove)
        with contextlib.suppress(_Reached):
            model(**given)
    for module, name, p in before:  # some are tied to others
        module._parameters[name] = p
    missed = [path for path in spec.projector if path not in trace.first_argument]
    if missed:
        raise ValueError(f"the projector {missed[0]} was not reached")
    shapes = {path: tuple(trace.first_argument[path].shape) for path in spec.projector}
    return shapes, tuple(trace.outputs)
