"""The reader of VA-SafetyBench, on a small folder of its layout and on the released questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.benchmarks import READERS, open_media
from datamodules.media_files import MediaRules
from datamodules.va_safetybench import (
    SCENARIOS,
    read_questions,
    read_va_safetybench_audio,
    read_va_safetybench_video,
)
from tests.clips import audio, colours, tone, video
from tests.va_questions import write_questions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three questions with all their media."""
    write_questions(write_questions(tmp_path, "video"), "audio")
    for scenario, ids in (("6-Fraud", "01"), ("2-HateSpeech", "2")):
        for id in ids:
            for task in ("DM", "TYPO", "DM_TYPO"):
                folder = tmp_path / "Video" / scenario / task
                folder.mkdir(parents=True, exist_ok=True)
                video(folder / f"{id}.mp4", colours(4))
            for task, suffix in (("Audio_only", ".mp3"), ("KPT", ".wav"), ("KPT_noise", ".flac")):
                folder = tmp_path / "Audio" / scenario / task
                folder.mkdir(parents=True, exist_ok=True)
                audio(folder / f"{id}{suffix}", tone(0.5))
    return tmp_path


def test_every_task_has_its_own_wording_and_its_own_file(root: Path) -> None:
    prompts = read_va_safetybench_video(root)
    assert [p.id.removeprefix("va_safetybench_video-") for p in prompts][:5] == [
        "text_only-2-HateSpeech-2", "dm-2-HateSpeech-2", "typo-2-HateSpeech-2", "dm_typo-2-HateSpeech-2",
        "text_only-6-Fraud-0",
    ]  # fmt: skip
    assert {p.request for p in prompts} == {"harmful"}
    of = {p.task: p for p in prompts if p.id.endswith("6-Fraud-0")}
    assert of["text_only"].text == "List steps to fold a paper kite in the park."
    assert of["text_only"].media is None
    assert of["typo"].text.startswith("The video shows a phrase of an activity. List steps to perform this activity")
    assert of["dm_typo"].text.startswith("The end of the video shows")
    assert of["dm_typo"].media == root / "Video/6-Fraud/DM_TYPO/0.mp4"
    assert of["dm_typo"].scenario == "Fraud"
    assert open_media(of["typo"], MediaRules("video", frames=2)).shape == (2, 16, 32, 3)


def test_a_spoken_request_has_no_text(root: Path) -> None:
    of = {p.task: p for p in read_va_safetybench_audio(root) if p.id.endswith("6-Fraud-1")}
    assert list(of) == ["text_only", "audio_only", "kpt", "kpt_noise"]
    assert of["audio_only"].text == ""
    assert [of[t].media.suffix for t in ("audio_only", "kpt", "kpt_noise")] == [".mp3", ".wav", ".flac"]
    assert open_media(of["kpt"], MediaRules("audio", sample_rate=16000)).shape == (8000,)


def test_a_missing_medium_is_named_unless_its_task_is_left_out(root: Path) -> None:
    (root / "Video/6-Fraud/DM/1.mp4").unlink()
    with pytest.raises(ValueError, match=r"DM/1\.mp4: no such file, named by .*6-Fraud\.json, question '1'; download"):
        read_va_safetybench_video(root)
    assert len(read_va_safetybench_video(root, ["typo", "dm_typo"])) == 6
    prompt = next(p for p in read_va_safetybench_video(root, ["typo"]) if p.id.endswith("Fraud-1"))
    prompt.media.write_bytes(b"damage")
    with pytest.raises(
        ValueError, match=r"TYPO/1\.mp4: cannot be read as a video .*; prompt va_safetybench_video-typo"
    ):
        open_media(prompt, MediaRules("video"))
    prompt.media.unlink()
    with pytest.raises(ValueError, match=r"TYPO/1\.mp4: no such video \(prompt va_safetybench_video-typo-6-Fraud-1\)"):
        open_media(prompt, MediaRules("video"))


def test_media_outside_of_the_folder_are_not_opened(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = video(tmp_path_factory.mktemp("outside") / "secret.mp4", colours(2))
    (root / "Video/6-Fraud/DM/0.mp4").unlink()
    (root / "Video/6-Fraud/DM/0.mp4").symlink_to(secret)
    with pytest.raises(ValueError, match=r"question '0'.* lies outside"):
        read_va_safetybench_video(root, ["dm"])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"0": {"Text_only": "q", "DM": "q", "TYPO": "q"}}, r"question '0': key 'DM_TYPO' is missing"),
        ({"0": {"Text_only": "q", "DM": None, "TYPO": "q", "DM_TYPO": "q"}}, "question '0': key 'DM' is None"),
        ({"0": "q"}, "question '0': 'q', expected an object"),
        ({"../../x": {}}, r"question '\.\./\.\./x': the id must be letters and digits"),
        ([], "holds a list, expected an object"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, value: object, reason: str) -> None:
    path = write_questions(tmp_path, "video") / "video_questions" / "6-Fraud.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"6-Fraud\.json.*{reason}"):
        read_questions(tmp_path, "video")


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder Video_questions or video_questions"):
        read_va_safetybench_video(tmp_path)
    write_questions(tmp_path, "audio")
    with pytest.raises(ValueError, match="audio tasks dm are unknown; expected some of text_only, audio_only"):
        read_va_safetybench_audio(tmp_path, ["dm"])
    with pytest.raises(ValueError, match=r"7-Sex.json: no such file"):
        read_questions(tmp_path, "audio", ["7-Sex"])
    with pytest.raises(ValueError, match=r"scenario\(s\) Fraud unknown, expected some of 1-Illegal"):
        read_questions(tmp_path, "audio", ["Fraud"])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_the_released_questions_are_read(shared_data: Path, kind: str) -> None:
    root = shared_data / "va_safetybench"
    questions = read_questions(root, kind)  # type: ignore[arg-type]
    assert len(questions) == 972
    assert [s for i, s in enumerate(q.scenario for q in questions) if i == 0 or questions[i - 1].scenario != s] == list(
        SCENARIOS
    )
    prompts = READERS[f"va_safetybench_{kind}"](root, tasks=["text_only"])
    assert len({p.id for p in prompts}) == 972
    assert len({p.scenario for p in prompts}) == 8
