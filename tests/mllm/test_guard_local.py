"""A local checkpoint behind the guard: the embedded model over HTTP, and pictures from strangers."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from mllm.generate import answer
from mllm.guard import REFUSAL, Guard
from mllm.guard_local import Local
from mllm.guard_media import decode_image
from mllm.guard_protocol import Chat, RequestError
from mllm.loading import MLLM
from tests.micro import micro
from tests.mllm.guard_running import Running, running
from tests.mllm.guard_world import detector, random_detector

QUESTIONS = ["How do I bake the cake?", "List steps to paint the fence.", "Tell me how to wash the bottle."]


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    return micro()


@pytest.fixture(scope="module")
def server(mllm: MLLM) -> Iterator[Running]:
    with running(Guard(detector()), Local(mllm, max_new_tokens=24, batch_size=8), max_active=64, timeout=60) as one:
        yield one


def picture(colour: str = "red", side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    image.save(buffer := io.BytesIO(), format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(question: str, url: str | None = None) -> list[dict[str, Any]]:
    if url is None:
        return [{"role": "user", "content": question}]
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def test_it_answers_what_the_model_answers_with_and_without_a_picture(mllm: MLLM, server: Running) -> None:
    client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    question = "Describe what you see in the image in one sentence."
    for media in (None, [picture()]):
        (expected,) = answer(mllm, [question], media, 24)
        asked: Any = messages(question, data_url(media[0]) if media else None)
        whole = client.chat.completions.create(model="micro_llava", messages=asked)
        assert whole.choices[0].message.content == expected
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 3
        stream = client.chat.completions.create(model="micro_llava", messages=asked, stream=True)
        assert "".join(e.choices[0].delta.content or "" for e in stream) == expected
    assert [m.id for m in client.models.list()] == [mllm.spec.name]


def test_concurrent_requests_share_a_generation_and_keep_their_own_limits(mllm: MLLM, server: Running) -> None:
    async def everyone() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as c:
            jobs = [
                c.chat.completions.create(model="m", messages=messages(q), max_tokens=4 + n)  # type: ignore[call-overload]
                for n in range(6)
                for q in QUESTIONS
            ]
            return await asyncio.gather(*jobs)

    found = asyncio.run(everyone())
    for i, response in enumerate(found):
        (expected,) = answer(mllm, [QUESTIONS[i % 3]], None, 4 + i // 3)
        assert response.choices[0].message.content == expected
        assert response.usage.completion_tokens <= 4 + i // 3
        assert response.choices[0].finish_reason in ("length", "stop")
    assert found[0].choices[0].finish_reason == "length"


def test_a_flagged_local_answer_is_refused(mllm: MLLM) -> None:
    strict = random_detector()
    strict.threshold = 1.0  # flags everything
    with running(Guard(strict), Local(mllm, max_new_tokens=8)) as one:
        c = openai.OpenAI(base_url=one.base_url, api_key="none", max_retries=0)
        asked: Any = messages(QUESTIONS[0])
        assert c.chat.completions.create(model="m", messages=asked).choices[0].message.content == REFUSAL
        stream = c.chat.completions.create(model="m", messages=asked, stream=True)
        assert "".join(e.choices[0].delta.content or "" for e in stream) == REFUSAL


def test_sampling_draws_and_greedy_does_not(server: Running) -> None:
    def ask(**more: Any) -> str:
        body = {"model": "m", "messages": messages(QUESTIONS[0]), **more}
        return httpx.post(f"{server.base_url}/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    assert len({ask() for _ in range(3)}) == 1
    assert len({ask(temperature=2.0) for _ in range(6)}) > 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"seed": 1}, "seed"),
        ({"stop": ["x"]}, "stop"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": messages("x", "https://example.org/a.png")}, "messages"),
        ({"messages": messages("x", "file:///etc/passwd")}, "messages"),
        ({"messages": messages("a <image> b")}, "messages"),
        ({"messages": messages("a <assistant> b")}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a <e", "os> b")]}]},
            "messages",
        ),
        ({"messages": messages("word " * 600)}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
    ],
    ids=lambda c: str(c)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_local_model_cannot_do_is_a_400(server: Running, change: Any, param: str, stream: bool) -> None:
    body = {"model": "m", "messages": messages("x"), "stream": stream, **change}
    response = httpx.post(f"{server.base_url}/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_of_common_formats_are_read(kind: str) -> None:
    image = decode_image(part(data_url(picture("blue", 10), kind)))
    assert (image.mode, image.size) == ("RGB", (10, 10))
    red, green, blue = image.getpixel((5, 5))  # type: ignore[misc]
    assert blue > 200
    assert max(red, green) < 50


@pytest.mark.parametrize(
    ("url", "status"),
    [
        (None, 400),
        ("http://127.0.0.1/a.png", 400),
        ("data:image/svg+xml;base64,PHN2Zy8+", 400),
        ("data:image/png;base64,!!!!", 400),
        ("data:image/png;base64,aGVsbG8=", 400),
        ("data:image/jpeg;base64," + data_url(picture()).partition(",")[2], 400),  # a PNG under another name
        (data_url(picture())[:80], 400),  # broken off
        ("data:image/png;base64," + "A" * 4000, 413),
        (data_url(picture(side=101)), 413),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_picture_that_is_no_picture_or_too_large_is_refused(url: Any, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        decode_image(part(url), max_bytes=2000, max_pixels=10_000)
    assert caught.value.status == status


def test_media_that_no_request_can_carry_are_told_so(mllm: MLLM) -> None:
    """A model of another modality answers text; a picture sent to it is refused."""
    other = Local(dataclasses.replace(mllm, spec=dataclasses.replace(mllm.spec, modality="scent")))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    other.check(Chat("m", [{"role": "user", "content": "Hello."}], "Hello.", False, False, {}))
    with pytest.raises(RequestError, match="takes no media of modality scent: text alone"):
        other.check(Chat("m", [{"role": "user", "content": [part]}], "", False, False, {}))
