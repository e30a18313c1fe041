"""A local audio model behind the guard: recordings in the request, and recordings that are none."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch

from configs.compose import compose
from datamodules.micro_lessons import all_texts
from datamodules.micro_media import micro_medium
from mllm.generate import answer
from mllm.guard import Guard
from mllm.guard_local import Local
from mllm.guard_media import decode_audio
from mllm.guard_protocol import RequestError
from mllm.loading import MLLM, assemble
from mllm.micro_qwen2_audio import build_model, build_processor
from mllm.micro_tokenizer import words_of
from tests.mllm.guard_running import Running, running
from tests.mllm.guard_world import detector

QUESTION = "Describe what you hear in the audio in one sentence."


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    """The embedded audio model's architecture with random weights: what it says means nothing."""
    spec = compose(["experiment=sea_audio"], check_paths=False).config.model
    processor = build_processor(words_of(all_texts(spec.prompts, micro_medium("audio"))))
    torch.manual_seed(0)
    return assemble(build_model(processor), processor, spec)


@pytest.fixture(scope="module")
def server(mllm: MLLM) -> Iterator[Running]:
    with running(Guard(detector()), Local(mllm, max_new_tokens=8)) as one:
        yield one


def tone(seconds: float = 2.0, rate: int = 16000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(np.arange(round(seconds * rate)) * 440 * 2 * np.pi / rate)
    return np.stack([wave] * channels, axis=1).astype(np.float32)


def part(samples: np.ndarray, rate: int = 16000, form: str = "wav", says: str | None = None) -> dict[str, Any]:
    soundfile.write(
        buffer := io.BytesIO(), samples, rate, format=form.upper(), subtype="FLOAT" if form == "wav" else None
    )
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": says or form}}


def test_it_answers_about_a_recording_as_the_model_does(mllm: MLLM, server: Running) -> None:
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    for samples in (tone(), tone(4.0)[:, ::-1]):
        (expected,) = answer(mllm, [QUESTION], [samples[:, 0]], 8)
        asked: Any = [{"role": "user", "content": [part(samples), {"type": "text", "text": QUESTION}]}]
        found = client.chat.completions.create(model="m", messages=asked)
        assert found.choices[0].message.content == expected
        stream = client.chat.completions.create(model="m", messages=asked, stream=True)
        assert "".join(e.choices[0].delta.content or "" for e in stream) == expected


def test_another_rate_and_several_channels_become_the_models() -> None:
    plain = decode_audio(part(tone()), 16000)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, tone()[:, 0])
    np.testing.assert_allclose(decode_audio(part(tone(channels=2)), 16000), plain, atol=1e-6)
    from_44100 = decode_audio(part(tone(rate=44100), 44100, "flac"), 16000)
    assert abs(len(from_44100) - len(plain)) <= 1
    n = min(len(from_44100), len(plain)) - 400
    np.testing.assert_allclose(from_44100[400:n], plain[400:n], atol=2e-3)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "cannot be read"),
        ({"type": "input_audio", "input_audio": {"data": "%%", "format": "wav"}}, "cannot be read"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "exe"}}, "one of wav"),
        ({"type": "input_audio"}, "expected input_audio"),
        (part(tone(), says="mp3"), "is WAV, its format says mp3"),
        (part(tone(0.0)), "empty"),
        (part(tone() * np.nan), "no numbers"),
        (part(tone(0.01)), "s"),
        (part(tone(1, 1000), 1000), "expected 4000 to 192000"),
        (part(tone() * 1e38), "no numbers"),
        (part(tone(9.0)), "s"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "takes audio parts only"),
    ],
)
def test_what_is_no_recording_for_this_model_is_a_400(server: Running, bad: dict[str, Any], told: str) -> None:
    content = [bad, {"type": "text", "text": QUESTION}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    response = httpx.post(f"{server.base_url}/chat/completions", json=body)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]


def test_a_recording_of_hours_is_refused_by_its_header() -> None:
    with pytest.raises(RequestError, match="longer than 600 s") as error:
        decode_audio(part(tone(601, 4000), 4000, "flac"), 16000)
    assert error.value.status == 413
