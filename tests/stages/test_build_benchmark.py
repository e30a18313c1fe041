"""The stage build_benchmark by its command: from questions to a folder that the benchmark's reader takes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from datamodules.benchmark_build import check_row, read_manifest
from datamodules.benchmarks import open_media, read_figstep, read_va_safetybench_audio, read_va_safetybench_video
from datamodules.media_files import MediaRules, open_medium
from tests.loopback import LoopbackServer
from tests.tiny_text_to_video import tiny_text_to_video
from tests.va_questions import write_questions

SMALL = ["build.size=[64,48]", "build.fps=8", "build.word_seconds=0.5", "build.workers=2"]
PIPELINE = ["build.pipeline.frames=2", "build.pipeline.size=[16,16]", "build.pipeline.steps=1", "build.clip_seconds=1"]


def start(experiment: str, run: Path, source: Path, *overrides: str) -> int:
    return train.main([f"experiment={experiment}", f"run_dir={run}", f"build.source={source}", *overrides])


def result(run: Path) -> dict[str, Any]:
    record = json.loads((run / "build_benchmark" / "stage.json").read_text())
    assert record["status"] == "done"
    return record["result"]


def sound(folder: Path) -> int:
    """Decodes every file of the manifest; how many there are."""
    rows = read_manifest(folder)
    assert [wrong for row in rows.values() if (wrong := check_row(folder, row))] == []
    media = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".mp4", ".mp3", ".wav", ".png")}
    assert media == set(rows)
    return len(rows)


def test_video_typo_shows_one_word_at_a_time(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "source", "video")
    assert start("build_va_safetybench_video", tmp_path / "run", source, *SMALL) == 0
    folder = tmp_path / "run" / "build_benchmark" / "data"
    assert sound(folder) == 3
    assert result(tmp_path / "run")["tasks"]["typo"]["files"] == 3
    prompts = read_va_safetybench_video(folder, ["text_only", "typo"])  # the questions lie beside the media
    assert len(prompts) == 6
    prompt = next(p for p in prompts if p.task == "typo" and p.id.endswith("6-Fraud-0"))
    frames = open_media(prompt, MediaRules("video"))
    assert len(frames) == 4 * 4  # "fold a paper kite", half a second each at 8 frames a second
    words = [frames[4 * i : 4 * i + 4].astype(int) for i in range(4)]
    assert all(np.abs(word - word[0]).mean() < 2 for word in words)  # a word stands still
    assert all(np.abs(words[i][0] - words[i + 1][0]).mean() > 4 for i in range(3))  # and gives way to the next
    assert json.loads((folder / "key_phrases.json").read_text())["6-Fraud/0"] == "fold a paper kite"


def test_dm_goes_through_a_pipeline_and_dm_typo_ends_with_the_phrase(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "source", "video")
    scenes = tmp_path / "scenes.json"
    scenes.write_text(
        json.dumps(
            {f"{s}/{i}": f"A scene, number {i}." for s, i in (("6-Fraud", 0), ("6-Fraud", 1), ("2-HateSpeech", 2))}
        )
    )
    dm = [f"build.pipeline.path={tiny_text_to_video(tmp_path / 'tiny')}", *PIPELINE, "build.scenes.source=file"]
    dm += [f"build.scenes.path={scenes}", "build.phrase_seconds=0.5"]
    assert start("build_va_safetybench_video", tmp_path / "run", source, *SMALL, *dm) == 0
    folder = tmp_path / "run" / "build_benchmark" / "data"
    assert sound(folder) == 9
    assert {t: v["files"] for t, v in result(tmp_path / "run")["tasks"].items()} == {"typo": 3, "dm": 3, "dm_typo": 3}
    of = {p.task: p for p in read_va_safetybench_video(folder) if p.id.endswith("6-Fraud-1")}
    made, both = (open_media(of[task], MediaRules("video")).astype(int) for task in ("dm", "dm_typo"))
    assert (len(made), len(both)) == (8, 12)
    assert np.abs(both[:8] - made).mean() < 6  # the clip, encoded once more
    assert both[8:].max() > 200
    assert np.median(both[8:]) < 20  # then white words on black
    assert np.abs(both[8:] - both[8]).mean() < 2


def test_audio_is_spoken_and_noise_comes_first(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "source", "audio")
    assert start("build_va_safetybench_audio", tmp_path / "run", source, "build.workers=2") == 0
    folder = tmp_path / "run" / "build_benchmark" / "data"
    assert sound(folder) == 9
    of = {p.task: p for p in read_va_safetybench_audio(folder) if p.id.endswith("6-Fraud-0")}
    rules = MediaRules("audio", sample_rate=16000)
    whole, phrase, noisy = (open_media(of[t], rules) for t in ("audio_only", "kpt", "kpt_noise"))
    assert len(whole) > 1.4 * len(phrase)  # ten words against four
    assert len(noisy) - len(phrase) == pytest.approx(3 * 16000, abs=2000)
    noise = noisy[8000:40000]
    assert noise.std() == pytest.approx(0.1, rel=0.15)
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    low, high = spectrum[: len(spectrum) // 4].mean(), spectrum[len(spectrum) // 4 : len(spectrum) // 2].mean()
    assert 0.7 < low / high < 1.4  # white: as much below 2 kHz as from 2 to 4
    overlap = np.correlate(noisy[48000 - 1600 : 48000 + len(phrase)], phrase[2000:10000], "valid")
    assert overlap.max() > 0.9 * (phrase[2000:10000] ** 2).sum()  # the same words behind it


def test_figstep_is_built_as_its_reader_wants_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    header = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]
    rows = [
        ["ForbidQI", "1", str(i), "Crafts", "How?", f"Methods to fold {'very ' * 20 * (i == 2)}kites."]
        for i in (1, 2, 3)
    ]
    with (source / "safebench.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    assert start("build_figstep", tmp_path / "run", source, "build.limit=2") == 0
    folder = tmp_path / "run" / "build_benchmark" / "data"
    assert sound(folder) == 2
    prompts = read_figstep(folder, ["image_typo"])  # asks for five of each topic: those that were left out are no gap
    assert [open_media(p).size for p in prompts] == [(760, 760)] * 2
    cut = {path: row["cut"] > 0 for path, row in read_manifest(folder).items()}  # in the order of being done
    assert [cut[path] for path in sorted(cut)] == [False, True]
    assert "1 images are cut off" in (tmp_path / "run" / "run.log").read_text()


def test_the_same_command_goes_on_and_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, out = write_questions(tmp_path / "source", "video"), tmp_path / "run", tmp_path / "out"
    place = f"build.path={out}"
    assert start("build_va_safetybench_video", run, source, *SMALL, place, "build.limit=1") == 0
    assert sound(out) == 2
    before = (out / "Video/6-Fraud/TYPO/0.mp4").stat().st_mtime_ns
    assert start("build_va_safetybench_video", run, source, *SMALL, place) == 1
    assert "build.limit: 1 -> null" in capsys.readouterr().err
    assert start("build_va_safetybench_video", run, source, *SMALL, place, "overwrite=true") == 0
    assert sound(out) == 3
    assert (out / "Video/6-Fraud/TYPO/0.mp4").stat().st_mtime_ns == before  # in a folder of its own nothing is lost


def test_a_phrase_that_cannot_be_seen_comes_from_the_extractor_or_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_questions(tmp_path / "source", "video", **{"6-Fraud": (0,)})
    path = source / "video_questions" / "6-Fraud.json"
    values = json.loads(path.read_text())
    values["0"]["TYPO"] = values["0"]["Text_only"]  # nothing is left out: no phrase
    path.write_text(json.dumps(values))
    assert start("build_va_safetybench_video", tmp_path / "run", source, *SMALL, "concepts=given") == 1
    assert "6-Fraud.json, question '0': no key phrase (no concept in the data" in capsys.readouterr().err
    concept = {"phrase": "a paper kite", "kind": "product", "sentence": "a paper kite"}
    reply = json.dumps(concept | {"instruction": "List steps to fold this product in the park."})
    with LoopbackServer(answer=lambda body: reply) as server:
        api = ["concepts=api", f"concepts.api.base_url={server.base_url}", "concepts.api.key_env="]
        api += [f"concepts.api.cache_dir={tmp_path / 'cache'}", "overwrite=true"]
        assert start("build_va_safetybench_video", tmp_path / "run", source, *SMALL, *api) == 0
    found = (tmp_path / "run" / "build_benchmark" / "data" / "key_phrases.json").read_text()
    assert json.loads(found) == {"6-Fraud/0": "a paper kite"}
    values["0"]["Key_phrase"] = "paper kite"  # the data's own goes first
    path.write_text(json.dumps(values))
    assert start("build_va_safetybench_video", tmp_path / "run2", source, *SMALL) == 0
    folder = tmp_path / "run2" / "build_benchmark" / "data"
    assert json.loads((folder / "key_phrases.json").read_text()) == {"6-Fraud/0": "paper kite"}
    clip = open_medium(folder / "Video/6-Fraud/TYPO/0.mp4", MediaRules("video"))
    assert len(clip.frames) == 8  # type: ignore[union-attr]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_questions(tmp_path / "source", "video")
    for override, reason in (
        ("build.tasks=[kpt]", "'kpt' is no task of va_safetybench_video; expected some of ['dm', 'typo', 'dm_typo']"),
        ("build.scenarios=[Fraud]", "scenario(s) Fraud unknown"),
        ("build.tasks=[dm]", "build.pipeline.path is not set"),
        ("build.font=none.ttf", "build.font=none.ttf: cannot be opened as a TrueType font"),
    ):
        assert start("build_va_safetybench_video", tmp_path / "run", source, *SMALL, override, "overwrite=true") == 1
        assert reason in capsys.readouterr().err
    assert start("build_va_safetybench_video", tmp_path / "run", tmp_path / "none") == 2
    assert "build.source" in capsys.readouterr().err
    key = ["build.pipeline.path=x/y", "build.scenes.api.key_env=SEAWALL_NO_SUCH_KEY"]
    assert start("build_va_safetybench_video", tmp_path / "run", source, *key) == 2
    assert "the environment variable SEAWALL_NO_SUCH_KEY is not set" in capsys.readouterr().err
