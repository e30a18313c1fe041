"""Online voices: what is said where they cannot be had. (What they sound like needs a network.)"""

from __future__ import annotations

import sys

import pytest

from datamodules.edge_speech import synthesize_online


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edge_tts", None)
    with pytest.raises(ValueError, match=r"build.speech=edge needs edge-tts: pip install -e '.\[edge\]'"):
        synthesize_online("fold a kite", "en-US-AriaNeural", 180, 50)


def test_a_voice_that_is_none_is_named() -> None:
    pytest.importorskip("edge_tts", reason="edge-tts is an extra")
    with pytest.raises(ValueError, match=r"edge-tts, voice no voice at all: ValueError: Invalid voice"):
        synthesize_online("fold a kite", "no voice at all", 180, 50)
