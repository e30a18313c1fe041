"""The guard's server over real HTTP: the official client in front, a real and often broken upstream behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from mllm.guard import REFUSAL, Guard
from mllm.guard_backends import Upstream
from mllm.guard_server import check_address
from tests.loopback import Drop, Garbage, Slow, Status, Text
from tests.mllm.guard_running import Running, running
from tests.mllm.guard_world import MARKER, SAFE, detector, detoxifier, words
from tests.streaming_upstream import DONE, RESET, Endless, Events, StreamingUpstream, chunk, delta, event, whole

ASK = [{"role": "user", "content": "w1 w2 ?"}]
BENIGN = words(40, 3)
HARMFUL = words(40, 3, marker_at=20)  # in the third sentence
BEFORE = HARMFUL[: HARMFUL.index(".", HARMFUL.index(".") + 1) + 1]  # the two harmless ones


@pytest.fixture(scope="module")
def upstream() -> Iterator[StreamingUpstream]:
    with StreamingUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def server(upstream: StreamingUpstream) -> Iterator[Running]:
    """Detector alone; short patience."""
    backend = Upstream(upstream.base_url, idle_timeout=0.5, max_chars=4_000, max_bytes=200_000)
    with running(Guard(detector(), timeout=10.0), backend) as one:
        yield one


@pytest.fixture(autouse=True)
def fresh(upstream: StreamingUpstream) -> None:
    upstream.answer, upstream.closed, upstream.delay = lambda body: BENIGN, 0, 0.0
    upstream.script.clear()
    upstream.requests.clear()


def client(server: Running, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", **{"max_retries": 0, "timeout": 20, **settings})


def ask(server: Running, **more: Any) -> Any:
    return client(server).chat.completions.create(model="m", messages=ASK, **more)  # type: ignore[call-overload]


def raw(server: Running, body: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
    return httpx.post(
        f"{server.base_url}/chat/completions", json=body or {"model": "m", "messages": ASK, **more}, timeout=20
    )


def joined(events: Any) -> str:
    return "".join(e.choices[0].delta.content or "" for e in events if e.choices)


@pytest.mark.parametrize(
    "text", [BENIGN, " w1\n\n\tw2.  w3 \n", "w1 é 漢字。w2 🙂 'w3'!\r\n```\nw4\n```", "w" * 3000, ""]
)
def test_an_unflagged_answer_passes_byte_for_byte(upstream: StreamingUpstream, server: Running, text: str) -> None:
    upstream.answer = lambda body: text
    response = ask(server)
    assert response.choices[0].message.content == text
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.prompt_tokens == 3
    assert joined(ask(server, stream=True)) == text

    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as c:
            one = await c.chat.completions.create(model="m", messages=ASK)  # type: ignore[arg-type]
            stream = await c.chat.completions.create(model="m", messages=ASK, stream=True)  # type: ignore[arg-type]
            return one.choices[0].message.content, joined([e async for e in stream])

    assert asyncio.run(both()) == (text, text)


def test_a_flagged_answer_becomes_the_refusal(upstream: StreamingUpstream, server: Running) -> None:
    upstream.answer = lambda body: HARMFUL
    choice = ask(server).choices[0]
    assert (choice.message.content, choice.finish_reason) == (REFUSAL, "content_filter")


def test_a_flagged_stream_stops_before_the_harmful_sentence(upstream: StreamingUpstream, server: Running) -> None:
    upstream.answer = lambda body: Events([*whole(HARMFUL)[:30], *[0.05, delta(" w1")] * 400])
    events = list(ask(server, stream=True))
    assert joined(events) == f"{BEFORE}\n\n{REFUSAL}"
    assert events[-1].choices[0].finish_reason == "content_filter"
    until(lambda: upstream.closed == 1)  # nothing more is paid for


def test_what_is_shown_lags_at_most_one_sentence(upstream: StreamingUpstream, server: Running) -> None:
    """The upstream goes on only when the client has seen the sentence before; else the answer would break off."""
    first, second = threading.Event(), threading.Event()
    upstream.answer = lambda body: Events([delta("w1 w2 w3. w4 w5"), first, delta(". "), second, *whole("w6")])
    seen = []
    for e in ask(server, stream=True):
        if text := e.choices[0].delta.content:
            seen.append(text)
            (first if len(seen) == 1 else second).set()
    assert seen == ["w1 w2 w3.", " w4 w5.", " w6"]


@pytest.mark.parametrize(
    ("target", "content", "finish"), [(SAFE, "this is fine.", "stop"), (f"{MARKER} w1 .", REFUSAL, "content_filter")]
)
def test_a_flagged_answer_is_rewritten_and_the_rewrite_is_scored(
    upstream: StreamingUpstream, target: str, content: str, finish: str
) -> None:
    upstream.answer = lambda body: HARMFUL
    guard = Guard(detector(), detoxifier(target), max_new_tokens=12)
    with running(guard, Upstream(upstream.base_url)) as server:
        choice = ask(server).choices[0]
        assert (choice.message.content, choice.finish_reason) == (content, finish)


# Every place of a response where an upstream could put words that nobody scores. Each holds the marker.
BAD: dict[str, dict[str, Any]] = {
    "content": {"content": f"w1 {MARKER} w2"},
    "refusal": {"content": None, "refusal": MARKER},
    "refusal beside content": {"content": "w1.", "refusal": f" {MARKER}"},
    "content parts": {"content": [{"type": "text", "text": MARKER}, {"type": "thinking", "text": MARKER}]},
    "reasoning": {"content": "w1.", "reasoning_content": MARKER, "reasoning": MARKER},
    "tool call": {"content": "w1.", "tool_calls": [{"id": MARKER, "function": {"name": MARKER, "arguments": MARKER}}]},
    "function call": {"content": "w1.", "function_call": {"name": MARKER, "arguments": MARKER}},
    "audio": {"content": "w1.", "audio": {"id": "a", "data": MARKER, "transcript": MARKER}},
    "unknown field": {"content": "w1.", MARKER: MARKER, "annotations": [{"type": MARKER}]},
    "number": {"content": 7},
    "object": {"content": {"text": MARKER}},
    "half a surrogate": {"content": f"{MARKER} \ud800"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_no_field_of_a_message_carries_unscored_words(
    upstream: StreamingUpstream, server: Running, name: str, stream: bool
) -> None:
    if stream:
        upstream.answer = lambda body: Events([chunk(BAD[name]), chunk({}, "stop"), DONE])
    else:
        choice = {"index": 0, "message": {"role": "assistant", **BAD[name]}, "finish_reason": "stop"}
        upstream.answer = lambda body: Garbage(json.dumps({"choices": [choice]}))
    check_clean(raw(server, stream=stream))


AROUND: dict[str, dict[str, Any]] = {
    "id, model, fingerprint": {"id": MARKER, "model": MARKER, "system_fingerprint": MARKER, "service_tier": MARKER},
    "finish reason": {"finish_reason": MARKER},
    "usage": {"usage": {"prompt_tokens": MARKER, "completion_tokens": 3, MARKER: 4}},
    "logprobs": {"logprobs": {"content": [{"token": MARKER, "logprob": 0}]}},
    "error": {"error": {"message": MARKER}},
    "two choices": {"more": {"index": 1, "message": {"content": MARKER}, "delta": {"content": MARKER}}},
    "another choice": {"index": 1},
    "tool call as reason": {"finish_reason": "tool_calls"},
    "no choices": {"choices": None},
    "choices of text": {"choices": [MARKER]},
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("stream", [False, True])
def test_no_field_around_a_message_carries_unscored_words(
    upstream: StreamingUpstream, server: Running, name: str, stream: bool
) -> None:
    extra = dict(AROUND[name])
    choice = {"index": extra.pop("index", 0), "finish_reason": extra.pop("finish_reason", "stop")}
    choice |= {"logprobs": extra.pop("logprobs", None), "delta" if stream else "message": {"content": "w1."}}
    more = [extra.pop("more")] if "more" in extra else []
    body = {"choices": [choice, *more], **extra}
    upstream.answer = lambda _: Events([event(body), DONE]) if stream else Garbage(json.dumps(body))
    check_clean(raw(server, stream=stream))


def check_clean(response: httpx.Response) -> None:
    assert MARKER not in response.text
    assert response.status_code in (200, 502)
    if response.status_code == 200:
        assert "w1." in response.text or REFUSAL in response.text or '"error"' in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("what", "status"),
    [
        (Drop(), 502),
        (Slow(3.0), 504),
        (Garbage(), 502),
        (Garbage("[1]"), 502),
        (Garbage("[" * 100_000), 502),
        (Garbage('{"choices": []}'), 502),
        (Garbage("x" * 300_000), 502),
        (Status(500, message=MARKER), 502),
        (Status(400, message=MARKER), 400),
        (Status(401, message=MARKER), 502),
        (Status(404, message=MARKER), 404),
        (Status(429, retry_after=7, message=MARKER), 429),
        (Status(302, message=MARKER), 502),
    ],
    ids=str,
)
def test_a_broken_upstream_is_an_error_in_words_of_ours(
    upstream: StreamingUpstream, server: Running, what: Any, status: int, stream: bool
) -> None:
    if stream and isinstance(what, Slow):
        what = Events([2.0])
    upstream.answer = lambda body: what
    with pytest.raises(openai.APIStatusError) as caught:
        list(ask(server, stream=True)) if stream else ask(server)
    assert caught.value.status_code == status
    assert MARKER not in caught.value.response.text
    if status == 429:
        assert caught.value.response.headers["retry-after"] == "7"


MIDWAY: dict[str, Any] = {
    "reset": Events([delta("w1. w2"), RESET]),
    "closed without an end": Events([delta("w1. w2")]),
    "hangs": Events([delta("w1. w2"), 3.0]),
    "no JSON": Events([delta("w1. w2"), b"data: {]\n\n"]),
    "error event": Events([delta("w1. w2"), event({"error": {"message": MARKER}})]),
    "never ends": Endless(delta("w1. w2 ")),
    "one endless line": Endless(b"data: " + b"x" * 1000),
}


@pytest.mark.parametrize("name", MIDWAY)
def test_a_stream_that_breaks_off_ends_in_an_error_and_shows_only_what_was_scored(
    upstream: StreamingUpstream, server: Running, name: str
) -> None:
    upstream.answer = lambda body: MIDWAY[name]
    shown: list[str] = []
    with pytest.raises(openai.APIError):
        shown.extend(e.choices[0].delta.content or "" for e in ask(server, stream=True))
    if name in ("never ends", "one endless line"):
        assert len("".join(shown)) <= 4_000
    else:
        assert "".join(shown) == "w1."  # "w2" was not known to be whole


def test_a_failing_detector_refuses_and_never_shows_the_answer(upstream: StreamingUpstream) -> None:
    def not_a_number(model: Any) -> None:
        torch.nn.init.constant_(model.score.weight, float("nan"))

    def raises(model: Any) -> None:
        model.score = torch.nn.Linear(7, 1)

    def hangs(model: Any) -> None:
        model.register_forward_pre_hook(lambda *args: time.sleep(1.0))

    for damage, reason in ((not_a_number, "detector_invalid"), (raises, "detector_error"), (hangs, "detector_timeout")):
        guard = Guard(broken := detector(), detoxifier(), timeout=0.4)
        damage(broken.model)
        with running(guard, Upstream(upstream.base_url)) as server:
            assert ask(server).choices[0].message.content == REFUSAL
            assert joined(ask(server, stream=True)) == REFUSAL
            page = httpx.get(f"{server.root}/metrics").text
            assert f'seawall_guard_answers_total{{action="refused",reason="{reason}"}} 2.0' in page


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"store": True}, "store"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"other": 1}}, "stream_options"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Sure, first"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": True}, *ASK]}, "messages[0].prefix"),
    ],
    ids=str,
)
def test_a_field_that_would_open_a_way_around_is_refused_by_name(
    upstream: StreamingUpstream, server: Running, change: dict[str, Any], param: str
) -> None:
    response = raw(server, {"model": "m", "messages": ASK, **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert upstream.count == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": NaN}', b"[" * 100_000, b'{"model": "\\ud800"}', b"\xff"]
)
def test_a_body_that_is_no_request_is_a_400(server: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.base_url}/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_messages_with_media_and_sampling_go_upstream_unchanged(upstream: StreamingUpstream, server: Running) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}}
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    messages = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": [image, sound, {"type": "text", "text": "w4"}]},
    ]
    client(server).chat.completions.create(
        model="m", messages=messages, temperature=0.5, max_tokens=9, stop=["w9"], n=1, tools=[], logprobs=False  # type: ignore[arg-type]
    )  # fmt: skip
    sent = upstream.requests[-1].body
    assert sent == {"model": "m", "messages": messages, "temperature": 0.5, "max_tokens": 9, "stop": ["w9"]}


def test_the_key_is_wanted_where_there_is_one_and_not_passed_on(upstream: StreamingUpstream) -> None:
    upstream.key = "upstream-key"
    try:
        backend = Upstream(upstream.base_url, key="upstream-key")
        with running(Guard(detector()), backend, api_key="client-key") as server:
            good = openai.OpenAI(base_url=server.base_url, api_key="client-key", max_retries=0)
            assert good.chat.completions.create(model="m", messages=ASK).choices[0].message.content == BENIGN  # type: ignore[arg-type]
            assert [m.id for m in good.models.list()] == ["up"]
            for wrong in ("client-kez", "client-key2", "é", "upstream-key"):
                bearer = {"Authorization": f"Bearer {wrong}".encode()}
                for path in ("/v1/models", "/metrics"):
                    assert httpx.get(server.root + path, headers=bearer).status_code == 401
                sent = httpx.post(
                    f"{server.base_url}/chat/completions", json={"model": "m", "messages": ASK}, headers=bearer
                )
                assert sent.status_code == 401
            assert httpx.get(f"{server.root}/healthz").json() == {"status": "ok"}
    finally:
        upstream.key = None


def test_without_a_key_only_names_of_this_machine_and_json_are_answered(server: Running) -> None:
    body = {"model": "m", "messages": ASK}
    url = f"{server.base_url}/chat/completions"
    assert httpx.post(url, json=body, headers={"Host": "evil.example"}).status_code == 400
    plain = httpx.post(url, content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert httpx.get(f"{server.root}/docs").status_code == 404


@pytest.mark.parametrize(("host", "key", "safe"), [
    ("127.0.0.1", None, True), ("::1", None, True), ("localhost", None, True), ("0.0.0.0", "k" * 16, True),
    ("0.0.0.0", None, False), ("::", None, False), ("10.0.0.1", "short", False), ("example.org", None, False),
])  # fmt: skip
def test_an_address_that_others_reach_needs_a_key(host: str, key: str | None, safe: bool) -> None:
    if safe:
        check_address(host, key)
    else:
        with pytest.raises(ValueError, match="API key"):
            check_address(host, key)


def test_a_request_that_is_too_large_is_refused_before_it_is_read(upstream: StreamingUpstream) -> None:
    with running(Guard(detector()), Upstream(upstream.base_url), max_body=2000) as server:
        url, headers = f"{server.base_url}/chat/completions", {"Content-Type": "application/json"}
        assert httpx.post(url, content=b"x" * 2001, headers=headers).status_code == 413
        endless = (b"x" * 500 for _ in range(10))  # no content length
        assert httpx.post(url, content=endless, headers=headers).status_code == 413
        assert raw(server).status_code == 200


def test_a_request_that_never_arrives_is_given_up(upstream: StreamingUpstream) -> None:
    with running(Guard(detector()), Upstream(upstream.base_url), timeout=0.3) as server:
        port = int(server.root.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as s:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            s.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            s.settimeout(5)
            assert b"408" in s.recv(4096).splitlines()[0]


def test_a_full_queue_answers_429_with_retry_after(upstream: StreamingUpstream) -> None:
    upstream.delay = 0.4
    with running(Guard(detector()), Upstream(upstream.base_url), max_active=1, max_waiting=1) as server:
        with ThreadPoolExecutor(5) as pool:
            responses = list(pool.map(lambda _: raw(server), range(5)))
        codes = sorted(r.status_code for r in responses)
        assert codes == [200, 200, 429, 429, 429]
        refused = next(r for r in responses if r.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert raw(server).status_code == 200  # every place was given back
        # The official client waits and comes back by itself.
        with ThreadPoolExecutor(3) as pool:
            patient = [pool.submit(lambda: client(server, max_retries=5).models.list()) for _ in range(3)]
            assert [f.result().data[0].id for f in patient] == ["up"] * 3


def test_a_client_that_leaves_frees_its_place_and_the_upstream(upstream: StreamingUpstream) -> None:
    upstream.answer = lambda body: Events([delta("w1. w2"), *[0.05, delta(" w3")] * 200])
    with running(Guard(detector()), Upstream(upstream.base_url), max_active=1, max_waiting=0) as server:
        stream = ask(server, stream=True)
        assert next(stream).choices[0].delta.content == ""
        assert raw(server).status_code == 429
        stream.close()
        until(lambda: upstream.closed == 1)
        upstream.answer = lambda body: Slow(5.0)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.base_url}/chat/completions", json={"model": "m", "messages": ASK}, timeout=0.2)
        upstream.answer = lambda body: BENIGN
        until(lambda: raw(server).status_code == 200)


def test_a_request_ends_at_its_deadline(upstream: StreamingUpstream) -> None:
    upstream.answer = lambda body: Events([delta("w1. w2"), *[0.05, delta(" w3")] * 200])
    with running(Guard(detector()), Upstream(upstream.base_url), timeout=0.5) as server:
        start = time.monotonic()
        with pytest.raises(openai.APIError, match="too long"):
            list(ask(server, stream=True))
        upstream.answer = lambda body: Slow(5.0)
        assert raw(server).status_code == 504
        assert time.monotonic() - start < 8  # the upstream would take 10 and 5


def test_concurrent_streams_are_all_answered_and_all_guarded(upstream: StreamingUpstream) -> None:
    """A third harmful; the detector is asked in batches."""
    upstream.answer = lambda body: words(32, int(body["user"]), marker_at=20 if int(body["user"]) % 3 == 0 else None)
    sizes: list[int] = []
    guard = Guard(detector(), timeout=30, observe=lambda kind, seconds, size: sizes.append(size))
    with running(guard, Upstream(upstream.base_url), max_active=32, max_waiting=64, timeout=60) as server:

        async def one(c: openai.AsyncOpenAI, n: int) -> tuple[str, float]:
            start = time.monotonic()
            stream = await c.chat.completions.create(model="m", messages=ASK, stream=True, user=str(n))  # type: ignore[arg-type]
            return joined([e async for e in stream]), time.monotonic() - start

        async def everyone() -> list[tuple[str, float]]:
            async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as c:
                return await asyncio.gather(*(one(c, n) for n in range(60)))

        results = asyncio.run(everyone())
        for n, (text, _) in enumerate(results):
            if n % 3 == 0:
                assert MARKER not in text
                assert text.endswith(REFUSAL)
            else:
                assert text == words(32, n)
        times = sorted(t for _, t in results)
        print(f"60 concurrent streams: p50 {times[30]:.2f} s, p99 {times[-1]:.2f} s")
        page = httpx.get(f"{server.root}/metrics").text
        assert 'seawall_guard_answers_total{action="refused",reason="harmful"} 20.0' in page
        assert "seawall_guard_active 0.0" in page
        assert sum(sizes) > len(sizes)  # some were scored together


def test_metrics_and_errors_hold_no_text(
    upstream: StreamingUpstream, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.script += [Text(f"{MARKER} w2"), Status(500, message=MARKER)]
    raw(server, {"model": MARKER, "messages": [{"role": "user", "content": MARKER}]})
    raw(server)
    assert MARKER not in httpx.get(f"{server.root}/metrics").text
    assert MARKER not in caplog.text


def test_a_running_answer_is_finished_when_the_server_stops(upstream: StreamingUpstream) -> None:
    upstream.answer = lambda body: Events([delta("w1. "), 0.5, *whole("w2.")])
    texts: list[str] = []
    with running(Guard(detector()), Upstream(upstream.base_url), grace=5) as server:
        stream = ask(server, stream=True)
        next(stream)
        reader = threading.Thread(target=lambda: texts.append(joined(stream)))
        reader.start()
    reader.join(5)
    assert texts == ["w1. w2."]
    with pytest.raises(openai.APIConnectionError):
        ask(server)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
