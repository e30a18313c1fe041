"""What a paid judge costs: an estimate before anything is sent, and the end of the money while it is spent.

Tokens of text that is not sent yet are estimated from its length, for the tokenizers of paid judges are not at hand:
`CHARACTERS_PER_TOKEN` is below the four of English prose, so the estimate errs upwards. What was spent is counted from
the tokens that the endpoint bills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.chat_api import Usage

CHARACTERS_PER_TOKEN = 3.5
OVERHEAD_TOKENS = 10  # a message's own, in every chat format
REPLY_TOKENS = 8  # "safe", "unsafe", or a short sentence with one of them


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever currency: `read` by the judge, and `written` by it."""

    read: float
    written: float

    def of(self, tokens_read: int, tokens_written: int) -> float:
        return (tokens_read * self.read + tokens_written * self.written) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Calls, and the tokens that they are about to take."""

    calls: int
    tokens_read: int
    tokens_written: int

    def cost(self, prices: Prices) -> float:
        return prices.of(self.tokens_read, self.tokens_written)


class Budget:
    """How much of `max_cost` is left, by what the endpoint has billed since the client was made."""

    def __init__(self, prices: Prices, max_cost: float, usage: Usage) -> None:
        self.prices, self.max_cost, self.usage = prices, max_cost, usage

    @property
    def spent(self) -> float:
        return self.prices.of(self.usage.prompt_tokens, self.usage.completion_tokens)

    def exhausted(self) -> str | None:
        """Why nothing may be sent any more; None while there is money."""
        if self.spent < self.max_cost:
            return None
        return f"not sent: {self.spent:.4f} is spent, judge.max_cost is {self.max_cost:g}"


def estimate(known: Sequence[str], template: int, unknown: int, answer_tokens: int) -> Estimate:
    """What judging takes.

    Args:
        known: the judge's prompts about answers that are on disk.
        template: characters of a judge's prompt without an answer.
        unknown: answers that are yet to be generated.
        answer_tokens: the longest they can get.
    """
    read = sum(_tokens(len(prompt)) for prompt in known) + unknown * (_tokens(template) + answer_tokens)
    calls = len(known) + unknown
    return Estimate(calls, read, calls * REPLY_TOKENS)


def _tokens(characters: int) -> int:
    return OVERHEAD_TOKENS + round(characters / CHARACTERS_PER_TOKEN)
