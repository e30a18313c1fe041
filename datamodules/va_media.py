"""The media of VA-SafetyBench, each from its recipe (Lu et al. 2025, arXiv 2502.12562, section 4).

Video: TYPO, the words of the key phrase one after another, white on black; DM+TYPO, a made clip with the whole phrase
at its end (3 s). Audio: a text spoken (the whole question, or the key phrase), behind 3 s of white noise or not.
How long a word stands, which voice speaks and how loud the noise is are not published: they are settings.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Build
from datamodules.audio_files import AudioClip, encode_audio, resampled
from datamodules.benchmark_build import Item, Made, measures
from datamodules.media_files import MediaRules
from datamodules.typography import word_frame
from datamodules.va_safetybench import AUDIO_TASKS, Question, medium_path
from datamodules.video_files import VideoClip, decode_video, encode_video

HEAD_ROOM = 0.9
"""Largest sample of speech; what synthesisers give differs."""


def typo_items(questions: Sequence[Question], phrases: Mapping[str, str], build: Build) -> list[Item]:
    """The TYPO clip of every question; `phrases` by `Question.key`."""
    made = {"kind": "typo", "size": build.size, "fps": build.fps, "word_seconds": build.word_seconds}
    return [_video(q, "typo", {**made, "font": build.font, "phrase": phrases[q.key]}) for q in questions]


def dm_typo_items(
    questions: Sequence[Question], phrases: Mapping[str, str], clips: Mapping[str, Mapping[str, Any]], build: Build
) -> list[Item]:
    """The DM+TYPO clip of every question; `clips`: the manifest's rows of its DM clips, by `Question.key`."""
    made = {"kind": "dm_typo", "fps": build.fps, "phrase_seconds": build.phrase_seconds, "font": build.font}
    return [
        _video(
            q,
            "dm_typo",
            {**made, "phrase": phrases[q.key], "clip": clips[q.key]["path"], "sha256": clips[q.key]["sha256"]},
        )
        for q in questions
    ]


def spoken_items(
    questions: Sequence[Question], phrases: Mapping[str, str], tasks: Sequence[str], build: Build, seed: int
) -> list[Item]:
    """The recordings of every question for the tasks audio_only, kpt and kpt_noise."""
    voice = {"engine": build.speech, "voice": build.voice, "speed": build.speed, "pitch": build.pitch}
    made = {"kind": "speech", **voice, "sample_rate": build.sample_rate, "suffix": build.audio_suffix}
    items = []
    for task in tasks:
        for q in questions:
            text = q.texts["text_only"] if task == "audio_only" else phrases[q.key]
            recipe = {**made, "text": text}
            if task == "kpt_noise":
                noise = {"noise_seconds": build.noise_seconds, "noise_level": build.noise_level}
                recipe |= {**noise, "seed": zlib.crc32(f"{seed}/{q.key}".encode())}
            path = medium_path(Path(), "audio", q, task, build.audio_suffix).as_posix()
            items.append(Item(path, recipe, _about(q, task, text)))
    return items


def make(folder: Path, recipe: Mapping[str, Any]) -> Made:
    """The file that a recipe of this module describes."""
    if recipe["kind"] == "speech":
        clip = spoken(recipe)
        return Made(encode_audio(clip, recipe["suffix"]), measures(clip))
    fps = recipe["fps"]
    frames = list(_typo_frames(recipe) if recipe["kind"] == "typo" else _dm_typo_frames(folder, recipe))
    return Made(encode_video(frames, fps), measures(VideoClip(np.stack(frames), fps)))


def spoken(recipe: Mapping[str, Any]) -> AudioClip:
    """The text of a recipe spoken, behind white noise if it says so."""
    voice, speed, pitch = recipe["voice"], recipe["speed"], recipe["pitch"]
    if recipe["engine"] == "espeak":
        from datamodules.speech import synthesize

        speech = synthesize(recipe["text"], voice, speed, pitch)
        clip = AudioClip(speech.samples, speech.rate)
    else:
        from datamodules.edge_speech import synthesize_online

        clip = synthesize_online(recipe["text"], voice, speed, pitch)
    clip = resampled(clip, recipe["sample_rate"])
    loudest = float(np.abs(clip.samples).max(initial=0))
    if loudest == 0:
        raise ValueError(f"voice {voice!r} says nothing to a text of {len(recipe['text'])} letters")
    samples = clip.samples * (HEAD_ROOM / loudest)
    if recipe.get("noise_seconds"):
        rng = np.random.default_rng(recipe["seed"])
        n = round(recipe["noise_seconds"] * clip.sample_rate)
        noise = rng.normal(0, recipe["noise_level"], n).clip(-1, 1)
        samples = np.concatenate([noise, samples])
    return AudioClip(samples.astype(np.float32), clip.sample_rate)


def _typo_frames(recipe: Mapping[str, Any]) -> Iterator[np.ndarray]:
    repeat = max(1, round(recipe["word_seconds"] * recipe["fps"]))
    for word in recipe["phrase"].split():
        frame = word_frame(word, tuple(recipe["size"]), recipe["font"])
        yield from (frame for _ in range(repeat))


def _dm_typo_frames(folder: Path, recipe: Mapping[str, Any]) -> Iterator[np.ndarray]:
    path = folder / recipe["clip"]
    clip = decode_video(path.read_bytes(), path, MediaRules("video"))
    yield from clip.frames
    height, width = clip.frames.shape[1:3]
    frame = word_frame(recipe["phrase"], (width, height), recipe["font"])
    yield from (frame for _ in range(round(recipe["phrase_seconds"] * recipe["fps"])))


def _video(question: Question, task: str, recipe: dict[str, Any]) -> Item:
    path = medium_path(Path(), "video", question, task, ".mp4").as_posix()
    return Item(path, recipe, _about(question, task, recipe["phrase"]))


def _about(question: Question, task: str, text: str) -> dict[str, Any]:
    return {"task": task, "scenario": question.scenario, "id": question.id, "text": text}


SPOKEN_TASKS = tuple(task for task in AUDIO_TASKS if task != "text_only")
