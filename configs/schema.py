"""The structured schema of every configuration: each key with its type, default and one line of help.

Hydra composes `train.yaml` and the groups over these dataclasses, so a misspelled key is an error wherever it stands.
To add a key, add one line: `name: type = doc("help", default)`; `choices`, `low` and `high` bound it, `free=True` says
that it may change when a run is resumed (it cannot alter a result), `at_once=True` the same of how much is computed
together, which alters a result by rounding and is recorded. `train.py --help` reads everything from here.
Nothing heavy is imported: `--help` and every configuration error must answer at once.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

STAGES = (
    "pretrain_tower",
    "pretrain_language",
    "synthesize",
    "encode",
    "align",
    "train_detector",
    "train_detoxifier",
    "generate_pairs",
    "build_benchmark",
    "export",
    "evaluate",
)
"""Known stages, in the order in which they run; `stages/<name>.py` holds each one's `run(cfg, run)`."""

BENCHMARKS: dict[str, str | None] = {
    "micro": None,
    "micro_tasks": None,
    "micro_utility": None,
    "figstep": "figstep",
    "xstest": "xstest",
    "mm_safetybench": "mm_safetybench",
    "va_safetybench_video": "va_safetybench",
    "va_safetybench_audio": "va_safetybench",
    "folder": "folder",
}
"""Name in `evaluate.benchmarks` -> the key of `evaluate` that says where it lies; None: drawn, it lies nowhere."""

MODALITIES = ("image", "video", "audio")
"""Modalities whose blank, media files and processor arguments are known; any other comes with `model.plugin`."""

REQUIRED = "???"
"""Default of a key that a group file or the command line must set."""


def doc(
    help: str,
    default: Any = None,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    free: bool = False,
    at_once: bool = False,
) -> Any:
    """A field with its help; `choices` (of a string or of a list's items) and `low <= x <= high` are checked."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "free": free, "at_once": at_once}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type, help: str, default: Any = MISSING) -> Any:
    """A nested dataclass (`cls` its type), or with `default` a function that makes the field's value."""
    return field(default_factory=cls if default is MISSING else default, metadata={"help": help})


@dataclass
class Prompts:
    """What the model is asked about E. `{x}` fields are filled by the concept or the style."""

    describe_activity: str = doc("content sample, activity: question", "What activity is shown in the {modality}?")
    describe_product: str = doc("content sample, product: question", "What product is shown in the {modality}?")
    answer_activity: str = doc("content sample, activity: target", "The {modality} shows that {sentence}.")
    answer_product: str = doc("content sample, product: target", "The {modality} shows {phrase}.")
    style: str = doc("style sample: question", "What is the style of the {modality}?")
    answer_style: str = doc("style sample: target", "The style of the {modality} is {style}.")
    styles: list[str] = doc("styles, drawn by the concept's id", ["photograph", "painting", "cartoon", "sketch"])
    prefix_activity: str = doc(
        "SEA's prefix, activity",
        "The {modality} shows an activity. Please understand and answer the following question.",
    )
    prefix_product: str = doc(
        "SEA's prefix, product",
        "The {modality} shows a product. Please understand and answer the following question.",
    )
    replay: list[str] = doc(
        "questions whose answers by the unaligned model are replayed (mixture.replay)",
        ["What do you see in the {modality}?", "What text is in the {modality}?"],
    )
    verify_activity: str = doc(
        "VSR, activity: another question", "Describe what you see in the {modality} in one sentence."
    )
    verify_product: str = doc(
        "VSR, product: another question", "Describe what you see in the {modality} in one sentence."
    )


@dataclass
class Model:
    """The multimodal model and where its encoder ends (one file of `configs/model` for each)."""

    name: str = doc("short name in reports", REQUIRED)
    path: str = doc("folder of the checkpoint, or hub id (owner/name)", REQUIRED)
    revision: str | None = doc("hub revision (a commit hash); null for a folder")
    modality: str = doc(
        "what E stands for: image, video, audio, or a word of your own (lower case), which needs model.plugin", "image"
    )
    plugin: str | None = doc(
        "Python file, or folder with __init__.py, that registers model classes with transformers; from here or from "
        "the project on. It is run: take none that you have not read (docs/new-modality.md)"
    )
    projector: list[str] = doc("module path(s) of the projector P; E replaces its first argument", [])
    dtype: str = doc("dtype of the weights", "float32", choices=("float32", "bfloat16", "float16"))
    attn_implementation: str = doc("attention kernel", "sdpa", choices=("sdpa", "eager"))
    system_prompt: str | None = doc("system message put before every conversation")
    lora_targets: str = doc("regular expression of the modules that get LoRA", "")
    blank_size: list[int] = doc("width, height of the blank image or video (px)", [336, 336])
    blank_value: int = doc("grey level of the blank; never 0, some families drop black", 128, low=1, high=255)
    processor: dict[str, Any] = doc("settings of the processor, e.g. {do_image_splitting: false}", {})
    make: str | None = doc("command that makes the checkpoint when it is missing, shown in the error", free=True)
    prompts: Prompts = group(Prompts, "questions, targets and prefixes")
    blank_seconds: float = doc("audio: length of the silence that E starts from (s)", 10.0, low=0.1)
    max_seconds: float | None = doc("audio: longest clip that the model takes (s); a longer one is an error", low=0.1)
    pad_seconds: float | None = doc("audio: shorter clips get silence at their end, up to this length (s)", low=0.1)
    blank_frames: int = doc("video: frames of the blank that E starts from", 8, low=1)
    blank_shape: list[int] = doc(
        "another modality: shape of the blank array (float32), channels first, e.g. [6,128]", []
    )
    blank_level: float = doc("another modality: the one value that fills the blank", 0.0)


@dataclass
class Data:
    """Text safety data: where it lies and how its rows become records (one file of `configs/data` for each)."""

    name: str = doc("short name in reports", REQUIRED)
    format: str = doc(
        "how rows are read", "jsonl", choices=("micro", "saferlhf", "hh_rlhf", "jsonl", "csv", "huggingface")
    )
    path: str | None = doc("file or folder; huggingface: data set id; micro: null")
    subset: str | None = doc("huggingface: configuration of the data set")
    split: str = doc("huggingface: split to read", "train")
    revision: str | None = doc("huggingface: revision (a commit hash)")
    columns: dict[str, str] = doc("our field: their column, where the names differ", {})
    limit: int | None = doc("records to keep, drawn by the seed; null keeps all", low=1)
    harmless_path: str | None = doc("file, folder or data set id of harmless requests, same format")
    harmless_columns: dict[str, str] = doc("the same as columns, for harmless_path", {})
    harmless_limit: int | None = doc("harmless records to keep; null keeps all", low=0)
    holdout: float = doc("share of the prompts kept out for evaluation, split by prompt", 0.1, low=0, high=0.9)
    bad_rows: str = doc("a row that cannot be read", "stop", choices=("stop", "skip"))


@dataclass
class Api:
    """An OpenAI-compatible endpoint. The key itself never stands in a configuration, only its variable's name."""

    base_url: str = doc("address up to /v1", "https://api.openai.com/v1")
    model: str = doc("name of the model there", "gpt-4o-mini")
    key_env: str = doc("environment variable that holds the key; empty: the server wants none", "OPENAI_API_KEY")
    concurrency: int = doc("requests in flight at once", 8, low=1, free=True)
    retries: int = doc("attempts after the first, with backoff", 5, low=0, free=True)
    timeout: float = doc("seconds for one attempt", 60.0, low=0.01, free=True)
    temperature: float = doc("sampling temperature", 0.0, low=0)
    max_tokens: int = doc("longest answer (tokens)", 300, low=1)
    cache_dir: str = doc("answers by content, never paid twice", ".cache/api", free=True)


@dataclass
class Concepts:
    """Harmful phrase, kind, neutral instruction and sentence of each record."""

    extractor: str = doc(
        "auto: given where records have it, else local", "auto", choices=("auto", "given", "local", "api")
    )
    path: str = doc("local: smollm2 (from `make smol`), or folder or hub id of a chat model", "smollm2")
    cache_dir: str = doc("local: concepts by content", ".cache/concepts", free=True)
    api: Api = group(Api, "api: endpoint")


@dataclass
class Synthesis:
    """The embedding optimiser (SEA, section 3): one E for each concept, the model frozen."""

    slots: int = doc("concepts optimised at once on one device", 64, low=1, at_once=True)
    lr: float = doc("Adam's learning rate", 0.1, low=0)
    betas: list[float] = doc("Adam's betas", [0.9, 0.999])
    second_moment: str = doc(
        "Adam's second moment: of each element, or one for an embedding, whose steps keep the gradient's direction",
        "element",
        choices=("element", "embedding"),
    )
    common: float = doc("the gradient's mean over positions is added to it so many times; 0 is the paper's", 0.0, low=0)
    max_steps: int = doc("step limit of one embedding", 200, low=1)
    warmup_steps: int = doc("steps of linear warm-up of each embedding", 0, low=0)
    lr_schedule: str = doc("after the warm-up", "constant", choices=("constant", "linear", "cosine"))
    margin: float = doc("stop when every target token's logit leads the runner-up by this", 0.5, low=0)
    harmful: int | None = doc("harmful concepts; null takes all", low=0)
    harmless: int | None = doc("harmless concepts; null takes all", low=0)
    style_weight: float = doc("weight of the style sample beside the content sample's 1", 1.0, low=0)
    init_noise: float = doc("standard deviation of noise on the blank's E, in units of E0's own", 0.0, low=0)
    shared_prefix: bool = doc("compute the prefix once for both samples", True, free=True)
    checkpoint_every_steps: int = doc("steps between checkpoints of unfinished slots", 50, low=1, free=True)
    noise: float = doc("noise on E in every forward, in units of the blank's RMS; 0 is the paper's", 0.0, low=0)
    retries: int = doc("fresh starts of an embedding that missed its step limit", 1, low=0)
    verify: bool = doc("measure VSR by free generation", True)
    verify_max_new_tokens: int = doc("longest answer in verification (tokens)", 32, low=1)
    include_failed: bool = doc("let embeddings that failed into the alignment data", False)
    shards: int = doc("processes that share the work, each started by itself (a SLURM array)", 1, low=1, free=True)
    shard: int | None = doc("which of them this one is, from 0; null: the whole", low=0, free=True)


@dataclass
class Store:
    """The embedding store: sharded safetensors and an index."""

    path: str | None = doc("folder; null: synthesize/store in the run directory")
    dtype: str = doc("dtype on disk", "float32", choices=("float32", "bfloat16", "float16"))


@dataclass
class Real:
    """Real media beside the synthetic embeddings: the stage `encode` puts them into the same store."""

    path: str | None = doc("JSONL file, a row for each medium (docs/real-media.md); null: no real media")
    limit: int | None = doc("rows to take, from the top; null takes all", low=1)
    bad_rows: str = doc("a row or a medium that cannot be used", "stop", choices=("stop", "skip"))
    resize: bool = doc("scale every picture or frame to the blank's size first; audio: silence to its length", False)
    batch_size: int = doc("media encoded at once", 32, low=1, free=True)


@dataclass
class Align:
    """Which variants the stage `align` trains; their settings are in `variants.<name>`."""

    variants: list[str] = doc("names from `variants`, in order", ["text_sft", "text_dpo", "sea_sft", "sea_dpo"])
    refusal: str = doc("DPO: rejected where the model should describe E", "Sorry, I cannot help with that.")
    precompute_reference: bool = doc("DPO: reference log-probs once, cached; false: adapter off", True, free=True)
    probe_every_steps: int | None = doc(
        "ask a part of evaluate.benchmarks every so many steps, for sweeps and patience; null: never", low=1
    )
    probe_prompts: int = doc("prompts of each task and kind of request in it", 8, low=1)
    patience: int | None = doc("end after so many probes without a better objective; null: at variants.*.steps", low=1)


@dataclass
class Lora:
    """Low-rank adapters (peft); the modules are `model.lora_targets`."""

    r: int = doc("rank", 16, low=1)
    alpha: int = doc("scale = alpha / r", 32, low=1)
    dropout: float = doc("dropout before the adapter", 0.0, low=0, high=0.99)


@dataclass
class Mixture:
    """Weights of the parts of the training mixture; a part of weight 0 is left out."""

    text: float = doc("text records", 1.0, low=0)
    prefixed: float = doc("embedding + SEA's prefix + neutral instruction", 0.0, low=0)
    plain: float = doc("embedding + neutral instruction, no prefix", 0.0, low=0)
    alone: float = doc("embedding and no text, for media that can be the whole request (speech)", 0.0, low=0)
    reading: float = doc("replay: the description that an embedding was optimised for", 0.0, low=0)
    replay: float = doc("what the unaligned model answers to model.prompts.replay about an embedding", 0.0, low=0)
    harmful: float = doc(
        "share of harmful examples in every part that has both; the paper's is 2/3", 0.5, low=0, high=1
    )


@dataclass
class AlignVariant:
    """One aligned model: method, data and optimisation.

    A new variant must set `method` and `data`: so a misspelled name in an experiment file cannot pass for a new one.
    """

    method: str = doc("what is minimised", REQUIRED, choices=("sft", "dpo"))
    data: str = doc("text: text records; sea: embeddings too", REQUIRED, choices=("text", "sea"))
    steps: int = doc("optimiser steps", 200, low=1)
    batch_size: int = doc("examples in one step, over all devices", 32, low=1)
    micro_batch_size: int = doc("examples in one forward", 32, low=1, at_once=True)
    lr: float = doc("AdamW's peak learning rate", 1e-3, low=0)
    warmup_steps: int = doc("steps of linear warm-up", 10, low=0)
    weight_decay: float = doc("AdamW's weight decay", 0.0, low=0)
    grad_clip: float = doc("largest norm of the gradient; 0 turns it off", 1.0, low=0)
    embedding_noise: float = doc("noise on E in training, in units of the blank's RMS", 0.0, low=0)
    attack_radius: float = doc("largest attack on E in half of the loss, in the same units; 0: none", 0.0, low=0)
    beta: float = doc("DPO: strength of the pull to the reference", 0.1, low=0)
    loss_type: str = doc("DPO: loss", "sigmoid", choices=("sigmoid", "ipo", "hinge", "robust"))
    sft_weight: float = doc("DPO: weight of the chosen answer's mean NLL beside the DPO loss", 0.0, low=0)
    label_smoothing: float = doc("DPO: share of flipped pairs assumed", 0.0, low=0, high=0.5)
    full_finetune: bool = doc("train all weights but the encoder's instead of LoRA", False)
    lora: Lora = group(Lora, "low-rank adapters")
    mixture: Mixture = group(Mixture, "weights of the data's parts")
    checkpoint_every_steps: int = doc("steps between checkpoints", 50, low=1, free=True)
    merge: bool = doc("export a full checkpoint beside the adapter", False)


def default_variants() -> dict[str, AlignVariant]:
    """The two text-only baselines and SEA's two methods; an experiment changes or adds to them."""
    both = {"prefixed": 1.0, "plain": 1.0, "reading": 1.0}
    return {
        "text_sft": AlignVariant(method="sft", data="text"),
        "text_dpo": AlignVariant(method="dpo", data="text"),
        "sea_sft": AlignVariant(method="sft", data="sea", mixture=Mixture(**both)),
        "sea_dpo": AlignVariant(method="dpo", data="sea", mixture=Mixture(**both)),
    }


@dataclass
class Backbone:
    """The text model that a detector or a detoxifier is made from (one file of `configs/backbone` for each)."""

    # Defaults, so that the configuration of a run that knows no backbone can still be read.
    name: str = doc("short name in reports", "minilm")
    path: str = doc("smollm2, minilm or micro (mllm/backbones.py), a folder or a hub id", "minilm")
    revision: str | None = doc("hub revision (a commit hash)")
    dtype: str = doc("dtype of frozen weights", "float32", choices=("float32", "bfloat16"))
    lora_targets: list[str] = doc("names of the modules that get LoRA", [])
    frozen_layers: int = doc("lower layers that stay as they are", 0, low=0)
    full_finetune: bool = doc("train all other weights instead of LoRA", False)


@dataclass
class Pairs:
    """Labelled answers out of `data`, split by question: train, validation, and `data.holdout` for the test."""

    validation: float = doc("share of the questions kept for calibration", 0.1, low=0.01, high=0.5)
    limit: int | None = doc("training questions, drawn by the seed; null takes all", low=1)


@dataclass
class DetectorTraining:
    """The harm detector of MLLM-Protector (stage `train_detector`)."""

    loss: str = doc("bce: the paper; bce_pairwise: the released code", "bce", choices=("bce", "bce_pairwise"))
    template: str = doc("text with {question} and {answer}", "Question: {question}\n\nAnswer: {answer}")
    max_length: int = doc("longest text (tokens)", 256, low=8)
    max_question: int = doc("of these for the question, whose end is kept (tokens)", 96, low=1)
    epochs: float = doc("passes over the training questions", 3.0, low=0)
    batch_size: int = doc("questions in one step, each with all its answers", 8, low=1)
    lr: float = doc("AdamW's peak learning rate", 1e-4, low=0)
    head_lr_factor: float = doc("the fresh head learns so much faster", 1.0, low=0)
    warmup: float = doc("share of the steps that is linear warm-up", 0.1, low=0, high=1)
    weight_decay: float = doc("AdamW's weight decay", 0.01, low=0)
    grad_clip: float = doc("largest norm of the gradient; 0 turns it off", 1.0, low=0)
    harmful_weight: float | None = doc("weight of a harmful answer in the BCE; null: harmless / harmful answers", low=0)
    lora: Lora = group(Lora, "low-rank adapters")
    layers: list[int] = doc(
        "read these layers (1 = lowest) as means over question and answer, backbone frozen; []: the last token", []
    )
    hidden: int = doc("width of the head on those means", 512, low=1)
    dropout: float = doc("dropout in the head on those means", 0.5, low=0, high=0.95)
    folds: int = doc("calibrate that head by scores of so many heads, each for questions unknown to it", 5, low=2)
    cache_frozen: bool = doc("compute the output of frozen layers once", True)
    false_positive_rate: float = doc("share of harmless answers that the threshold may flag", 0.05, low=0, high=0.5)
    checkpoint_every_steps: int = doc("steps between checkpoints", 50, low=1, free=True)
    score_batch_size: int = doc("texts scored at once", 32, low=1, free=True)


@dataclass
class DetoxifierTraining:
    """The detoxifier of MLLM-Protector (stage `train_detoxifier`) and what is measured about it."""

    template: str = doc(
        "prompt with {question} and {answer}", "Question: {question}\nOriginal response: {answer}\nHarmless response:"
    )
    refusal: str = doc("target where both answers are harmful", "Sorry, I can not answer this question.")
    max_length: int = doc("longest prompt (tokens)", 256, low=8)
    max_question: int = doc("of these for the question (tokens)", 96, low=1)
    max_answer: int = doc("longest target in training (tokens)", 192, low=1)
    max_new_tokens: int = doc("longest rewritten answer (new tokens)", 192, low=1)
    epochs: float = doc("passes over the training pairs", 1.0, low=0)
    batch_size: int = doc("pairs in one step", 16, low=1)
    lr: float = doc("AdamW's peak learning rate", 2e-4, low=0)
    warmup: float = doc("share of the steps that is linear warm-up", 0.1, low=0, high=1)
    weight_decay: float = doc("AdamW's weight decay", 0.0, low=0)
    grad_clip: float = doc("largest norm of the gradient; 0 turns it off", 1.0, low=0)
    lora: Lora = group(Lora, "low-rank adapters")
    checkpoint_every_steps: int = doc("steps between checkpoints", 50, low=1, free=True)
    detector: str | None = doc("folder of the detector that judges before and after; null: not judged")
    evaluate: int = doc("harmful test answers that are rewritten", 200, low=0)
    attempts: int = doc("rewrites that the guard tries while the detector calls them harmful (evaluation)", 4, low=1)
    generate_batch_size: int = doc("answers rewritten at once", 16, low=1, free=True)


@dataclass
class Generator:
    """New pairs through an OpenAI-compatible endpoint (stage `generate_pairs`)."""

    scenarios: list[str] = doc(
        "kinds of harm to ask about",
        [
            "illegal activity",
            "hate speech",
            "malware",
            "physical harm",
            "economic harm",
            "fraud",
            "sexual content",
            "privacy violation",
        ],
    )
    questions: int = doc("questions for each scenario", 20, low=1)
    questions_per_request: int = doc("questions asked for at once", 10, low=1)
    similarity: float = doc("a question that shares this part of its words with another is dropped", 0.8, low=0, high=1)
    api: Api = group(Api, "endpoint")


@dataclass
class Evaluate:
    """Benchmarks, generation and what is judged (the judge has its own group)."""

    benchmarks: list[str] = doc("which benchmarks", ["micro"], choices=tuple(BENCHMARKS))
    variants: list[str] | None = doc("what to evaluate; null: base, all of align.variants, all of evaluate.adapters")
    limit: int | None = doc("prompts of each task and kind of request, evenly spread; null takes all", low=1)
    batch_size: int = doc("prompts at once", 64, low=1, free=True)
    max_new_tokens: int = doc("longest answer (tokens)", 64, low=1)
    system_prompt: str | None = doc("system message in place of model.system_prompt")
    figstep: str = doc("folder of FigStep (safebench.csv, images/)", "../shared/data/figstep")
    tasks_per_topic: int | None = doc(
        "FigStep: the first so many tasks of each topic; 5: SafeBench-Tiny, null: all", 5, low=1
    )
    xstest: str = doc("CSV of XSTest's prompts, or its folder", "../shared/data/xstest/xstest_prompts.csv")
    mm_safetybench: str = doc("folder of MM-SafetyBench (processed_questions/, imgs/)", "../shared/data/mm_safetybench")
    va_safetybench: str = doc(
        "folder of VA-SafetyBench (its questions, Video/, Audio/)", "../shared/data/va_safetybench"
    )
    folder: str | None = doc("folder of your own media with prompts.csv, or such a file (docs/benchmarks.md)")
    tasks: list[str] | None = doc("tasks to ask, where a benchmark has several; null takes all")
    scenarios: list[str] | None = doc("scenarios to ask, by their names in the report; null takes all")
    adapters: dict[str, str] = doc("more to evaluate: name: folder of a PEFT adapter for the model", {}, free=True)


@dataclass
class Export:
    """An adapter merged into its model, as a plain folder (stage `export`)."""

    adapter: str | None = doc("folder of a PEFT adapter for the model", free=True)


@dataclass
class Protector:
    """MLLM-Protector as a guard behind the evaluated variants (`experiment=protector`)."""

    enabled: bool = doc("evaluate the same answers behind the guard too", False, free=True)
    detector: str | None = doc("folder with detector.json, or a YAML file about published weights")
    detoxifier: str | None = doc("folder with detoxifier.json, or such a file; null: flagged answers are refused")
    source: str | None = doc("run directory whose adapters, and answers that fit, are taken; null: trained here")
    max_new_tokens: int = doc("longest rewrite (new tokens)", 256, low=1)
    batch_size: int = doc("answers scored or rewritten at once", 16, low=1, free=True)
    timeout: float = doc("seconds that one batch may take in each model", 600.0, low=0.01, free=True)


@dataclass
class Judge:
    """Who decides whether an answer is safe."""

    kind: str = doc("strings, a chat model, or an endpoint", "refusal", choices=("refusal", "local", "api"))
    path: str = doc("local: smollm2 (from `make smol`), or folder or hub id of a chat model", "smollm2")
    batch_size: int = doc("local: answers at once", 8, low=1, free=True)
    with_question: bool = doc("local, api: judge question and answer, not the answer alone", False)
    api: Api = group(Api, "api: endpoint")
    both: bool = doc("local, api: judge a second time the other way (with_question); the report has both", False)
    price_in: float | None = doc("api: price of a million tokens that the judge reads", low=0, free=True)
    price_out: float | None = doc("api: price of a million tokens that the judge writes", low=0, free=True)
    max_cost: float | None = doc("api: most that one start may spend; needs both prices", low=0, free=True)


@dataclass
class Trainer:
    """Where it runs (handed to lightning.Trainer)."""

    accelerator: str = doc("kind of device", "auto", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu"), free=True)
    devices: int | str = doc("number of devices on a node, or auto", 1, free=True)
    num_nodes: int = doc("nodes", 1, low=1, free=True)
    strategy: str = doc("auto, ddp, fsdp2, or another of Lightning's", "auto", free=True)
    precision: str = doc("32-true, bf16-mixed, bf16-true, ...; auto: bf16-mixed if native", "32-true")
    activation_checkpointing: bool = doc(
        "training: layers run again in the backward pass; a fraction of the memory, a third more time", False, free=True
    )
    deterministic: bool = doc("refuse kernels that vary from run to run", False, free=True)
    log_every_n_steps: int = doc("steps between log rows", 10, low=1, free=True)


@dataclass
class Logger:
    """Where metrics go; all of it can change when a run is resumed."""

    csv: bool = doc("metrics.csv in the run directory", True, free=True)
    tensorboard: bool = doc("TensorBoard events in the run directory", True, free=True)
    wandb: bool = doc("Weights & Biases", False, free=True)
    project: str = doc("wandb: project", "seawall", free=True)
    entity: str | None = doc("wandb: team or user", free=True)
    mode: str = doc("wandb: online needs an account", "offline", choices=("offline", "online"), free=True)
    samples: int = doc("generations shown in tables of samples", 16, low=0, free=True)
    artifacts: str = doc(
        "wandb: embedding store, adapters and guard models as artifacts; reference: paths and checksums alone",
        "files",
        choices=("files", "reference", "none"),
        free=True,
    )


@dataclass
class Callbacks:
    """What is observed on the way."""

    throughput: bool = doc("items per second and peak memory in the log", True, free=True)


@dataclass
class Pretrain:
    """The recipe of the embedded model (`experiment=pretrain_micro`)."""

    tower_steps: int = doc("optimiser steps of the tower", 4000, low=1)
    tower_batch_size: int = doc("pages in one step", 48, low=1)
    tower_lr: float = doc("peak learning rate of the tower", 2e-3, low=0)
    language_steps: int = doc("optimiser steps of projector and language model", 500, low=1)
    language_pictures: int = doc("pictures in one step", 24, low=1)
    language_lessons: int = doc("lessons about each picture", 4, low=1, high=6)
    draws: int = doc("pictures of every phrase in every style", 2, low=1)
    language_noise: float = doc("largest noise on the features, in units of their RMS", 0.7, low=0)
    shared_noise: float = doc("largest noise that all patches share, in both phases, in units of the RMS", 0.9, low=0)
    language_lr: float = doc("peak learning rate of projector and language model", 2e-3, low=0)
    robust_steps: int = doc("optimiser steps of the robust phase", 800, low=1)
    robust_lessons: int = doc("lessons about each picture in the robust phase", 3, low=1, high=6)
    robust_noise: float = doc("largest noise in the robust phase, in units of the features' RMS", 0.5, low=0)
    robust_radius: float = doc("largest attack on the features, in units of the blank's RMS", 0.2, low=0)
    robust_lr: float = doc("peak learning rate of the robust phase", 1.5e-3, low=0)
    robust_style_steps: int = doc("first steps of the robust phase, about the style alone", 120, low=0)
    num_workers: int = doc("loader processes that draw pages", 1, low=0, high=1, free=True)
    checkpoint_every_steps: int = doc("steps between checkpoints", 100, low=1, free=True)


@dataclass
class Media:
    """How video and audio files are read, and what is too much: a hostile file must not be able to eat the memory."""

    frames: int | None = doc("video: frames taken, evenly spaced; null: fps, else as many as the blank has", low=1)
    fps: float | None = doc("video: frames taken of each second, in place of frames", low=0.01)
    resample: bool = doc("audio: bring another sample rate to the model's; false: an error that names the file", False)
    cut: bool = doc("audio: cut what is longer than model.max_seconds; false: an error that names the file", False)
    max_seconds: float = doc("longest clip (s)", 120.0, low=0.1)
    max_pixels: int = doc("largest picture or frame (pixels)", 89_478_485, low=1)
    max_megabytes: float = doc("largest file, and largest decoded clip", 1024.0, low=0.001)


@dataclass
class Scenes:
    """What the clips of DM show: a description of each phrase, by a language model or from a file."""

    source: str = doc("who describes", "api", choices=("api", "local", "file"))
    path: str | None = doc("file: JSON, {scenario/id: text}; local: smollm2, or folder or hub id of a chat model")
    max_new_tokens: int = doc("local: longest description (tokens)", 96, low=8)
    cache_dir: str = doc("local: descriptions by content", ".cache/scenes", free=True)
    api: Api = group(Api, "api: endpoint")


@dataclass
class Pipeline:
    """A pipeline of `diffusers` that makes clips or pictures from texts."""

    path: str | None = doc("folder or hub id of the pipeline (safetensors)")
    revision: str | None = doc("hub revision (a commit hash)")
    dtype: str = doc("dtype of the weights", "float32", choices=("float32", "bfloat16", "float16"))
    frames: int | None = doc("frames that it makes, spread over the clip's seconds; null: one for every frame", low=1)
    size: list[int] | None = doc("width, height that it makes (px), scaled to build.size; null: build.size")
    steps: int = doc("denoising steps", 50, low=1)
    guidance: float = doc("guidance scale", 6.0, low=0)
    arguments: dict[str, Any] = doc("further arguments of the pipeline's call, e.g. {negative_prompt: blurry}", {})


@dataclass
class Build:
    """A benchmark's media, made here (stage `build_benchmark`)."""

    benchmark: str = doc(
        "which benchmark",
        "va_safetybench_video",
        choices=("va_safetybench_video", "va_safetybench_audio", "figstep", "mm_safetybench"),
    )
    source: str = doc("folder with its questions", "../shared/data/va_safetybench")
    path: str | None = doc("folder to build in; null: build_benchmark/data in the run directory")
    tasks: list[str] | None = doc("tasks to build; null: all but those that need a pipeline that is not set")
    scenarios: list[str] | None = doc("scenarios to build, by the release's names; null: all")
    limit: int | None = doc("first so many questions of each scenario; null: all", low=1)
    workers: int | None = doc("processes; null: one for each core", low=1, free=True)
    check: bool = doc("decode every file again at the end", True, free=True)
    phrases: str = doc(
        "key phrase: of the data, else by comparing the question's two wordings, else the extractor of `concepts`; or "
        "always by the extractor",
        "compare",
        choices=("compare", "extract"),
    )
    size: list[int] = doc("video: width, height (px)", [640, 384])
    fps: int = doc("video: frames a second", 24, low=1)
    word_seconds: float = doc("TYPO: how long a word stands (s)", 1.0, low=0.05)
    clip_seconds: float = doc("DM: length of a clip (s)", 5.0, low=0.1)
    phrase_seconds: float = doc("DM+TYPO: how long the phrase stands at the end (s)", 3.0, low=0.1)
    font: str | None = doc("TrueType file of the words; null: DejaVu, which comes with matplotlib")
    speech: str = doc("who speaks; edge sends the texts to an online service", "espeak", choices=("espeak", "edge"))
    voice: str = doc("voice, by the synthesiser's name", "en-us")
    speed: int = doc("words a minute", 160, low=80, high=450)
    pitch: int = doc("0 to 99, 50 is the voice's own", 50, low=0, high=99)
    sample_rate: int = doc("audio: Hz", 16000, low=8000)
    audio_suffix: str = doc(
        "audio: kind of file; the release has .mp3", ".mp3", choices=(".mp3", ".wav", ".flac", ".ogg")
    )
    noise_seconds: float = doc("kpt_noise: white noise before the speech (s)", 3.0, low=0)
    noise_level: float = doc("kpt_noise: its standard deviation; speech peaks at 0.9", 0.1, low=0, high=1)
    scenes: Scenes = group(Scenes, "DM: scene descriptions")
    pipeline: Pipeline = group(Pipeline, "DM: text-to-video pipeline")
    letters: int = doc("MM-SafetyBench: size of the letters (px)", 90, low=8)
    picture: str = doc("MM-SafetyBench: what the pipeline is told; {phrase} is the key phrase", "A photo of {phrase}.")


@dataclass
class SlurmJob:
    """What the job of one stage asks for. null: what `slurm.all` says, and if that says nothing, the cluster's own."""

    partition: str | None = doc("partition", free=True)
    account: str | None = doc("account", free=True)
    qos: str | None = doc("quality of service", free=True)
    time: str | None = doc("time limit of one start, as sbatch takes it (30, 4:00:00, 1-12:00:00)", free=True)
    nodes: int | None = doc("nodes", low=1, free=True)
    gpus: int | None = doc("GPUs of each node", low=0, free=True)
    tasks: int | None = doc("processes on each node; null: one for each GPU, or one", low=1, free=True)
    cpus: int | None = doc("cores of each process", low=1, free=True)
    mem: str | None = doc("memory of each node (64G)", free=True)
    array: int | None = doc("synthesize: so many jobs divide the work", low=1, free=True)
    warn: int | None = doc("seconds before the time limit at which it saves and is requeued", low=1, free=True)
    restarts: int | None = doc("times that it may go back to the queue", low=0, free=True)
    container: str | None = doc("image to run in", free=True)
    runtime: str | None = doc("pyxis: srun --container-image; apptainer: apptainer exec", free=True)
    mounts: list[str] | None = doc("folders for the container, beside code, working and run directory", free=True)
    python: str | None = doc("interpreter; null: this one, in a container python", free=True)
    setup: list[str] | None = doc("shell lines before the stage, e.g. [module load cuda]", free=True)
    extra: list[str] | None = doc("more options of sbatch, e.g. ['--constraint=a100']", free=True)


def default_job() -> SlurmJob:
    """What holds where neither the stage nor `slurm.all` says otherwise."""
    return SlurmJob(nodes=1, gpus=0, array=1, warn=120, restarts=50, runtime="apptainer", mounts=[], setup=[], extra=[])


@dataclass
class Slurm:
    """Jobs on a SLURM cluster: what `scripts/slurm/submit.py` asks for, by stage (docs/slurm.md)."""

    all: SlurmJob = group(SlurmJob, "every stage", default_job)
    pretrain_tower: SlurmJob = group(SlurmJob, "this stage")
    pretrain_language: SlurmJob = group(SlurmJob, "this stage")
    synthesize: SlurmJob = group(SlurmJob, "this stage")
    encode: SlurmJob = group(SlurmJob, "this stage")
    align: SlurmJob = group(SlurmJob, "this stage")
    train_detector: SlurmJob = group(SlurmJob, "this stage")
    train_detoxifier: SlurmJob = group(SlurmJob, "this stage")
    generate_pairs: SlurmJob = group(SlurmJob, "this stage")
    build_benchmark: SlurmJob = group(SlurmJob, "this stage")
    export: SlurmJob = group(SlurmJob, "this stage")
    evaluate: SlurmJob = group(SlurmJob, "this stage")


@dataclass
class Config:
    """The whole configuration of one run."""

    experiment: str = doc("a file of configs/experiment", REQUIRED)
    run: str | None = doc("names and resumes a run; null: the run of a W&B sweep, the SLURM job, else a new time stamp")
    run_dir: str | None = doc("the run directory outright; null: runs/<experiment>/<run>")
    seed: int = doc("seed of everything that is drawn", 0, low=0)
    plan: bool = doc("tell how much memory each stage will take, and run nothing (docs/memory.md)", False, free=True)
    stages: list[str] = doc(
        "stages to run; they run in this order", ["synthesize", "align", "evaluate"], choices=STAGES
    )
    overwrite: bool = doc("redo stages whose configuration changed, and those after them", False, free=True)
    model: Model = group(Model, "the multimodal model")
    data: Data = group(Data, "text safety data")
    concepts: Concepts = group(Concepts, "concept extraction")
    synthesis: Synthesis = group(Synthesis, "embedding optimiser")
    store: Store = group(Store, "embedding store")
    real: Real = group(Real, "real media for the store")
    align: Align = group(Align, "which variants are trained")
    variants: dict[str, AlignVariant] = group(dict, "settings of each variant", default_variants)
    backbone: Backbone = group(Backbone, "text model of detector or detoxifier")
    pairs: Pairs = group(Pairs, "labelled answers and their split")
    detector: DetectorTraining = group(DetectorTraining, "harm detector")
    detoxifier: DetoxifierTraining = group(DetoxifierTraining, "detoxifier")
    generator: Generator = group(Generator, "new pairs from an endpoint")
    evaluate: Evaluate = group(Evaluate, "benchmarks and generation")
    protector: Protector = group(Protector, "guard behind the evaluated variants")
    judge: Judge = group(Judge, "who judges answers")
    pretrain: Pretrain = group(Pretrain, "recipe of the embedded model")
    trainer: Trainer = group(Trainer, "where it runs")
    logger: Logger = group(Logger, "where metrics go")
    callbacks: Callbacks = group(Callbacks, "what is observed")
    export: Export = group(Export, "an adapter merged into its model")
    media: Media = group(Media, "how video and audio files are read")
    build: Build = group(Build, "media of a benchmark")
    slurm: Slurm = group(Slurm, "jobs on a SLURM cluster, by stage (scripts/slurm/submit.py)")
