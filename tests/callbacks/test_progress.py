"""Progress without a terminal is a few log lines; with one, a bar that messages do not tear."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from callbacks import progress
from callbacks.progress import Progress, clock, track


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_log_lines_tell_count_rate_and_time_left(lines: pytest.LogCaptureFixture, time: Clock) -> None:
    with Progress("synthesize", total=4, unit="embeddings", every=0.0) as bar:
        for _ in range(4):
            time.sleep(2)
            bar.advance(osr=0.5)
    assert lines.messages[0] == "synthesize: begins at 0/4 embeddings"
    assert lines.messages[2] == "synthesize: 2/4 embeddings, 0.5/s, 0:04 left, osr=0.5"
    assert lines.messages[-1] == "synthesize: 4/4 embeddings in 0:08, 0.5/s, osr=0.5"


def test_the_first_line_comes_soon_and_the_next_ones_less_often(lines: pytest.LogCaptureFixture, time: Clock) -> None:
    with Progress("synthesize", total=9) as bar:
        for step in range(25):
            time.sleep(1)
            bar.set(0, step=step + 1)
    assert lines.messages[1:3] == ["synthesize: 0/9 items, step=2", "synthesize: 0/9 items, step=12"]
    assert len(lines.messages) == 5


def test_no_rate_of_what_took_no_time_and_no_powers_of_ten(lines: pytest.LogCaptureFixture, time: Clock) -> None:
    for seconds in (0.001, 2.0):
        with Progress("concepts", total=90000) as bar:
            time.sleep(seconds)
            bar.advance(90000)
    assert lines.messages[1] == "concepts: 90000/90000 items in 0:00"
    assert lines.messages[-1] == "concepts: 90000/90000 items in 0:02, 45,000/s"


def test_an_estimate_takes_the_place_of_the_rate_until_the_end(lines: pytest.LogCaptureFixture, time: Clock) -> None:
    left: list[float | None] = [None, 75.0]
    with Progress("synthesize", total=2, every=0.0, estimate=lambda: left.pop(0)) as bar:
        for _ in range(2):
            time.sleep(10)
            bar.advance()
    assert lines.messages[1:] == [
        "synthesize: 1/2 items",
        "synthesize: 2/2 items, 1:15 left",
        "synthesize: 2/2 items in 0:20, 0.1/s",
    ]


def test_a_part_with_nothing_to_do_says_nothing(lines: pytest.LogCaptureFixture) -> None:
    for total, done in ((0, 0), (3, 3)):
        with Progress("judge refusal", total, "answers", done=done):
            pass
    assert not lines.messages


def test_lines_are_occasional(lines: pytest.LogCaptureFixture) -> None:
    assert list(track(list(range(1000)), "read")) == list(range(1000))
    assert len(lines.messages) == 2, "one at the start, one at the end"


def test_what_was_done_before_does_not_count_for_the_rate(lines: pytest.LogCaptureFixture, time: Clock) -> None:
    with Progress("align", total=1001, done=1000) as bar:
        time.sleep(2)
        bar.advance()
    assert lines.messages[-1] == "align: 1001/1001 items in 0:02, 0.5/s"


def test_failure_says_where_it_stopped(lines: pytest.LogCaptureFixture) -> None:
    def part() -> None:
        with Progress("align", total=5) as bar:
            bar.advance(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        part()
    assert lines.messages[-1].startswith("align: stopped at 3/5 items")


def test_bars_may_be_nested_on_a_terminal(monkeypatch: pytest.MonkeyPatch, time: Clock) -> None:
    terminal = Console(force_terminal=True, width=100, file=(text := open("/dev/null", "w")), record=True)  # noqa: SIM115
    monkeypatch.setattr(progress, "console", terminal)
    monkeypatch.setattr(progress._bars.live, "console", terminal)
    with Progress("outer", total=2, unit="steps") as outer:
        for _ in track([1, 2], "inner"):
            time.sleep(1)
            outer.advance(loss=0.25)
            progress._bars.refresh()
    shown = terminal.export_text()
    text.close()
    assert "outer" in shown
    assert "inner" in shown
    assert re.search(r"2/2 [\d.e+]+/s .*loss=0\.25", shown)
    assert not progress._bars.tasks


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
