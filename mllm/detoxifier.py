"""The response detoxifier of MLLM-Protector (arXiv 2401.02906, section 3.3): makes a harmful answer harmless.

    y ~ p(harmless answer | question, harmful answer)        a causal language model, trained on pairs

The released code trains with the question and leaves it out when it rewrites; here both use the one template that lies
in `detoxifier.json` beside the weights. `max_new_tokens` counts new tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mllm.backbones import backbone_folder, load_causal, load_tokenizer, merge_adapter
from mllm.qa_spec import Spec
from mllm.qa_text import Cuts, QATemplate

TEMPLATE = "Question: {question}\nOriginal response: {answer}\nHarmless response:"
REFUSAL = "Sorry, I can not answer this question."
"""The published target where both answers of a pair are unsafe."""


TEMPERATURE, TOP_P = 0.8, 0.95


@dataclass(frozen=True, kw_only=True)
class DetoxifierSpec(Spec):
    """`detoxifier.json`. refusal: the target of training where no harmless answer is known."""

    FILE: ClassVar[str] = "detoxifier.json"

    template: str = TEMPLATE
    refusal: str = REFUSAL


class Detoxifier:
    """A loaded detoxifier, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, spec: DetoxifierSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.spec = tokenizer, spec
        self.template = QATemplate(spec.template, tokenizer, spec.max_length, spec.max_question)
        self.tokens_written = 0  # in all rewrites so far, their end tokens included

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Detoxifier:
        """A folder written by `experiment=detoxifier`, or a YAML file about published weights
        (configs/detoxifier/published).

        Raises:
            ValueError: something is missing or does not fit; names the file and says how to mend it.
        """
        spec, weights = DetoxifierSpec.read(path)
        own = Path(path).expanduser().is_dir()
        base = backbone_folder(spec.base) if spec.base is not None else weights
        tokenizer = load_tokenizer(weights if own else base, None if own else spec.base_revision)
        model = load_causal(base, dtype, spec.base_revision)
        if spec.base is not None:
            model = merge_adapter(model, weights, spec.weights_revision)
        return cls(model.to(device), tokenizer, spec)

    @property
    def cuts(self) -> Cuts:
        """How many prompts lost tokens, so far."""
        return self.template.cuts

    def encode(self, question: str, answer: str) -> list[int]:
        """Token ids of the prompt, at most `spec.max_length`."""
        return self.template.encode(question, answer)

    def rewrite(
        self,
        questions: Sequence[str],
        harmful_answers: Sequence[str],
        max_new_tokens: int = 256,
        batch_size: int = 16,
        attempt: int = 0,
    ) -> list[str]:
        """Harmless answers, in order. An answer may come out empty: the caller decides what then.

        Args:
            attempt: 0: greedy; else drawn from the model (the `TEMPERATURE` and `TOP_P` below), the same for the same
                batch and attempt.
        """
        prompts = [self.encode(q, a) for q, a in zip(questions, harmful_answers, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths share a batch
        texts = [""] * len(prompts)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            for i, text in zip(part, self._generate([prompts[i] for i in part], max_new_tokens, attempt), strict=True):
                texts[i] = text
        return texts

    def rewrite_at(self, asked: Sequence[tuple[str, str, int]], max_new_tokens: int = 256) -> list[str]:
        """As `rewrite`, for (question, harmful answer, attempt): what the guard's queue holds."""
        texts = [""] * len(asked)
        for attempt in sorted({a for _, _, a in asked}):
            chosen = [i for i, (_, _, a) in enumerate(asked) if a == attempt]
            questions, answers = [asked[i][0] for i in chosen], [asked[i][1] for i in chosen]
            for i, text in zip(chosen, self.rewrite(questions, answers, max_new_tokens, attempt=attempt), strict=True):
                texts[i] = text
        return texts

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, attempt: int) -> list[str]:
        rows, pad = [torch.tensor(row) for row in prompts], self.tokenizer.pad_token_id
        tokens = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        drawn: dict[str, Any] = {"do_sample": False}
        if attempt:
            drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
        with torch.random.fork_rng(enabled=attempt > 0):
            if attempt:
                torch.manual_seed(attempt)
            out = self.model.generate(
                input_ids=tokens.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=self.tokenizer.eos_token_id,
                **drawn,
            )
        new = out[:, tokens.shape[1] :]
        ends = (new == self.tokenizer.eos_token_id).long()
        self.tokens_written += int((ends.cumsum(1) - ends == 0).sum())  # what follows the first end is padding
        decoded = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]
