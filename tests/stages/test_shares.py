"""What the ranks bring home."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from stages.shares import Part, await_parts, leave_part


def test_who_is_alone_waits_for_nobody_and_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    part = Part("now", 0, 1.0, 3, 100, {})
    leave_part(tmp_path, part)
    assert await_parts(tmp_path, "now", 1) == [part]
    assert not caplog.messages
    leave_part(tmp_path, Part("now", 1, 1.0, 3, 100, {}))
    assert len(await_parts(tmp_path, "now", 2)) == 2
    assert caplog.messages[0] == "all ranks: begins at 0/2 ranks"
