"""Plugins: the user's own Python, imported once, its mistakes told with their lines, counted by its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from configs.schema import Model
from datamodules.micro_media import micro_medium
from mllm.loading import load
from mllm.micro_blueprints import blueprint
from mllm.plugins import load_plugin, source_hash

REGISTERS = """
from transformers import AutoConfig, PreTrainedConfig

class {name}(PreTrainedConfig):
    model_type = "{kind}"
    width: int = 3

AutoConfig.register("{kind}", {name})
"""
BLUEPRINT = """
from types import SimpleNamespace
MEDIUM = SimpleNamespace(modality="scent")
def build_processor(vocabulary): ...
def build_model(processor): ...
def tower(model): ...
def states(tower, inputs): ...
"""


def written(folder: Path, text: str, name: str = "own.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_registers_its_classes_with_transformers(tmp_path: Path) -> None:
    module = load_plugin(written(tmp_path, REGISTERS.format(name="A", kind="plugin_a")))
    assert AutoConfig.for_model("plugin_a").width == 3
    assert module.A.__module__ == module.__name__


def test_a_folder_is_a_package(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    written(folder, "NUMBER = 7\n", "part.py")
    written(folder, "from .part import NUMBER\n", "__init__.py")
    assert load_plugin(str(folder)).NUMBER == 7


def test_it_runs_once_and_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    counting = (
        "import builtins\nbuiltins.plugin_runs = getattr(builtins, 'plugin_runs', 0) + 1\nRUN = builtins.plugin_runs\n"
    )
    one, two = written(tmp_path / "a", counting), written(tmp_path / "b", counting)
    first = load_plugin(one)
    assert load_plugin(one) is first
    assert (first.RUN, load_plugin(two).RUN) == (1, 2)


def test_a_relative_path_is_looked_up_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "HERE = 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_plugin("own.py").HERE == 1


@pytest.mark.parametrize("path", ["nothing.py", "empty", "notes.txt"])
def test_what_is_no_plugin_is_named_with_what_was_expected(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a = 1")
    with pytest.raises(ValueError, match=rf"model\.plugin=.*{path}: expected a Python file, or a folder with __init__"):
        load_plugin(str(tmp_path / path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nb = (\n", r"own\.py:2: SyntaxError"),
        ("a = 1\n\nimport no_such_module_here\n", r"own\.py:3: ModuleNotFoundError: No module named 'no_such"),
        ("def f():\n    return {}['x']\nf()\n", r"own\.py:2: KeyError: 'x'"),
    ],
)
def test_a_mistake_in_it_is_told_with_its_line_and_leaves_nothing_behind(text: str, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    for _ in range(2):  # the second time as the first: no half-made module stays
        with pytest.raises(ValueError, match=rf"^model\.plugin={path}: .*{told}"):
            load_plugin(path)
    written(tmp_path, "GOOD = 1\n")
    assert load_plugin(path).GOOD == 1


def test_its_source_is_what_it_counts_by(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    written(folder, "A = 1\n", "part.py")
    written(folder, "B = 1\n", "__init__.py")
    before = source_hash(str(folder))
    written(folder, "notes", "README.md")
    assert source_hash(str(folder)) == before
    written(folder, "A = 2\n", "part.py")
    assert source_hash(str(folder)) != before
    moved = written(tmp_path / "other", "A = 1\n", "same.py")
    assert source_hash(moved) == source_hash(written(tmp_path / "elsewhere", "A = 1\n", "same.py"))


def test_loading_a_model_runs_its_plugin_first(tmp_path: Path) -> None:
    spec = Model(
        name="m", path=str(tmp_path), plugin=written(tmp_path, "raise RuntimeError('before the checkpoint')\n")
    )
    with pytest.raises(ValueError, match="RuntimeError: before the checkpoint"):
        load(spec)


def test_pretraining_and_the_micro_world_come_from_it_for_a_modality_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, BLUEPRINT)
    assert blueprint("scent", path).build_model is load_plugin(path).build_model
    assert micro_medium("scent", path) is load_plugin(path).MEDIUM
    assert micro_medium("image", path).modality == "image"  # built in


def test_what_a_plugin_lacks_is_named_with_what_needs_it(tmp_path: Path) -> None:
    path = written(tmp_path, "def build_model(processor): ...\n")
    with pytest.raises(ValueError, match="it has no build_processor, tower, states, which pretraining needs"):
        blueprint("scent", path)
    with pytest.raises(ValueError, match="it has no MEDIUM, which the micro world"):
        micro_medium("scent", path)
    other = written(tmp_path / "other", BLUEPRINT)
    with pytest.raises(ValueError, match="its MEDIUM is of modality scent, the model of taste"):
        micro_medium("taste", other)
