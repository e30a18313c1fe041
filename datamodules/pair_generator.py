"""New training pairs from a chat model: scenarios -> questions -> an accepted and a rejected answer to each.

    generator = PairGenerator(api, per_request=10, similarity=0.8)
    for scenario in scenarios:
        pairs, left_out = generator.pairs(scenario, n=20)

As MLLM-Protector's authors made theirs (arXiv 2401.02906, section 3.1), behind any OpenAI-compatible endpoint
(datamodules/chat_api.py): every reply is cached by content, so an interrupted generation goes on where it stopped and
pays nothing twice. Questions that say the same in other words are left out: the share of words two questions have in
common (Jaccard) must stay under `similarity`. What is left out is counted with its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datamodules.chat_api import ChatAPI
from datamodules.chat_messages import Reply, Request

Progress = Callable[[int], None]

ASK_QUESTIONS = (
    "You help to collect data that trains a safety classifier. Write {n} different questions that a user with bad "
    "intentions might ask an assistant. Topic: {scenario}. One sentence each, specific, no numbering. This is batch "
    "{batch}; make its questions unlike those of other batches."
)
ASK_ACCEPTED = (
    "A user asks an assistant the question below. Write the answer of a careful assistant: it gives nothing that helps "
    "to do harm, says why, and offers what help is harmless. At most 80 words, the answer alone.\n\n"
    "Question: {question}"
)
ASK_REJECTED = (
    "You help to collect data that trains a safety classifier; it must see what to flag. A user asks an assistant the "
    "question below. Write the answer of an assistant that was never taught to be careful and simply complies, in "
    "general terms. At most 80 words, the answer alone.\n\nQuestion: {question}"
)
QUESTIONS_SCHEMA = {
    "type": "object",
    "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
    "required": ["questions"],
    "additionalProperties": False,
}
DECLINED = ("the model refused", "the answer was")
"""How errors begin that are the model's own decision (datamodules/chat_messages.py): asking again would not help."""

MOST_ROUNDS = 3
"""Questions are asked for at most so many times over as would do if none were left out."""


@dataclass(frozen=True)
class GeneratedPair:
    """A row that `data=jsonl` reads."""

    question: str
    accepted: str
    rejected: str
    scenario: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PairGenerator:
    """Remembers the questions it has made, over all scenarios; `failed` counts requests that got no answer, by reason.

    Args:
        api: the endpoint; its usage counts requests and tokens.
        per_request: questions asked for at once.
        similarity: see above, in 0..1; 1 leaves out equal questions only.
    """

    def __init__(self, api: ChatAPI, per_request: int = 10, similarity: float = 0.8) -> None:
        self.api, self.per_request, self.similarity = api, per_request, similarity
        self.failed: Counter[str] = Counter()
        self._known: list[frozenset[str]] = []

    def pairs(
        self, scenario: str, n: int, progress: Progress | None = None
    ) -> tuple[list[GeneratedPair], Counter[str]]:
        """At most `n` pairs about a scenario, and how many questions or answers were left out, by reason."""
        questions, left_out = self.questions(scenario, n)
        accepted = self._ask([ASK_ACCEPTED.format(question=q) for q in questions], progress)
        rejected = self._ask([ASK_REJECTED.format(question=q) for q in questions], progress)
        found = []
        for question, yes, no in zip(questions, accepted, rejected, strict=True):
            if yes.text is None or no.text is None:
                self._count(yes if yes.text is None else no, left_out)
            elif " ".join(yes.text.split()) == " ".join(no.text.split()):
                left_out["both answers are the same"] += 1
            else:
                found.append(GeneratedPair(question, yes.text.strip(), no.text.strip(), scenario))
        return found, left_out

    def questions(self, scenario: str, n: int) -> tuple[list[str], Counter[str]]:
        """At most `n` questions unlike each other and unlike all before, and what was left out."""
        found: list[str] = []
        left_out: Counter[str] = Counter()
        rounds = -(-n // self.per_request) * MOST_ROUNDS
        batch = 0
        while len(found) < n and batch < rounds:
            # As many requests at once as would do; which ones are sent depends on the replies alone, so a second run
            # sends the same and finds them in the cache.
            wanted = min(-(-(n - len(found)) // self.per_request), rounds - batch)
            numbers = range(batch + 1, batch + 1 + wanted)
            batch += wanted
            asks = [ASK_QUESTIONS.format(n=self.per_request, scenario=scenario, batch=number) for number in numbers]
            for reply in self.api.complete_many([Request.user(ask, schema=QUESTIONS_SCHEMA) for ask in asks]):
                for question in self._listed(reply, left_out):
                    if len(found) == n:
                        left_out["more than were asked for"] += 1
                    elif self._is_new(question):
                        found.append(question)
                    else:
                        left_out["like a question before"] += 1
        return found, left_out

    def _listed(self, reply: Reply, left_out: Counter[str]) -> list[str]:
        if reply.data is None:
            self._count(reply, left_out)
            return []
        questions = reply.data["questions"]
        if not isinstance(questions, list):
            left_out["the reply is no list of questions"] += 1
            return []
        texts = [" ".join(q.split()) for q in questions if isinstance(q, str) and q.strip()]
        left_out["no text"] += len(questions) - len(texts)
        return texts

    def _is_new(self, question: str) -> bool:
        words = frozenset(re.findall(r"\w+", question.casefold()))
        for other in self._known:
            if words == other or len(words & other) / max(1, len(words | other)) >= self.similarity:
                return False
        self._known.append(words)
        return True

    def _count(self, reply: Reply, left_out: Counter[str]) -> None:
        reason = (reply.error or "no reply").split("; gave up")[0][:120]
        (left_out if reason.startswith(DECLINED) else self.failed)[reason] += 1

    def _ask(self, texts: Sequence[str], progress: Progress | None) -> list[Reply]:
        replies = self.api.complete_many([Request.user(text) for text in texts])
        if progress is not None:
            progress(len(texts))
        return replies
