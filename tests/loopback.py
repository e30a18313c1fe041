"""A real HTTP server on 127.0.0.1 that speaks the OpenAI chat completions API and misbehaves on request.

    with LoopbackServer(answer=lambda body: "hello") as server:
        server.script += [Status(429, retry_after=0.1), Drop()]     # the next two requests; then `answer` again
        ... server.base_url ... server.requests ... server.max_concurrency

Or the fixture `loopback` (a server that answers "ok"). Nothing leaves the machine.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.local_http import LocalHttp


@dataclass(frozen=True)
class Status:
    """An HTTP error, as OpenAI words it; `{key}` in the message is replaced by the key the client sent."""

    code: int
    retry_after: float | str | None = None
    message: str = "scripted error"


@dataclass(frozen=True)
class Garbage:
    """HTTP 200 with a body that is no chat completion."""

    body: str = "<html>a proxy's page</html>"
    content_type: str = "application/json"


@dataclass(frozen=True)
class Text:
    """A chat completion with this content (for instance invalid JSON)."""

    content: str | None
    finish_reason: str = "stop"
    refusal: str | None = None


@dataclass(frozen=True)
class Slow:
    """The headers and half of the body at once, the rest after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Drop:
    """The connection is reset before any answer."""


Behaviour = Status | Garbage | Text | Slow | Drop


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    path: str
    authorization: str | None
    body: dict[str, Any]


class LoopbackServer(LocalHttp):
    """Answers `POST {base_url}/chat/completions` with `answer(body)`: a str, or a `Behaviour`.

    `key`: if set, any other bearer token gets a 401. `delay`: seconds every answer takes. `refuse_schema`: answer 400
    to `response_format`, as servers without structured output do. `script`: behaviours for the next requests, in turn.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | Behaviour] = lambda body: "ok",
        key: str | None = None,
        delay: float = 0.0,
        refuse_schema: bool = False,
    ):
        super().__init__()
        self.answer, self.key, self.delay, self.refuse_schema = answer, key, delay, refuse_schema
        self.script: list[Behaviour] = []
        self.requests: list[Seen] = []
        self.max_concurrency = 0
        self._active = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def count(self) -> int:
        """Requests received, that is: calls that a real provider would bill."""
        return len(self.requests)

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        super().__exit__(*exc)

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(Seen(handler.path, handler.headers.get("Authorization"), body))
            self._active += 1
            self.max_concurrency = max(self.max_concurrency, self._active)
            what: str | Behaviour | None = self.script.pop(0) if self.script else None
        try:
            if self.delay:
                self._closing.wait(self.delay)
            if not handler.path.endswith("/chat/completions"):
                what = Status(404, message=f"unknown path {handler.path}")
            elif self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
                what = Status(401, message="Incorrect API key provided: {key}")
            elif what is None and self.refuse_schema and "response_format" in body:
                what = Status(400, message="response_format is not supported")
            self._send(handler, self.answer(body) if what is None else what, body)
        finally:
            with self._lock:
                self._active -= 1

    def _send(self, handler: BaseHTTPRequestHandler, what: str | Behaviour, body: dict[str, Any]) -> None:
        if isinstance(what, str):
            what = Text(what)
        if isinstance(what, Drop):
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            handler.connection.close()  # linger 0: the client sees a reset, not an empty answer
            handler.close_connection = True
        elif isinstance(what, Status):
            token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
            error = {"message": what.message.replace("{key}", token), "type": "scripted", "code": None}
            headers = {} if what.retry_after is None else {"Retry-After": str(what.retry_after)}
            _write(handler, what.code, json.dumps({"error": error}), headers)
        elif isinstance(what, Garbage):
            _write(handler, 200, what.body, {"Content-Type": what.content_type})
        elif isinstance(what, Slow):
            payload = json.dumps(_completion(Text("late"), body)).encode()
            _head(handler, 200, len(payload), {})
            handler.wfile.write(payload[: len(payload) // 2])
            handler.wfile.flush()
            self._closing.wait(what.seconds)
            handler.wfile.write(payload[len(payload) // 2 :])
        else:
            _write(handler, 200, json.dumps(_completion(what, body)), {})


def _completion(text: Text, body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text.content, "refusal": text.refusal}
    words = sum(len(str(m["content"]).split()) for m in body["messages"]), len((text.content or "").split())
    return {
        "id": "chatcmpl-loopback",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": text.finish_reason}],
        "usage": {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)},
    }


def _head(handler: BaseHTTPRequestHandler, code: int, length: int, headers: dict[str, str]) -> None:
    handler.send_response(code)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()


def _write(handler: BaseHTTPRequestHandler, code: int, text: str, headers: dict[str, str]) -> None:
    payload = text.encode()
    _head(handler, code, len(payload), headers)
    handler.wfile.write(payload)


@pytest.fixture
def loopback() -> Iterator[LoopbackServer]:
    """A running server that answers "ok"; change its attributes in the test."""
    with LoopbackServer() as server:
        yield server
