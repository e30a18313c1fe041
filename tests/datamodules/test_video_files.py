"""Video files: which frames come, and what every kind of damage and trickery is told."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from datamodules.media_files import MediaRules, VideoClip, model_input, open_medium
from datamodules.video_files import chosen_frames, encode_video
from tests.clips import audio, colours, levels, video

ALL = MediaRules("video")


def test_every_frame_comes_back_in_order(tmp_path: Path) -> None:
    frames = colours(12)
    clip = open_medium(video(tmp_path / "a.mp4", frames, fps=8), ALL)
    assert isinstance(clip, VideoClip)
    assert (clip.frames.shape, clip.frames.dtype, clip.fps, clip.seconds) == (frames.shape, np.uint8, 8, 1.5)
    assert np.abs(np.array(levels(clip.frames)) - np.array(levels(frames))).max() <= 3  # H.264 is lossy
    assert model_input(clip) is clip.frames


@pytest.mark.parametrize(
    ("rules", "indices"),
    [
        (MediaRules("video", frames=4), [0, 4, 7, 11]),
        (MediaRules("video", frames=1), [0]),
        (MediaRules("video", frames=24), [round(i * 11 / 23) for i in range(24)]),  # more than there are: repeated
        (MediaRules("video", fps=2), [0, 6, 11]),
        (MediaRules("video", fps=0.1), [0]),
    ],
)
def test_the_frames_that_were_asked_for_are_evenly_spread(
    tmp_path: Path, rules: MediaRules, indices: list[int]
) -> None:
    frames = colours(12)
    clip = open_medium(video(tmp_path / "a.mp4", frames, fps=8), rules)
    assert np.abs(np.array(levels(clip.frames)) - np.array(levels(frames[indices]))).max() <= 3
    assert clip.seconds == pytest.approx(1.5)  # fewer frames, the same time


def test_frames_are_scaled_while_they_are_decoded(tmp_path: Path) -> None:
    clip = open_medium(video(tmp_path / "a.mp4", colours(3)), MediaRules("video", size=(20, 10)))
    assert clip.frames.shape == (3, 10, 20, 3)


def test_the_same_frames_give_the_same_bytes() -> None:
    assert encode_video(colours(30, (64, 48)), 24) == encode_video(colours(30, (64, 48)), 24)


def test_odd_sides_no_frames_and_changing_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"31 x 16 px: H.264 wants even sides"):
        encode_video(colours(2, (31, 16)), 10)
    with pytest.raises(ValueError, match="at least one frame"):
        encode_video([], 10)
    with pytest.raises(ValueError, match="different sizes"):
        encode_video([*colours(1), *colours(1, (16, 16))], 10)


@pytest.mark.parametrize("cut", [0, 30, 0.5, 0.95])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, cut: float) -> None:
    path = video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(cut) if cut >= 1 or not cut else int(cut * len(data))])
    with pytest.raises(ValueError, match=r"a\.mp4: cannot be read as a video .*fetch the file again"):
        open_medium(path, ALL)


def test_frames_that_are_promised_but_not_there_are_damage(tmp_path: Path) -> None:
    """With its index in front, a cut file opens, and only some of its frames can be decoded."""
    path = tmp_path / "front.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert len(open_medium(path, ALL).frames) == 40
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"front\.mp4: only \d+ of its 40 frames are there; it is cut short"):
        open_medium(path, ALL)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(5000) + data[middle + 5000 :])
    with pytest.raises(ValueError, match=r"front\.mp4: (only \d+ of its 40 frames|cannot be read as a video)"):
        open_medium(path, ALL)


@pytest.mark.parametrize("data", [b"", b"hello, this is no video at all", bytes(5000)])
def test_what_is_no_video_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.mp4: cannot be read as a video"):
        open_medium(tmp_path / "x.mp4", ALL)
    with pytest.raises(ValueError, match=r"none\.mp4: cannot be opened \(No such file"):
        open_medium(tmp_path / "none.mp4", ALL)


def test_a_file_that_names_other_files_is_not_followed(tmp_path: Path) -> None:
    """FFmpeg itself opens what an ffconcat file lists: outside of the data's folder, or anywhere."""
    secret = video(tmp_path / "secret.mp4", colours(3))
    listing = f"ffconcat version 1.0\nfile {secret}\n".encode()
    with av.open(io.BytesIO(listing), options={"safe": "0"}) as followed:  # what would happen without our options
        assert followed.format.name == "concat"
        assert followed.streams.video
    (tmp_path / "innocent.mp4").write_bytes(listing)
    with pytest.raises(ValueError, match=r"innocent\.mp4: cannot be read as a video"):
        open_medium(tmp_path / "innocent.mp4", ALL)


def test_a_file_without_pictures_is_told_from_a_broken_one(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4: no video stream, found audio; expected a video"):
        open_medium(tmp_path / "sound.mp4", ALL)
    audio(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match=r"sound\.wav: cannot be read as a video"):
        open_medium(tmp_path / "sound.wav", ALL)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (MediaRules("video", max_seconds=1), "2.0 s long, at most 1 are taken"),
        (MediaRules("video", max_pixels=500), "frames of 32 x 16 px, at most 500 pixels"),
        (MediaRules("video", max_megabytes=0.02), "20 frames of 32 x 16 px take 0 MB, at most 0.02"),
        (MediaRules("video", max_megabytes=0.0001), r"0 MB, at most 0.0001 are taken \(media.max_megabytes\)"),
    ],
)
def test_too_much_is_refused_before_it_is_decoded(tmp_path: Path, rules: MediaRules, reason: str) -> None:
    path = video(tmp_path / "a.mp4", colours(20))
    with pytest.raises(ValueError, match=rf"a\.mp4: {reason}"):
        open_medium(path, rules)


def test_few_frames_of_a_long_clip_are_not_too_much(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", colours(200))
    rules = MediaRules("video", frames=4, max_megabytes=0.02)
    assert open_medium(path, rules).frames.shape[0] == 4
    with pytest.raises(ValueError, match=r"set media.frames"):
        open_medium(path, MediaRules("video", max_megabytes=0.02))


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "a.mp4", colours(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[media\]'"):
        open_medium(path, ALL)


def test_chosen_frames_keep_first_and_last() -> None:
    for n in range(2, 30):
        chosen = chosen_frames(100, 25, n, None)
        assert (chosen[0], chosen[-1], len(chosen)) == (0, 99, n)
        assert chosen == sorted(set(chosen))
