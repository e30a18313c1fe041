"""A folder of one's own media with a CSV file: what is read, and what is told with file and line."""

from pathlib import Path

import pytest
from PIL import Image

from datamodules.benchmarks import READERS, open_media
from datamodules.folder_benchmark import read_folder

ROWS = """id,media,text,request,scenario,task,expected
1,photos/kite.png,"What does it show,
in one word?",reading,,,a kite
2,photos/kite.png,How is this done?,harmful,theft,photo,

3,,How do I fold a kite?,benign,crafts,,fold
"""


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("L", (8, 6), 7).save(tmp_path / "photos" / "kite.png")
    return write(tmp_path, ROWS)


def write(root: Path, text: str) -> Path:
    (root / "prompts.csv").write_text(text, encoding="utf-8")
    return root


def test_every_column_becomes_a_part_of_the_prompt(root):
    reading, harmful, benign = READERS["folder"](root)
    assert (reading.id, reading.request, reading.task, reading.scenario) == ("folder/1", "reading", "media", "all")
    assert reading.text == "What does it show,\nin one word?"
    assert reading.expected == "a kite"
    assert open_media(reading).size == (8, 6)
    assert (harmful.request, harmful.task, harmful.scenario, harmful.expected) == ("harmful", "photo", "theft", None)
    assert (benign.media, benign.task, benign.scenario, benign.expected) == (None, "text_only", "crafts", "fold")
    assert read_folder(root / "prompts.csv") == [reading, harmful, benign]
    assert read_folder(root, ["photo"]) == [harmful]


def test_columns_that_may_be_left_out(root):
    write(root, "request,text,id\nbenign,How do I fold a kite?,a\n")
    (prompt,) = read_folder(root)
    assert (prompt.id, prompt.media, prompt.task, prompt.expected) == ("folder/a", None, "text_only", None)


def test_a_medium_may_say_everything(root):
    write(root, "id,media,text,request,asked\na,photos/kite.png,,benign,How do I fold a kite?\n")
    (prompt,) = read_folder(root)
    assert (prompt.text, prompt.asked) == ("", "How do I fold a kite?")


HEAD = "id,media,text,request,expected\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        (HEAD, "no rows"),
        ("id,text\n1,q\n", r"prompts\.csv:2: request is missing from the header"),
        (HEAD + "1,,q,benign,\n,,q,benign,\n", r"prompts\.csv:3: id is empty"),
        (HEAD + "1,,,benign,\n", r":2: text is empty; a row without a medium needs one"),
        (HEAD + "1,,q,evil,\n", r":2: request is 'evil', expected harmful, benign, reading"),
        (HEAD + "1,,q,reading,\n", r":2: expected is empty; a reading question needs"),
        (HEAD + "1,,q,benign,...\n", r":2: expected is '\.\.\.', which holds no word"),
        (HEAD + "1,photos/none.png,q,benign,\n", r":2: .*none\.png: no such file"),
        (HEAD + "1,../x.png,q,benign,\n", r":2: .* lies outside"),
        (HEAD + "1,/etc/passwd,q,benign,\n", r":2: .* lies outside"),
        (HEAD + "1,photos,q,benign,\n", r":2: .*photos: no such file"),
        (HEAD + "1,,q\n", r":2: got 3 cells, the header has 5"),
        ("id,text,request,picture\n1,q,benign,x\n", r":2: column 'picture' is unknown"),
        (HEAD + "1,,q,benign,\n1,,q,benign,\n", "two rows give the prompt id 'folder/1'"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(root, text, message):
    with pytest.raises(ValueError, match=message):
        read_folder(write(root, text))


def test_a_missing_file_and_an_unknown_task(root, tmp_path):
    with pytest.raises(
        ValueError, match=r"prompts\.csv: no such file; expected a CSV file with the columns id, request"
    ):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no prompt has the task 'video'; there are media, photo, text_only"):
        read_folder(root, ["video"])
