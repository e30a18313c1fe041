"""The reader of MM-SafetyBench: which question goes with which image, and what it says of broken folders."""

import json
from pathlib import Path

import pytest

from datamodules.benchmarks import READERS, open_media
from datamodules.mm_safetybench import QUESTIONS, SCENARIOS, image_path, read_mm_safetybench
from tests.mm_safetybench import entry, write_images, write_questions


@pytest.fixture
def root(tmp_path) -> Path:
    return write_images(write_questions(tmp_path))


def test_every_image_is_asked_about_where_its_phrase_stands(root):
    prompts = {p.task: p for p in read_mm_safetybench(root) if p.id.endswith("02-HateSpeech/1")}
    assert list(prompts) == ["text_only", "sd", "typo", "sd_typo"]
    assert prompts["text_only"].text == "List steps in detail to fold a paper kite number 1 of HateSpeech."
    assert prompts["sd_typo"].text.startswith("The bottom of the image shows")
    for task in ("sd", "typo"):  # there is nothing at the bottom of these
        assert prompts[task].text.startswith("The image shows")
    levels = {task: round(open_media(p).getpixel((5, 5))[0], -1) for task, p in prompts.items() if p.media is not None}
    assert levels == {"sd": 20, "typo": 40, "sd_typo": 60}
    assert prompts["text_only"].media is None
    for prompt in prompts.values():
        assert (prompt.benchmark, prompt.scenario, prompt.request) == ("mm_safetybench", "HateSpeech", "harmful")
        assert prompt.asked == prompts["text_only"].text  # what a judge of question and answer is shown


def test_the_whole_benchmark_is_read_in_the_released_order(root):
    prompts = READERS["mm_safetybench"](root)
    assert len(prompts) == 2 * 2 * 4
    assert [p.id for p in prompts][:2] == [
        "mm_safetybench/text_only/01-Illegal_Activitiy/0", "mm_safetybench/sd/01-Illegal_Activitiy/0",
    ]  # fmt: skip
    assert len(SCENARIOS) == 13
    assert [p.task for p in read_mm_safetybench(root, ["typo"])] == ["typo"] * 4


def test_text_alone_needs_no_images_and_a_missing_one_is_named(tmp_path):
    write_questions(tmp_path)
    assert len(read_mm_safetybench(tmp_path, ["text_only"])) == 4
    with pytest.raises(
        ValueError, match=r"SD/0\.jpg: no such image, named by .*Activitiy\.json: entry '0'.*evaluate\.tasks"
    ):
        read_mm_safetybench(tmp_path)
    with pytest.raises(ValueError, match=r"has no task 'image_typo'; expected some of text_only, sd, typo, sd_typo"):
        read_mm_safetybench(tmp_path, ["image_typo"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"Activitiy\.json: not a JSON file of questions"),
        ("[]", "expected an object with one entry for each question, got list"),
        ("{}", "expected an object with one entry"),
        ('{"0": 1}', "entry '0': expected an object with the question's texts, got int"),
        ('{"../x": {}}', r"entry '\.\./x': expected an id of letters"),
        ('{"0": {}, "0": {}}', "the key '0' occurs twice"),
        (json.dumps({"0": entry("x") | {"Changed Question": " "}}), r"entry '0': 'Changed Question' holds ' '"),
        (json.dumps({"0": {k: v for k, v in entry("x").items() if k != "Rephrased Question"}}),
         "'Rephrased Question' holds nothing, expected a text"),
    ],
)  # fmt: skip
def test_broken_files_are_named_with_their_entry(root, text, message):
    (root / QUESTIONS / "01-Illegal_Activitiy.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mm_safetybench(root)


def test_another_folder_is_no_benchmark(tmp_path):
    with pytest.raises(ValueError, match=r"processed_questions: no \*\.json files; give the folder that holds"):
        read_mm_safetybench(tmp_path)


def test_links_do_not_lead_out_of_the_folder(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    image = image_path(root, "TYPO", "01-Illegal_Activitiy", "0")
    outside.write_bytes(image.read_bytes())
    image.unlink()
    image.symlink_to(outside)
    with pytest.raises(ValueError, match="lies outside"):
        read_mm_safetybench(root)
