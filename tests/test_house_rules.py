"""The rules of the house that a machine can check: layout, direction of imports, names, safety, packaging."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.compose import compose
from configs.keys import schema
from configs.pages import groups
from configs.schema import STAGES

ROOT = Path(__file__).resolve().parent.parent
# Each may import itself and what stands before it.
ORDER = ["configs", "mllm", "datamodules", "lightning_modules", "evaluation", "callbacks", "stages"]
FAMILIES = r"llava|qwen|gemma|smolvlm|internvl|idefics|voxtral|granite|onevision|llama"


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def code() -> list[Path]:
    return [*sources(*ORDER), ROOT / "train.py"]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :]) | {"train", "tests", "scripts"}
    wrong = [
        f"{p.relative_to(ROOT)}: {name}" for p in sources(package) for name in imports(p) if name.split(".")[0] in later
    ]
    assert not wrong


def test_model_side_knows_nothing_of_lightning() -> None:
    wrong = [
        str(p)
        for p in sources("mllm")
        for name in imports(p)
        if name.split(".")[0] in ("lightning", "pytorch_lightning")
    ]
    assert not wrong


def test_no_model_family_is_named_outside_mllm_and_configs() -> None:
    places = [p for p in code() if p.relative_to(ROOT).parts[0] not in ("mllm", "configs")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in places
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(FAMILIES, re.sub(r"^from mllm\.\w+ import", "", line), re.IGNORECASE)
    ]
    assert not wrong


def test_there_is_no_utils() -> None:
    assert not [
        str(p) for p in code() for part in p.parts if re.fullmatch(r"(utils?|helpers?|misc|common)(\.py)?", part)
    ]


def test_nothing_unsafe_is_loaded() -> None:
    wrong = []
    for path in [*code(), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "assets").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT)
        if re.search(r"trust_remote_code\s*=\s*True", text):
            wrong.append(f"{where}: trust_remote_code")
        wrong += [
            f"{where}: {n}" for n in imports(path) if n.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle")
        ]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                wrong += [] if safe else [f"{where}:{node.lineno}: torch.load without weights_only=True"]
    assert not wrong


def test_starting_imports_nothing_heavy() -> None:
    names = "torch, transformers, lightning, datasets, matplotlib, wandb, numpy"
    program = (
        "import sys, train, configs.cli, configs.compose, configs.check, configs.pages\n"
        f"print([m for m in '{names}'.split(', ') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes(experiment: str) -> None:
    assert compose([f"experiment={experiment}"], check_paths=False).config.experiment == experiment


def test_every_file_of_every_group_composes() -> None:
    choices = {group: files for group, files in groups().items() if files and group != "experiment"}
    for turn in range(max(map(len, choices.values()))):  # the n-th file of every group at once: composing takes time
        chosen = {group: files[turn % len(files)] for group, files in choices.items()}
        composed = compose(["experiment=sea_image", *(f"{g}={c}" for g, c in chosen.items())], check_paths=False)
        assert {group: composed.choices[group] for group in chosen} == chosen


def test_every_stage_has_its_module() -> None:
    for name in STAGES:
        tree = ast.parse((ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8"))
        functions = {
            node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)
        }
        assert functions.get("run") == ["cfg", "run"], f"stages/{name}.py needs run(cfg, run)"


def test_every_key_is_read_somewhere() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in code() if p.name != "schema.py")
    names = {key: re.escape(key.rpartition(".")[2]) for key in schema()}
    unread = [key for key, name in names.items() if not re.search(rf'\.{name}\b|"{name}"', text)]
    assert not unread, f"no code reads {unread}: use them or take them out of configs/schema.py"


def test_no_page_has_a_gap_that_was_to_be_filled() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]:
        assert not re.search(r"@@\w+@@|^TABLE$|\bTODO\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_what_is_cached_is_not_committed() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    places = [str(leaf.value) for key, leaf in schema().items() if key.endswith(".cache_dir")]
    assert places, "the keys have new names: look for them here too"
    assert all(place.split("/")[0] + "/" in ignored for place in places), "caches hold texts of the users' data"


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(comment_prefixes=("#",), inline_comment_prefixes=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def test_torch_is_bounded_above_so_that_a_fresh_install_takes_the_tested_one() -> None:
    requirements = setup()["options"]["install_requires"].split("\n")
    assert "torch>=2.6,<2.14" in requirements


def test_every_package_is_installed_type_checked_and_covered() -> None:
    config = setup()
    for name in ORDER:
        assert (ROOT / name / "__init__.py").is_file(), f"{name}/__init__.py is missing, so pip would not install it"
        assert f"{name}*" in config["options.packages.find"]["include"].split()
        assert name in config["mypy"]["packages"].replace(",", " ").split()
        assert name in config["coverage:run"]["source"].split()
