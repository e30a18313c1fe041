"""The model card beside trained weights, from what the run knows: PEFT's own is an empty form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from configs.keys import leaves
from configs.schema import AlignVariant, Config

METHODS = {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimisation (DPO, arXiv 2305.18290)"}
DATA = {
    "text": "text safety records alone: no media, and no embeddings of media",
    "sea": "text safety records, and embeddings in place of encoded media (SEA, arXiv 2502.12562)",
}
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

base = AutoModelForMultimodalLM.from_pretrained({base}, revision={revision}, dtype={dtype})
model = PeftModel.from_pretrained(base, "path/of/this/folder").eval()
"""
PLUGIN = "# Import {plugin} first: it registers the model's classes with transformers.\n"
LOAD_WHOLE = """\
from transformers import AutoModelForMultimodalLM

model = AutoModelForMultimodalLM.from_pretrained("path/of/this/folder", dtype={dtype}).eval()
"""
CARD = """\
# {name}: {base} aligned by Seawall

A research artefact: it was trained to refuse harmful requests and to go on answering harmless ones. How far it does
either is measured in `report.md` of its run (`evaluate` stage), on the benchmarks named there, and nowhere else. Do not
take it for a safe model; a refusal rate says nothing without benign compliance beside it.

- base model: `{base}`{revision}, modality {modality}; its licence holds for these weights too
- variant: `{name}`, {method}, {weights}
- data: {data}; records of `{source}`, {examples} examples, {embeddings} embeddings{real}
- made by: Seawall, experiment `{experiment}`, seed {seed}, {versions}

## Loading

```python
{load}```

The prompt is the base model's own chat template{system}.

## Settings

{settings}
"""


def model_card(
    cfg: Config, name: str, variant: AlignVariant, result: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """`README.md` of `align/<name>/adapter`.

    Args:
        result: what the stage hands on: examples, embeddings, real_embeddings.
        versions: package -> version.
    """
    base, whole = cfg.model.path, variant.full_finetune
    head = {"base_model": base, "tags": ["seawall", variant.method, *([] if whole else ["lora"])]}
    head |= {} if whole else {"library_name": "peft"}
    load = LOAD_WHOLE if whole else LOAD_ADAPTER
    body = CARD.format(
        name=name,
        base=base,
        revision=f" at `{cfg.model.revision}`" if cfg.model.revision else "",
        modality=cfg.model.modality,
        method=METHODS[variant.method],
        weights="all weights but the encoder's" if whole else f"LoRA of rank {variant.lora.r}",
        data=DATA[variant.data],
        source=cfg.data.name,
        examples=result["examples"],
        embeddings=result["embeddings"],
        real=f" ({result['real_embeddings']} of real media)" if result["real_embeddings"] else "",
        experiment=cfg.experiment,
        seed=cfg.seed,
        versions=", ".join(f"{package} {number}" for package, number in versions.items()),
        load=(PLUGIN.format(plugin=cfg.model.plugin) if cfg.model.plugin else "")
        + load.format(base=repr(base), revision=repr(cfg.model.revision), dtype=repr(cfg.model.dtype)),
        system=f", with the system prompt {cfg.model.system_prompt!r}" if cfg.model.system_prompt else "",
        settings="\n".join(f"- {leaf.key}: `{leaf.value}`" for leaf in leaves(variant)),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}"
