"""The readers, on small folders of the published layout and, where they are, on the published files."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from datamodules.benchmarks import FIGSTEP_PROMPT, BenchmarkPrompt, open_media, read_figstep, read_xstest

DATA = Path(__file__).parents[2] / "../shared/data"


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"{folder} is not in ../shared/data")


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


FIGSTEP = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]


@pytest.fixture
def figstep(tmp_path) -> Path:
    """Two topics of two tasks; the second task of each has no image."""
    rows = [["ForbidQI", f"{c}", f"{t}", f"Topic {c}", f"question {c}.{t}?", "list"] for c in (1, 2) for t in (1, 2)]
    write_csv(tmp_path / "safebench.csv", FIGSTEP, rows)
    (tmp_path / "images").mkdir()
    for c in (1, 2):
        Image.new("L", (20, 10), c).save(tmp_path / "images" / f"query_ForbidQI_{c}_1_6.png")
    return tmp_path


def test_figstep_pairs_every_question_with_its_image(figstep):
    prompts = read_figstep(figstep, tasks_per_topic=1)
    assert [p.id for p in prompts] == [
        "figstep-image_typo-1-1", "figstep-text_only-1-1", "figstep-image_typo-2-1", "figstep-text_only-2-1",
    ]  # fmt: skip
    image, text = prompts[2:]
    assert (image.benchmark, image.task, image.scenario, image.request) == (
        "figstep",
        "image_typo",
        "Topic 2",
        "harmful",
    )
    assert image.text == FIGSTEP_PROMPT
    assert image.media.name == "query_ForbidQI_2_1_6.png"
    assert text.text == "question 2.1?"
    assert text.media is None
    opened = open_media(image)
    assert opened.mode == "RGB"
    assert opened.size == (20, 10)
    assert opened.getpixel((0, 0)) == (2, 2, 2)
    assert open_media(text) is None


def test_an_image_that_is_missing_is_named_when_the_benchmark_is_read(figstep):
    with pytest.raises(ValueError, match=r"query_ForbidQI_1_2_6\.png: no such image, named by .*safebench\.csv:3"):
        read_figstep(figstep)
    assert len(read_figstep(figstep, tasks=["text_only"])) == 4  # no image is needed


@pytest.mark.parametrize("damage", ["cut", "text", "flipped", "header"])
def test_an_unreadable_image_is_named_when_its_turn_comes(figstep, damage):
    path = figstep / "images" / "query_ForbidQI_1_1_6.png"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-14] ^= 0xFF  # in the checksum of the pixels: they decode, but were not what was stored
    damaged = {"cut": data[: len(data) // 2], "text": b"hello", "flipped": bytes(flipped), "header": data[:20]}
    path.write_bytes(damaged[damage])
    prompts = read_figstep(figstep, tasks_per_topic=1)  # reading the benchmark opens nothing
    with pytest.raises(ValueError, match=r"query_ForbidQI_1_1_6\.png: cannot be read as an image"):
        open_media(prompts[0])
    path.unlink()
    with pytest.raises(ValueError, match=r"query_ForbidQI_1_1_6\.png: no such image \(prompt figstep-image_typo-1-1\)"):
        open_media(prompts[0])


def test_paths_stay_inside_the_folder(figstep, tmp_path_factory):
    row = ["../../x", "1", "1", "Topic", "question", "list"]
    write_csv(figstep / "safebench.csv", FIGSTEP, [["/../../" + row[0], *row[1:]]])
    with pytest.raises(ValueError, match=r"safebench\.csv:2: .* lies outside"):
        read_figstep(figstep)
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("L", (4, 4)).save(outside)
    link = figstep / "images" / "query_ForbidQI_3_1_6.png"
    link.symlink_to(outside)
    write_csv(figstep / "safebench.csv", FIGSTEP, [["ForbidQI", "3", "1", "Topic", "question", "list"]])
    with pytest.raises(ValueError, match="lies outside"):
        read_figstep(figstep)


def test_wrong_files_are_named_with_line_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"safebench\.csv: no such file"):
        read_figstep(tmp_path)
    write_csv(tmp_path / "safebench.csv", ["category_id", "question"], [["1", "q"]])
    with pytest.raises(ValueError, match=r"safebench\.csv: column\(s\) task_id, category_name, dataset missing"):
        read_figstep(tmp_path)
    write_csv(tmp_path / "safebench.csv", FIGSTEP, [["ForbidQI", "1", "one", "Topic", "question", "list"]])
    with pytest.raises(ValueError, match=r"safebench\.csv:2: task_id is 'one', expected a whole number"):
        read_figstep(tmp_path)
    header = ["id", "prompt", "type", "label"]
    write_csv(tmp_path / "xstest_prompts.csv", header, [["1", "q", "t", "safe"], ["2", "q", "t", "perhaps"]])
    with pytest.raises(ValueError, match=r"xstest_prompts\.csv:3: label is 'perhaps'"):
        read_xstest(tmp_path)
    write_csv(tmp_path / "xstest_prompts.csv", header, [["1", " ", "t", "safe"]])
    with pytest.raises(ValueError, match=r"xstest_prompts\.csv:2: prompt is empty"):
        read_xstest(tmp_path)
    write_csv(tmp_path / "xstest_prompts.csv", header, [["1", "q", "t", "safe"], ["1", "q", "t", "unsafe"]])
    with pytest.raises(ValueError, match="two rows give the prompt id 'xstest-1'"):
        read_xstest(tmp_path)
    write_csv(tmp_path / "xstest_prompts.csv", header, [])
    with pytest.raises(ValueError, match=r"xstest_prompts\.csv: no rows"):
        read_xstest(tmp_path)
    (tmp_path / "xstest_prompts.csv").write_bytes(b"id,prompt,type,label\n1,\xff,t,safe\n")
    with pytest.raises(ValueError, match="not a UTF-8 CSV file"):
        read_xstest(tmp_path)


def test_an_image_in_memory_is_given_as_it_is():
    image = Image.new("RGB", (4, 4))
    assert open_media(BenchmarkPrompt("1", "micro", "image_plain", "art", "benign", "q", image)) is image


@needs("figstep")
def test_the_published_figstep_files_are_read():
    prompts = read_figstep(DATA / "figstep")
    assert len(prompts) == 100
    assert len({p.scenario for p in prompts}) == 10
    images = [p for p in prompts if p.task == "image_typo"]
    assert open_media(images[0]).size == (760, 760)
    with pytest.raises(ValueError, match="no such image"):
        read_figstep(DATA / "figstep", tasks_per_topic=None)


@needs("xstest")
def test_the_published_xstest_prompts_are_read():
    prompts = read_xstest(DATA / "xstest")
    assert len(prompts) == 450
    assert sum(p.request == "benign" for p in prompts) == 250
    assert {p.task for p in prompts} == {"text_only"}
    assert len({p.scenario for p in prompts}) == 18
    assert read_xstest(DATA / "xstest" / "xstest_prompts.csv") == prompts  # as evaluate.xstest names it
