"""The chat client against a real HTTP server on loopback that misbehaves in every way a provider does."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from datamodules.chat_api import ChatAPI, Reply, Request
from tests.loopback import Drop, Garbage, LoopbackServer, Slow, Status, Text, loopback  # noqa: F401

KEY = "sk-loopback-123456"
SCHEMA = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)


def client(server: LoopbackServer, folder: Path, **settings: Any) -> ChatAPI:
    given = {"api_key_env": "LOOPBACK_KEY", "backoff": 0.01, "timeout": 60.0} | settings
    return ChatAPI(server.base_url, "m", folder, **given)


def questions(n: int) -> list[Request]:
    return [Request.user(f"question {i}") for i in range(n)]


def test_replies_come_in_the_order_of_the_requests(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.answer = lambda body: body["messages"][-1]["content"].upper()
    seen: list[tuple[int, int]] = []
    replies = client(loopback, tmp_path).complete_many(questions(9), progress=lambda *p: seen.append(p))
    assert [r.text for r in replies] == [f"QUESTION {i}" for i in range(9)]
    assert seen == [(i, 9) for i in range(1, 10)]


def test_request_carries_key_model_settings_and_schema(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.key = KEY
    loopback.answer = lambda body: json.dumps({"kind": "product"})
    api = client(loopback, tmp_path, temperature=None, max_tokens=7, params={"seed": 3})
    (reply,) = api.complete_many([Request.user("q", system="be brief", schema=SCHEMA)])
    assert reply.data == {"kind": "product"}
    (request,) = loopback.requests
    assert request.authorization == f"Bearer {KEY}"
    assert request.body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    assert request.body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (request.body["model"], request.body["max_tokens"], request.body["seed"]) == ("m", 7, 3)
    assert "temperature" not in request.body


@pytest.mark.parametrize(
    "trouble",
    [
        Status(429),
        Status(500),
        Status(503),
        Status(408),
        Garbage(),
        Garbage("{}"),
        Garbage("busy", "text/plain"),
        Garbage("[" * 100_000),
        Garbage('{"choices": ' + "1" * 5000 + "}"),
        Garbage('{"choices": {"a": 1}}'),
        Garbage('{"choices": 3}'),
        Garbage('{"choices": [{"message": "hello"}]}'),
        Garbage('{"choices": [{"finish_reason": "stop", "message": {"content": [{"type": "text", "text": "x"}]}}]}'),
        Drop(),
    ],
    ids=lambda trouble: str(trouble)[:80],
)
def test_passing_trouble_is_retried(loopback: LoopbackServer, tmp_path: Path, trouble: Any) -> None:  # noqa: F811
    loopback.script = [trouble, trouble]
    api = client(loopback, tmp_path)
    assert api.complete_many(questions(1)) == [Reply(text="ok")]
    assert (loopback.count, api.usage.requests, api.usage.retries, api.usage.failed) == (3, 3, 2, 0)


@pytest.mark.parametrize("usage", ["none", [1], {"prompt_tokens": "many"}], ids=str)
def test_an_odd_token_count_does_not_cost_the_answer(loopback: LoopbackServer, tmp_path: Path, usage: Any) -> None:  # noqa: F811
    message = {"finish_reason": "stop", "message": {"content": "ok"}}
    loopback.script = [Garbage(json.dumps({"choices": [message], "usage": usage}))]
    api = client(loopback, tmp_path)
    assert api.complete_many(questions(1)) == [Reply(text="ok")]
    assert (api.usage.prompt_tokens, api.usage.completion_tokens) == (0, 0)


def test_lasting_trouble_costs_one_request_not_the_batch(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return Status(500) if body["messages"][-1]["content"] == "question 1" else "ok"

    with LoopbackServer(answer) as server:
        api = client(server, tmp_path, max_retries=2)
        replies = api.complete_many(questions(3))
        assert [r.text for r in replies] == ["ok", None, "ok"]
        assert "HTTP 500" in str(replies[1].error)
        assert "3 attempt(s)" in str(replies[1].error)
        assert (server.count, api.usage.failed) == (5, 1)
        server.answer = lambda body: "late"
        again = client(server, tmp_path).complete_many(questions(3))
        assert [r.text for r in again] == ["ok", "late", "ok"]
        assert server.count == 6, "only the failed one is asked again"


def test_retry_after_is_honoured(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.script = [Status(429, retry_after=0.4)]
    start = time.monotonic()
    assert client(loopback, tmp_path, backoff=0).complete_many(questions(1))[0].text == "ok"
    assert time.monotonic() - start >= 0.4


def test_retry_after_beyond_max_wait_fails_at_once(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.script = [Status(429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT")]
    (reply,) = client(loopback, tmp_path, max_wait=5).complete_many(questions(1))
    assert "the server asks to wait" in str(reply.error)
    assert loopback.count == 1


def test_slow_answer_times_out_and_is_retried(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.script = [Slow(20)]
    start = time.monotonic()
    assert client(loopback, tmp_path, timeout=0.4).complete_many(questions(1))[0].text == "ok"
    assert time.monotonic() - start < 10
    loopback.script = [Slow(20)]
    (reply,) = client(loopback, tmp_path / "b", timeout=0.4, max_retries=0).complete_many(questions(1))
    assert "no complete answer within 0.4 s" in str(reply.error)


@pytest.mark.parametrize("content", ["no json at all", '{"kind": ', '{"other": 1}', "[1]", "", "[" * 100_000])
def test_answer_that_breaks_the_schema_is_asked_for_once_more(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    content: str,
) -> None:
    loopback.answer = lambda body: Text(content)
    (reply,) = client(loopback, tmp_path).complete_many([Request.user("q", schema=SCHEMA)])
    assert reply.text is None
    assert str(reply.error).startswith("the answer ")
    assert loopback.count == 2, "these answers cost tokens: no more than max_content_retries"
    loopback.answer = lambda body: 'Sure: {"kind": "activity"} as asked'
    (reply,) = client(loopback, tmp_path).complete_many([Request.user("q", schema=SCHEMA)])
    assert reply.data == {"kind": "activity"}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (Text("half of", finish_reason="length"), "raise max_tokens"),
        (Text(None, refusal="I will not."), "refused"),
        (Text("", finish_reason="content_filter"), "content filter"),
        (Status(400, message="context too long"), "context too long"),
    ],
    ids=str,
)
def test_what_repeating_cannot_mend_is_not_repeated(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    what: Any,
    why: str,
) -> None:
    loopback.answer = lambda body: what
    (reply,) = client(loopback, tmp_path).complete_many(questions(1))
    assert why in str(reply.error)
    assert loopback.count == 1


def test_server_without_structured_output_gets_the_schema_in_words(tmp_path: Path) -> None:
    with LoopbackServer(lambda body: '{"kind": "product"}', refuse_schema=True) as server:
        api = client(server, tmp_path, concurrency=1)
        replies = api.complete_many([Request.user(f"q{i}", schema=SCHEMA) for i in range(3)])
        assert [r.data for r in replies] == [{"kind": "product"}] * 3
        assert server.count == 4, "the refusal is remembered"
        assert '"required": ["kind"]' in server.requests[-1].body["messages"][-1]["content"]


def test_wrong_key_is_found_out_by_one_request(tmp_path: Path) -> None:
    with LoopbackServer(key="another") as server:
        replies = client(server, tmp_path, concurrency=1).complete_many(questions(5))
        assert all("HTTP 401" in str(r.error) for r in replies)
        assert server.count == 1


def test_exhausted_quota_ends_the_batch(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})

    class Broke(LoopbackServer):
        def _send(self, handler: Any, what: Any, asked: Any) -> None:
            handler.send_response(429)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body.encode())

    with Broke() as server:
        replies = client(server, tmp_path, concurrency=1).complete_many(questions(4))
        assert server.count == 1
        assert all("quota" in str(r.error) for r in replies)


def test_concurrency_is_bounded_and_used(tmp_path: Path) -> None:
    with LoopbackServer(delay=0.5) as server:
        client(server, tmp_path, concurrency=3, timeout=60).complete_many(questions(6))
        assert server.max_concurrency == 3


def test_no_call_is_paid_twice(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    api = client(loopback, tmp_path)
    first = api.complete_many(questions(4) + questions(4))
    assert loopback.count == 4, "equal requests of one batch are sent once"
    second = client(loopback, tmp_path).complete_many(questions(4))
    assert loopback.count == 4
    assert [r.text for r in first[:4]] == [r.text for r in second]
    assert all(r.cached for r in second)
    assert (api.usage.requests, api.usage.cached) == (4, 4)


@pytest.mark.parametrize("change", [{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"params": {"seed": 1}}])
def test_cache_tells_settings_apart(loopback: LoopbackServer, tmp_path: Path, change: dict[str, Any]) -> None:  # noqa: F811
    settings = {"base_url": loopback.base_url, "model": "m", "cache_dir": tmp_path, "api_key_env": None}
    ChatAPI(**settings).complete_many(questions(1))
    ChatAPI(**(settings | change)).complete_many(questions(1))
    assert loopback.count == 2


def test_schema_is_part_of_the_cache_key(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    loopback.answer = lambda body: '{"kind": "product"}'
    api = client(loopback, tmp_path)
    plain, structured = api.complete_many([Request.user("q"), Request.user("q", schema=SCHEMA)])
    assert plain.data is None
    assert structured.data == {"kind": "product"}
    assert loopback.count == 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"text": "altered", "sha256": "0"}', b"[]", b"\xff\xfe"], ids=str)
def test_damaged_cache_entry_is_named_and_fetched_again(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    damage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client(loopback, tmp_path).complete_many(questions(1))
    (entry,) = tmp_path.rglob("*.json")
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    (reply,) = client(loopback, tmp_path).complete_many(questions(1))
    assert (reply.text, reply.cached, loopback.count) == ("ok", False, 2)
    assert entry.name in caplog.text
    assert entry.read_bytes() == whole


def test_reply_that_cannot_be_cached_is_not_lost(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = client(loopback, tmp_path)

    def answer(body: dict[str, Any]) -> str:
        api._cache.path(api._key(questions(1)[0])).mkdir(parents=True)  # a folder now stands where the entry should go
        return "ok"

    loopback.answer = answer
    assert api.complete_many(questions(1)) == [Reply(text="ok")]
    assert "could not be cached" in caplog.text


def run_in_child(server: LoopbackServer, folder: Path, n: int, concurrency: int = 2) -> subprocess.Popen[str]:
    program = f"""
        from datamodules.chat_api import ChatAPI, Request
        api = ChatAPI({server.base_url!r}, "m", {str(folder)!r}, api_key_env="LOOPBACK_KEY", concurrency={concurrency})
        print([r.text for r in api.complete_many([Request.user(f"question {{i}}") for i in range({n})])])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_killed_run_resumes_from_the_cache(tmp_path: Path) -> None:
    with LoopbackServer(delay=0.1) as server:
        child = run_in_child(server, tmp_path, 40)
        while server.count < 10:
            assert child.poll() is None, "the child ended before it was killed"
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        time.sleep(0.5)  # what was on its way to the server arrives
        paid, kept = server.count, len(list(tmp_path.rglob("*.json")))
        assert kept >= paid - 2, "all but those in flight are kept"
        server.delay = 0
        replies = client(server, tmp_path).complete_many(questions(40))
        assert all(r.text == "ok" for r in replies)
        assert server.count == paid + 40 - kept


def test_two_processes_share_the_bill(tmp_path: Path) -> None:
    with LoopbackServer(delay=0.15) as server:
        child = run_in_child(server, tmp_path, 12)
        while server.count < 1:
            assert child.poll() is None, "the child ended without a request"
            time.sleep(0.01)
        replies = client(server, tmp_path, concurrency=2).complete_many(questions(12))
        out, _ = child.communicate(timeout=60)
        assert all(r.text == "ok" for r in replies)
        assert out.strip() == str(["ok"] * 12)
        assert server.count == 12
        assert not list(tmp_path.rglob("*.lock"))


def test_interruption_cancels_what_is_in_flight(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with LoopbackServer(delay=0.05) as server:
        with pytest.raises(Stop):
            client(server, tmp_path, concurrency=2).complete_many(questions(30), progress=stop)
        time.sleep(0.2)
        assert server.count <= 6
        paid, kept = server.count, len(list(tmp_path.rglob("*.json")))
        assert kept >= 3
        client(server, tmp_path).complete_many(questions(30))
        assert server.count == paid + 30 - kept


def test_works_inside_a_running_event_loop(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    async def notebook_cell() -> list[Reply]:
        return client(loopback, tmp_path).complete_many(questions(2))

    assert [r.text for r in asyncio.run(notebook_cell())] == ["ok", "ok"]


def test_key_is_nowhere_to_be_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with LoopbackServer(key="another") as server:  # its 401 sends the key back
        api = client(server, tmp_path, max_retries=1)
        (refused,) = api.complete_many(questions(1))
        server.key = KEY
        server.script = [Status(500, message="upstream said {key}"), Status(500, message="upstream said {key}")]
        (failed,) = api.complete_many([Request.user("a")])
        api.complete_many([Request.user("b")])
    assert "[key]" in str(refused.error)
    assert "[key]" in str(failed.error)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = [repr(api), repr(vars(api)), str(refused), str(failed), caplog.text, stored.decode()]
    assert not [text for text in everything if KEY in text]
    assert "POST" in caplog.text, "the log was watched at the level where the library shows requests"


@pytest.mark.parametrize("value", [None, "", "  "])
def test_missing_key_is_named_before_anything_is_sent(
    loopback: LoopbackServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
) -> None:
    client(loopback, tmp_path).complete_many(questions(1))
    monkeypatch.delenv("LOOPBACK_KEY") if value is None else monkeypatch.setenv("LOOPBACK_KEY", value)
    assert client(loopback, tmp_path).complete_many(questions(1))[0].cached, "a full cache needs no key"
    with pytest.raises(ValueError, match="environment variable LOOPBACK_KEY is not set"):
        client(loopback, tmp_path).complete_many(questions(2))
    assert loopback.count == 1


def test_key_given_in_place_of_the_name_is_refused_unseen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="api_key_env: expected the NAME") as caught:
        ChatAPI("http://127.0.0.1:1/v1", "m", tmp_path, api_key_env=KEY)
    assert KEY not in "".join(traceback.format_exception(caught.value)).replace("api_key_env=KEY", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "expected http"),
        ({"base_url": "https://me:secret@host/v1"}, "user name or password"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ChatAPI(**({"base_url": "http://h/v1", "model": "m", "cache_dir": tmp_path} | settings))
    assert "secret" not in str(caught.value)


def test_unreachable_server_is_an_error_result(tmp_path: Path) -> None:
    api = ChatAPI("http://127.0.0.1:9/v1", "m", tmp_path, api_key_env=None, max_retries=1, backoff=0)
    (reply,) = api.complete_many(questions(1))
    assert "APIConnectionError" in str(reply.error)


def test_many_threads_may_use_one_client(loopback: LoopbackServer, tmp_path: Path) -> None:  # noqa: F811
    api = client(loopback, tmp_path)
    results: list[list[Reply]] = []
    threads = [threading.Thread(target=lambda: results.append(api.complete_many(questions(5)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[r.text for r in replies] for replies in results] == [["ok"] * 5] * 3
    assert loopback.count == 5
