"""Audio files: rates, channels, kinds of file, and what every kind of damage is told."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datamodules.audio_files import AudioClip, encode_audio, resampled
from datamodules.media_files import MediaRules, model_input, open_medium
from tests.clips import audio, colours, tone, video

ANY = MediaRules("audio")


@pytest.mark.parametrize(("suffix", "error"), [(".wav", 1e-4), (".flac", 1e-4), (".mp3", 0.02), (".ogg", 0.02)])
def test_samples_survive_every_kind_of_file(tmp_path: Path, suffix: str, error: float) -> None:
    samples = tone(2.5)
    clip = open_medium(audio(tmp_path / f"a{suffix}", samples), ANY)
    assert isinstance(clip, AudioClip)
    assert (clip.samples.dtype, clip.sample_rate, clip.samples.ndim) == (np.float32, 16000, 1)
    assert abs(len(clip.samples) - len(samples)) <= 16000 * 0.03
    inside = slice(1000, 30000)  # a lossy format rings at the edges
    assert np.sqrt(np.mean((clip.samples[inside] - samples[inside]) ** 2)) < error
    assert model_input(clip) is clip.samples


def test_channels_become_their_mean(tmp_path: Path) -> None:
    left, right = tone(1.0), -0.5 * tone(1.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert np.allclose(open_medium(tmp_path / "a.wav", ANY).samples, 0.25 * left, atol=1e-6)


def test_another_rate_is_an_error_that_names_the_key_or_is_resampled(tmp_path: Path) -> None:
    path = audio(tmp_path / "clip.wav", tone(1.0, 44100), 44100)
    with pytest.raises(ValueError, match=r"clip\.wav: 44100 Hz, the model expects 16000; set media.resample=true"):
        open_medium(path, MediaRules("audio", sample_rate=16000))
    clip = open_medium(path, MediaRules("audio", sample_rate=16000, resample=True))
    assert (clip.sample_rate, len(clip.samples)) == (16000, 16000)
    inside = slice(400, -400)
    assert np.abs(clip.samples[inside] - tone(1.0, 16000)[inside]).max() < 2e-3  # the same tone, not a faster one


def test_resampling_keeps_what_the_new_rate_can_hold_and_drops_the_rest() -> None:
    low, high = tone(1.0, 48000, 1000), tone(1.0, 48000, 12000)
    kept = resampled(AudioClip(low + high, 48000), 16000).samples[800:-800]
    assert np.abs(kept - tone(1.0, 16000, 1000)[800:-800]).max() < 5e-3  # 12 kHz would fold to 4 kHz


def test_silence_is_added_up_to_a_length_and_nothing_is_cut(tmp_path: Path) -> None:
    path = audio(tmp_path / "a.wav", tone(1.0))
    clip = open_medium(path, MediaRules("audio", samples=20000))
    assert len(clip.samples) == 20000
    assert np.abs(clip.samples[:16000] - tone(1.0)).max() < 1e-4
    assert not clip.samples[16000:].any()
    with pytest.raises(ValueError, match=r"a\.wav: 1.00 s, the model's blank has 0.50 s; cut it"):
        open_medium(path, MediaRules("audio", samples=8000))


def test_what_comes_too_late_is_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    path = audio(tmp_path / "a.wav", tone(1.0))
    clip = open_medium(path, MediaRules("audio", cut_seconds=0.25, samples=8000))
    assert len(clip.samples) == 8000
    assert np.abs(clip.samples[:4000] - tone(1.0)[:4000]).max() < 1e-4
    assert not clip.samples[4000:].any()
    assert len(open_medium(path, MediaRules("audio", cut_seconds=2)).samples) == 16000


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = audio(tmp_path / f"a{suffix}", tone(3.0))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"a\{suffix}: .*fetch the file again"):
        open_medium(path, ANY)


def test_other_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_bytes(b"hello, this is no sound")
    with pytest.raises(ValueError, match=r"text\.wav: cannot be read as audio"):
        open_medium(tmp_path / "text.wav", ANY)
    with pytest.raises(ValueError, match=r"film\.mp4: cannot be read as audio"):
        open_medium(video(tmp_path / "film.mp4", colours(3)), ANY)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 8000, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav: holds samples that are no numbers"):
        open_medium(tmp_path / "nan.wav", ANY)
    audio(tmp_path / "empty.wav", np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"empty\.wav: 0 samples, 0.000 s; expected 0.05 s or more"):
        open_medium(tmp_path / "empty.wav", ANY)
    soundfile.write(tmp_path / "x.voc", tone(0.5), 16000)
    with pytest.raises(ValueError, match=r"x\.voc: is VOC, expected one of WAV"):
        open_medium(tmp_path / "x.voc", ANY)


def test_too_long_too_wide_and_lying_headers_cost_no_memory(tmp_path: Path) -> None:
    path = audio(tmp_path / "long.flac", tone(3.0))
    with pytest.raises(ValueError, match=r"long\.flac: 3.0 s long, at most 2 are taken; cut it .media.max_sec"):
        open_medium(path, MediaRules("audio", max_seconds=2))
    with pytest.raises(ValueError, match=r"long\.flac: 1 channels of 48000 samples take 0 MB; mix it down"):
        open_medium(path, MediaRules("audio", max_megabytes=0.1))
    header = bytearray(path.read_bytes())
    header[21:26] = bytes([header[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])  # STREAMINFO: 2^36 - 1 samples
    path.write_bytes(header)
    with pytest.raises(ValueError, match=r"long\.flac: \d+\.\d s long, at most 120 are taken"):
        open_medium(path, ANY)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5), 16000, format="WAV")
    data = bytearray(buffer.getvalue())
    data[24:28] = struct.pack("<I", 2**31 - 1)  # sample rate
    (tmp_path / "fast.wav").write_bytes(data)
    with pytest.raises(ValueError, match=r"fast\.wav: 1 channels at 2147483647 Hz, expected at most"):
        open_medium(tmp_path / "fast.wav", ANY)


def test_unknown_kinds_and_missing_packages_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"audio files \.m4a: expected one of \.wav, \.flac"):
        encode_audio(AudioClip(tone(), 16000), ".m4a")
    path = audio(tmp_path / "a.wav")
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ValueError, match=r"resampling needs soxr: pip install seawall\[media\]"):
        open_medium(path, MediaRules("audio", sample_rate=8000, resample=True))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"audio files need soundfile: pip install seawall\[media\]"):
        open_medium(path, ANY)
