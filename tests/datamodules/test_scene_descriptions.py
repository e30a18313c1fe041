"""Scene descriptions: from a file, from an endpoint on loopback, from a small model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from configs.schema import Api, Scenes
from datamodules.scene_descriptions import EXAMPLES, scene_descriptions, scene_prompt
from tests.loopback import LoopbackServer, Text
from tests.micro_text import backbone

PHRASES = {"6-Fraud/0": "fold a kite", "6-Fraud/1": "a garden bench"}


def describe(settings: Scenes, seed: int = 0) -> dict[str, str]:
    return scene_descriptions(PHRASES, settings, seed, lambda n: None)


def test_two_of_five_examples_are_shown_and_the_seed_decides_which() -> None:
    assert len(EXAMPLES) == 5
    seen: Counter[str] = Counter()
    for i in range(200):
        prompt = scene_prompt("fly a kite", f"6-Fraud/{i}", 0)
        shown = [phrase for phrase, scene in EXAMPLES if scene in prompt]
        assert len(shown) == 2
        assert prompt.endswith("Phrase: fly a kite\nScene:")
        seen.update(shown)
    assert len(seen) == 5
    assert min(seen.values()) > 40  # 80 each on average
    assert scene_prompt("x", "a", 0) == scene_prompt("x", "a", 0)
    assert len({scene_prompt("x", "a", seed) for seed in range(20)}) > 1


def test_an_endpoint_describes_and_is_not_asked_twice(tmp_path: Path) -> None:
    def answer(body: dict) -> str:
        return "  A scene of " + body["messages"][-1]["content"].rsplit("Phrase: ", 1)[1].split("\n")[0] + ". "

    with LoopbackServer(answer=answer) as server:
        api = Api(base_url=server.base_url, model="m", key_env="", cache_dir=str(tmp_path))
        expected = {"6-Fraud/0": "A scene of fold a kite.", "6-Fraud/1": "A scene of a garden bench."}
        assert describe(Scenes(source="api", api=api)) == expected
        assert describe(Scenes(source="api", api=api)) == expected
        assert len(server.requests) == 2


def test_an_endpoint_that_fails_is_named(tmp_path: Path) -> None:
    with LoopbackServer() as server:
        server.script += [Text(None, refusal="no"), Text(None, refusal="no")]
        api = Api(base_url=server.base_url, model="m", key_env="", cache_dir=str(tmp_path), retries=0)
        with pytest.raises(ValueError, match=r"build.scenes: 2 of 2 descriptions failed, the first: the model refused"):
            describe(Scenes(source="api", api=api))


def test_a_model_on_this_machine_describes_and_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Scenes(source="local", path=str(backbone()), max_new_tokens=8, cache_dir=str(tmp_path))
    found = describe(settings)
    assert found.keys() == PHRASES.keys()
    assert len(list(tmp_path.rglob("*.json"))) == 2
    monkeypatch.setattr("transformers.GenerationMixin.generate", None)  # whoever calls it fails
    assert describe(settings) == found


@pytest.mark.parametrize(
    "said",
    [
        "Two hands\nfold paper.",
        "Phrase: fold a kite\nScene: Two hands\nfold paper.\n\nPhrase: something else\nScene: no",
        "Phrase: fold a kite\n\nTwo hands fold paper.",
        "Phrase: Two hands fold paper.",
        "Two hands fold paper.\nPhrase: something else",
        "Two hands fold paper.\n\nPhrase: something else\nScene: A dog runs.",
    ],
)
def test_the_form_that_a_model_repeats_is_no_part_of_the_scene(tmp_path: Path, said: str) -> None:
    with LoopbackServer(answer=lambda body: said) as server:
        api = Api(base_url=server.base_url, model="m", key_env="", cache_dir=str(tmp_path))
        assert set(describe(Scenes(source="api", api=api)).values()) == {"Two hands fold paper."}


def test_the_form_alone_is_no_description(tmp_path: Path) -> None:
    with LoopbackServer(answer=lambda body: "Phrase: fold a kite\nScene:") as server:
        api = Api(base_url=server.base_url, model="m", key_env="", cache_dir=str(tmp_path))
        with pytest.raises(ValueError, match="no description of 6-Fraud/0, 6-Fraud/1"):
            describe(Scenes(source="api", api=api))


def test_a_file_describes(tmp_path: Path) -> None:
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps({"6-Fraud/0": "A hand\nfolds paper.", "6-Fraud/1": "A bench.", "other": "x"}))
    found = describe(Scenes(source="file", path=str(path)))
    assert found == {"6-Fraud/0": "A hand folds paper.", "6-Fraud/1": "A bench."}
    path.write_text(json.dumps({"6-Fraud/0": "A hand.", "6-Fraud/1": " "}))
    with pytest.raises(ValueError, match=r"scenes\.json: no description under '6-Fraud/1' and 0 more"):
        describe(Scenes(source="file", path=str(path)))
    path.write_text("no json")
    with pytest.raises(ValueError, match=r"scenes\.json: cannot be read as JSON"):
        describe(Scenes(source="file", path=str(path)))
    with pytest.raises(ValueError, match=r"build.scenes.path is not set"):
        describe(Scenes(source="file"))
