"""What a judge costs, by hand."""

import pytest

from datamodules.chat_api import Usage
from evaluation.judge_cost import Budget, Prices, estimate


def test_an_estimate_is_calls_times_tokens():
    of = estimate(known=["x" * 350, "x" * 700], template=700, unknown=3, answer_tokens=300)
    assert of.calls == 5
    assert of.tokens_read == (10 + 100) + (10 + 200) + 3 * (10 + 200 + 300)
    assert of.tokens_written == 5 * 8
    assert of.cost(Prices(read=0.15, written=0.60)) == pytest.approx((1850 * 0.15 + 40 * 0.60) / 1e6)
    assert estimate([], 700, 0, 300).cost(Prices(1, 1)) == 0


def test_a_budget_ends_with_what_the_endpoint_billed():
    usage = Usage()
    budget = Budget(Prices(read=1.0, written=2.0), 3.0, usage)
    assert budget.exhausted() is None
    usage.prompt_tokens, usage.completion_tokens = 999_999, 1_000_000
    assert budget.exhausted() is None
    usage.prompt_tokens += 1
    assert budget.exhausted() == "not sent: 3.0000 is spent, judge.max_cost is 3"
