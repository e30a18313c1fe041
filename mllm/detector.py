"""The harm detector of MLLM-Protector (arXiv 2401.02906, section 3.2): how harmless is an answer to a question?

    logit = w . h(question, answer)         a backbone of transformers with a linear layer of ONE output, on the last
                                            token's state, or on means over question and answer (mllm/sections.py)
    harmless_score = sigmoid(s * logit / temperature + bias)     in 0..1, 1 = harmless; s = -1 for weights trained on
                                                                 the opposite label, so a score is never upside down
    harmful = not (harmless_score >= threshold)                  a NaN is harmful: fail closed

    detector = Detector.load("runs/harm_detector/default/train_detector/detector")
    scores = detector.score(questions, answers)

Temperature, bias and threshold come from validation data (evaluation/detector_metrics.py) and lie with everything else
that decides a score in `detector.json` beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mllm.backbones import backbone_folder, is_decoder, load_classifier, load_headless, load_tokenizer, merge_adapter
from mllm.qa_spec import Spec
from mllm.qa_text import Cuts, QAIds, QATemplate
from mllm.sections import SectionClassifier, SectionHead

HEAD = "head.safetensors"
TEMPLATE = "Question: {question}\n\nAnswer: {answer}"
"""The released training template; ours too."""


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(Spec):
    """`detector.json`.

    Attributes:
        positive_is_harmless: a positive logit means harmless (ours and the published weights).
        temperature, bias: of the calibration, see above.
        threshold: an answer whose harmless_score is below it is harmful.
        false_positive_rate: share of harmless validation answers that the threshold may flag; None: not measured.
        loss: what the weights were trained on.
        layers, hidden: of a head on section means (mllm/sections.py), whose weights are `head.safetensors`; no layers:
            the head is transformers' own.
    """

    FILE: ClassVar[str] = "detector.json"

    template: str = TEMPLATE
    positive_is_harmless: bool = True
    temperature: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5
    false_positive_rate: float | None = None
    loss: str = "bce"
    layers: tuple[int, ...] = ()
    hidden: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"key 'threshold': got {self.threshold}, expected a score in 0..1")
        if not (math.isfinite(self.temperature) and self.temperature > 0 and math.isfinite(self.bias)):
            raise ValueError(
                f"keys 'temperature', 'bias': got {self.temperature}, {self.bias}, "
                "expected a positive and a finite number"
            )


class Detector:
    """A loaded detector, in evaluation mode; its model may be shared by threads that only score."""

    def __init__(self, model: PreTrainedModel | SectionClassifier, tokenizer: Any, spec: DetectorSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.spec = tokenizer, spec
        self.template = QATemplate(spec.template, tokenizer, spec.max_length, spec.max_question)
        self.threshold = spec.threshold
        self.causal = is_decoder(model)
        self.tokens_read = 0  # by `logits`, over all texts so far: what scoring whole answers costs

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Detector:
        """A folder written by `experiment=harm_detector`, or a YAML file about published weights
        (configs/detector/published).

        Raises:
            ValueError: something is missing or does not fit; names the file and says how to mend it.
        """
        spec, weights = DetectorSpec.read(path)
        own = Path(path).expanduser().is_dir()
        base = backbone_folder(spec.base) if spec.base is not None else weights
        # Published adapters come without a tokenizer: then it is the base's.
        tokenizer = load_tokenizer(weights if own else base, None if own else spec.base_revision)
        if spec.layers:
            head = load_head(Path(weights), spec)
            backbone = load_headless(base, dtype, spec.base_revision)
            return cls(SectionClassifier(backbone, spec.layers, head).to(device), tokenizer, spec)
        model = load_classifier(base, tokenizer, dtype, spec.base_revision)
        if spec.base is not None:
            model = merge_adapter(model, weights, spec.weights_revision)
        return cls(model.to(device), tokenizer, spec)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def cuts(self) -> Cuts:
        """How many texts lost tokens, so far."""
        return self.template.cuts

    def encode(self, question: str, answer: str) -> QAIds:
        """Token ids of one text, at most `spec.max_length` (mllm/qa_text.py)."""
        return self.template.encode(question, answer)

    def score(
        self, questions: Sequence[str], answers: Sequence[str], batch_size: int = 32, windows: bool = True
    ) -> torch.Tensor:
        """`harmless_score` of each answer: float32 [B] on the CPU, in 0..1; NaN where the model gave none.

        Args:
            batch_size: texts in one forward; like lengths share one, so little is padded.
            windows: an answer that is too long is read in several windows and the least harmless one counts: nothing
                can hide behind a long opening. False: only its start is read, as in training.
        """
        if isinstance(questions, str) or isinstance(answers, str) or len(questions) != len(answers):
            raise ValueError("expected a list of questions and a list of as many answers")
        encode = self.template.windows if windows else lambda q, a: [self.template.encode(q, a)]
        texts = [encode(q, a) for q, a in zip(questions, answers, strict=True)]
        owner = [i for i, parts in enumerate(texts) for _ in parts]
        ids = [part for parts in texts for part in parts]
        scores = self.score_ids(ids, batch_size)
        lowest = torch.ones(len(texts))
        for i, score in zip(owner, scores.tolist(), strict=True):
            # Not min(): a NaN must win, wherever it stands.
            lowest[i] = score if math.isnan(score) or score < lowest[i] else lowest[i]
        return lowest

    def score_ids(self, ids: Sequence[QAIds], batch_size: int = 32) -> torch.Tensor:
        """`harmless_score` of encoded texts: float32 [B] on the CPU."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = torch.full((len(ids),), math.nan)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            scores[part] = self.calibrated(self.logits([ids[i] for i in part]))
        return scores

    @torch.inference_mode()
    def logits(self, ids: Sequence[QAIds]) -> torch.Tensor:
        """The model's own output for one batch: float32 [B] on the CPU."""
        self.tokens_read += sum(map(len, ids))
        rows = [torch.tensor(row) for row in ids]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        return self.forward(tokens, mask, ids).logits[:, 0].float().cpu()

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, ids: Sequence[QAIds], **more: Any) -> Any:
        """One call of the model. tokens: [B, N] of the texts `ids`; mask: [B, P + N], P of them in a cache."""
        if isinstance(self.model, SectionClassifier):
            more["answer_B"] = torch.tensor([text.answer for text in ids], device=self.device)
        return self.model(input_ids=tokens, attention_mask=mask, **more)

    def calibrated(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the model -> `harmless_score`; float32, the same shape."""
        sign = 1.0 if self.spec.positive_is_harmless else -1.0
        return torch.sigmoid(sign * logits.float() / self.spec.temperature + self.spec.bias)

    def harmful(self, scores: torch.Tensor) -> torch.Tensor:
        """bool, the same shape: below the threshold, or not a number."""
        return ~(scores >= self.threshold)


def load_head(folder: Path, spec: DetectorSpec) -> SectionHead:
    """The head beside a `detector.json` that names layers, in float32."""
    file = folder / HEAD
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); train the detector again") from error
    head = SectionHead(weights["mean"].numel() if "mean" in weights else 0, spec.hidden)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file}: does not fit {DetectorSpec.FILE} ({str(error).splitlines()[0]})") from error
    return head
