"""Composition: the strict schema, and errors that name file, line, key and the right spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from configs.compose import Composed, ConfigError, compose, save
from configs.schema import Config


def composed(*overrides: str, folders: tuple[Path, ...] = ()) -> Composed:
    return compose(["experiment=sea_image", *overrides], folders, check_paths=False)


def refusal(*overrides: str, folders: tuple[Path, ...] = (), experiment: str = "sea_image", paths: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        compose([f"experiment={experiment}", *overrides], folders, check_paths=paths)
    return str(caught.value)


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """A folder for `--config-dir` with room for experiments."""
    (tmp_path / "experiment").mkdir()
    return tmp_path


def write(folder: Path, name: str, body: str, head: str = "# @package _global_\n") -> None:
    (folder / "experiment" / f"{name}.yaml").write_text(head + body)


def test_overrides_reach_the_typed_configuration() -> None:
    result = composed("data=saferlhf", "data.limit=8", "run=first", "stages=[evaluate,align]", "logger=wandb", "seed=3")
    cfg = result.config
    assert isinstance(cfg, Config)
    assert (cfg.data.name, cfg.data.limit, cfg.run, cfg.seed) == ("saferlhf", 8, "first", 3)
    assert (cfg.logger.wandb, cfg.logger.csv, cfg.logger.tensorboard) == (True, True, False)
    assert cfg.stages == ["align", "evaluate"], "stages run in their own order"
    assert cfg.experiment == "sea_image"
    assert result.choices["data"] == "saferlhf"
    assert set(cfg.variants) >= {"text_sft", "text_dpo", "sea_sft", "sea_dpo"}


def test_column_mapping_needs_no_plus() -> None:
    assert composed("data=jsonl", "data.columns={question:prompt}").config.data.columns == {"question": "prompt"}


def test_saved_configuration_is_complete_and_loads_back() -> None:
    cfg = composed("variants.sea_sft.lr=0.5").config
    values = yaml.safe_load(save(cfg))
    assert values["variants"]["sea_sft"]["lr"] == 0.5
    assert values["trainer"]["devices"] == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("synthesis.lrr=1", r"command line: unknown key synthesis\.lrr; did you mean synthesis\.lr\?"),
        ("+synthesis.lrr=1", r"unknown key synthesis\.lrr; did you mean synthesis\.lr\?"),
        ("devices=2", r"unknown key devices; did you mean trainer\.devices\?"),
        ("modle=micro_llava", r"unknown key modle; did you mean model\?"),
        ("variants.sea_sft.stps=3", r"unknown key variants\.sea_sft\.stps; did you mean variants\.sea_sft\.steps\?"),
        ("variants.sea_stf.steps=3", r"unknown variant sea_stf: .* did you mean sea_sft\?"),
        ("model.prompts.stlye=x", r"did you mean model\.prompts\.style\?"),
        ("seed=abc", r"seed: got 'abc' \(str\), expected int"),
        ("seed=1.5", r"seed: got '1\.5' \(float\), expected int"),
        ("synthesis.lr=null", r"synthesis\.lr: .*expected float"),
        ("stages=align", r"stages: got one value, expected a list .*'stages=\[VALUE\]'"),
        ("stages=[aling]", r"stages: got 'aling', .*did you mean align\?"),
        ("stages=[]", r"stages: got an empty list"),
        ("judge.kind=locl", r"judge\.kind: got 'locl', expected one of refusal, local, api; did you mean local\?"),
        ("judge=apii", r"judge=apii: no such judge, expected one of .*did you mean api\?"),
        ("align.variants=[sea_stf]", r"align\.variants: got 'sea_stf'.*did you mean sea_sft\?"),
        ("evaluate.variants=[bse]", r"evaluate\.variants: got 'bse'.*did you mean base\?"),
        ("synthesis.lr=-1", r"synthesis\.lr: got -1\.0, expected at least 0"),
        ("model.blank_value=0", r"model\.blank_value: got 0, expected at least 1 .*drop black"),
        ("seed=1,2", r"seed=1,2: several values need -m"),
        ("seed", r"seed: cannot be read as KEY=VALUE; write seed=VALUE"),
        ("sea_imge", r"sea_imge: cannot be read as KEY=VALUE; did you mean experiment=sea_image\?"),
        ("smol_llva", r"did you mean model=smol_llava\?"),
        ("+foo=1", r"unknown key foo; `python train\.py --help` lists them all"),
        ("~seed", r"~seed: a key cannot be taken away; leave it out for its default, or set seed=VALUE"),
        (
            "experiment=protector",
            r"experiment is given twice, experiment=sea_image and experiment=protector: leave",
        ),
        ("run=a/b", r"run: got 'a/b', expected a folder name"),
        ("run=../../x", r"run: got '\.\./\.\./x', expected a folder name"),
        ("+variants={../x: {method: dpo, data: sea}}", r"variants: got '\.\./x', expected a folder name"),
        ("run_dir=a=b", r"run_dir=a=b: cannot be read .*quote"),
        ("~synthesis.lr", r"synthesis\.lr"),
    ],
)
def test_mistake_on_the_command_line_names_the_key_and_the_remedy(override: str, expected: str) -> None:
    assert re.search(expected, refusal(override))


def test_unknown_experiment_lists_the_known_ones() -> None:
    message = refusal(experiment="sea_imge")
    assert "did you mean sea_image?" in message


def test_forgotten_experiment_says_how_to_list_them() -> None:
    with pytest.raises(ConfigError, match=r"no experiment given: .*lists them"):
        compose(["seed=3"], check_paths=False)


def test_misspelled_key_inside_an_experiment_names_file_and_line(extra: Path) -> None:
    write(extra, "bad", "seed: 3\nsynthesis:\n  lrr: 3\n")
    message = refusal(folders=(extra,), experiment="bad")
    assert f"{extra}/experiment/bad.yaml:4: unknown key synthesis.lrr; did you mean synthesis.lr?" in message


def test_wrong_type_inside_an_experiment_names_file_and_line(extra: Path) -> None:
    write(extra, "bad", "variants:\n  sea_sft: {lr: fast}\n")
    message = refusal(folders=(extra,), experiment="bad")
    assert "experiment/bad.yaml:3: variants.sea_sft.lr: got 'fast' (str), expected float" in message


def test_misspelled_variant_inside_an_experiment_is_no_new_variant(extra: Path) -> None:
    write(extra, "bad", "variants:\n  sea_stf: {lr: 0.1}\n")
    message = refusal(folders=(extra,), experiment="bad")
    assert "variants.sea_stf: a new variant must set method and data" in message
    assert "did you mean sea_sft?" in message


def test_misspelled_group_inside_an_experiment_is_refused(extra: Path) -> None:
    write(extra, "bad", "defaults:\n  - override /modle: micro_llava\n")
    assert "experiment/bad.yaml: override modle: no such group; did you mean model?" in refusal(
        folders=(extra,), experiment="bad"
    )


def test_missing_package_line_and_broken_yaml_are_explained(extra: Path) -> None:
    write(extra, "headless", "seed: 3\n", head="")
    write(extra, "broken", "a: [\n")
    assert "must begin with the line '# @package _global_'" in refusal(folders=(extra,), experiment="headless")
    assert re.search(r"not valid YAML: .*broken\.yaml", refusal(folders=(extra,), experiment="broken"))


def test_unknown_base_lists_the_experiments_that_there_are(extra: Path) -> None:
    write(extra, "a_child", "defaults: [sea_imag, _self_]\n")
    message = refusal(folders=(extra,), experiment="a_child")
    assert (
        f"{extra}/experiment/a_child.yaml: experiment=sea_imag: no such experiment, expected one of a_child, "
        in message
    )
    assert message.endswith("did you mean sea_image?")


def test_wrong_value_inside_a_file_names_the_file_that_set_it(extra: Path) -> None:
    write(extra, "parent", "variants:\n  sea_dpo: {method: dpo}\n  sea_sft: {method: dpoo}\n")
    write(extra, "child", "defaults: [parent, _self_]\nseed: 4\n")
    message = refusal(folders=(extra,), experiment="child")
    assert message.startswith(f"{extra}/experiment/parent.yaml:4: variants.sea_sft.method: got 'dpoo'")
    message = refusal("variants.sea_sft.method=dpooo", folders=(extra,), experiment="child")
    assert message.startswith("variants.sea_sft.method: got 'dpooo'"), "the command line has the last word"
    (extra / "judge").mkdir()
    (extra / "judge" / "mine.yaml").write_text("# Mine.\nkind: apii\n")
    assert f"{extra}/judge/mine.yaml:2: judge.kind: got 'apii'" in refusal("judge=mine", folders=(extra,))


def test_experiment_inherits_from_a_sibling_and_overrides_its_groups(extra: Path) -> None:
    write(extra, "parent", "defaults:\n  - override /judge: local\nseed: 3\nsynthesis: {slots: 8}\n")
    write(extra, "child", "defaults:\n  - parent\n  - override /judge: api\n  - _self_\nseed: 4\n")
    cfg = compose(["experiment=child"], [extra], check_paths=False).config
    assert (cfg.seed, cfg.synthesis.slots, cfg.judge.kind, cfg.experiment) == (4, 8, "api", "child")


def test_experiment_adds_a_variant(extra: Path) -> None:
    write(extra, "more", "align: {variants: [ipo]}\nvariants:\n  ipo: {method: dpo, data: text, loss_type: ipo}\n")
    cfg = compose(["experiment=more", "variants.ipo.beta=0.3"], [extra], check_paths=False).config
    assert (cfg.variants["ipo"].loss_type, cfg.variants["ipo"].beta) == ("ipo", 0.3)


def test_model_path_is_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    assert "neither a folder" in refusal("model.path=assets/typo", paths=True)
    assert "neither a folder" in refusal(f"model.path={tmp_path}/typo", paths=True)
    compose(["experiment=sea_image", "model.path=some-owner/some-name"])
    compose(["experiment=sea_image", f"model.path={tmp_path}"])


def test_a_missing_folder_is_no_reason_to_list_what_lies_in_a_strange_place(tmp_path: Path) -> None:
    assert refusal("model.path=/nope", paths=True).endswith("nor a hub id (owner/name)")
    for name in ("micro", "secret"):
        (tmp_path / name).mkdir()
    message = refusal(f"model.path={tmp_path}/mcro", paths=True)
    assert message.endswith(f"; did you mean {tmp_path}/micro?")
    assert "secret" not in message
    assets = Path(__file__).resolve().parents[2] / "assets"
    shipped = ", ".join(sorted(f.name for f in assets.iterdir()))
    assert f"expected one of {shipped}; did you mean micro_llava?" in refusal("model.path=assets/llava", paths=True)


def test_local_models_may_be_the_one_that_make_smol_fetches(tmp_path: Path) -> None:
    place = f"model.path={tmp_path}"
    cfg = compose(["experiment=sea_image", place, "judge=local", "concepts=local"]).config
    assert (cfg.judge.path, cfg.concepts.path) == ("smollm2", "smollm2")
    assert "judge.path: smollm3 is neither" in refusal(place, "judge=local", "judge.path=smollm3", paths=True)


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    message = refusal("data=jsonl", f"data.path={tmp_path}/none.jsonl", f"model.path={tmp_path}", paths=True)
    assert f"data.path: {tmp_path}/none.jsonl does not exist" in message
    assert "data.path is not set" in refusal("data=jsonl", f"model.path={tmp_path}", paths=True)


def test_key_in_place_of_its_variable_is_refused_without_being_repeated() -> None:
    for secret in ("sk-" + "abc123", "sk_live_" + "abc123" * 4):
        message = refusal(f"judge.api.key_env={secret}")
        assert "judge.api.key_env: expected the NAME" in message
        assert secret not in message
    message = refusal("judge.api.base_url='http://user:hunter2@host/v1'")
    assert "judge.api.base_url" in message
    assert "hunter2" not in message


def test_a_misspelled_modality_is_told_the_right_word_and_another_one_what_it_needs() -> None:
    told = refusal("model.modality=vidoe")
    assert "expected one of image, video, audio; did you mean video? (any other word needs model.plugin" in told
    assert "expected one of image, video, audio (any other word needs model.plugin" in refusal("model.modality=scent")


def test_a_modality_of_ones_own_needs_the_shape_of_its_blank() -> None:
    own = ("model.modality=scent", "model.plugin=own.py")
    assert "model.blank_shape: got [], expected the shape of one scent item" in refusal(*own)
    assert "model.blank_shape: got [6, 0]" in refusal(*own, "model.blank_shape=[6,0]")
    model = composed(*own, "model.blank_shape=[6,128]", "model.blank_level=0.1").config.model
    assert (model.modality, model.blank_shape, model.blank_level) == ("scent", [6, 128], 0.1)
    assert "model.blank_shape: the blank of modality image has other keys" in refusal("model.blank_shape=[6,128]")


@pytest.mark.parametrize("word", ["text", "images", "Scent", "3d", "two words"])
def test_a_modality_is_a_lower_case_word_that_messages_and_processors_do_not_have_yet(word: str) -> None:
    told = refusal(f"model.modality={word}", "model.plugin=own.py", "model.blank_shape=[2]")
    assert f"model.modality: got {word!r}, expected a word of lower-case letters" in told


def test_a_plugin_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    assert f"model.plugin: {tmp_path}/own.py does not exist" in refusal(f"model.plugin={tmp_path}/own.py", paths=True)
