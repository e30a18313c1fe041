"""A real chat server on loopback that also streams: answers like tests/loopback.py, server-sent events as scripted.

with StreamingUpstream(lambda body: "the answer") as upstream: ...       # streamed word by word if asked to stream
with StreamingUpstream(lambda body: Events([delta("a b"), 0.1, RESET])) as upstream: ...
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import Behaviour, LoopbackServer

RESET = "reset"  # the connection is reset at this point
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Events:
    """Bytes are sent, numbers are slept (s), events waited for; `RESET` resets. The connection is closed at the end.

    An event that does not come within 5 s breaks the stream off.
    """

    script: Sequence[bytes | float | str | threading.Event]
    content_type: str = "text/event-stream"


@dataclass(frozen=True)
class Endless:
    """This event again and again, until the client has had enough."""

    event: bytes


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    """One chunk of a streamed completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "up", "object": "chat.completion.chunk", "model": "up", "choices": [choice], **more})


def delta(text: str) -> bytes:
    return chunk({"content": text})


def whole(text: str) -> list[bytes | float | str]:
    """A proper stream of this text, word by word."""
    parts = re.findall(r"\s*\S+|\s+$", text)
    return [chunk({"role": "assistant", "content": ""}), *map(delta, parts), chunk({}, "stop"), DONE]


class StreamingUpstream(LoopbackServer):
    """`closed`: streams whose client hung up before their end."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = lambda body: "ok", **settings: Any) -> None:
        super().__init__(answer, **settings)
        self.closed = 0
        outer = self

        def do_get(handler: BaseHTTPRequestHandler) -> None:
            payload = json.dumps({"object": "list", "data": [{"id": "up", "object": "model"}]}).encode()
            handler.send_response(200 if handler.path.endswith("/models") else 404)
            handler.send_header("Content-Length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload)

        assert outer._http.RequestHandlerClass is not BaseHTTPRequestHandler
        outer._http.RequestHandlerClass.do_GET = do_get  # type: ignore[attr-defined]

    def _send(self, handler: BaseHTTPRequestHandler, what: Any, body: dict[str, Any]) -> None:
        if isinstance(what, str) and body.get("stream"):
            what = Events(whole(what))
        if isinstance(what, (Events, Endless)):
            self._stream(handler, what)
        else:
            super()._send(handler, what if isinstance(what, str) else _behaviour(what), body)

    def _stream(self, handler: BaseHTTPRequestHandler, what: Events | Endless) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", what.content_type if isinstance(what, Events) else "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        try:
            if isinstance(what, Endless):
                while not self._closing.is_set():
                    handler.wfile.write(what.event)
                return
            for step in what.script:
                if step == RESET:
                    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                    handler.connection.close()
                    return
                if isinstance(step, bytes):
                    handler.wfile.write(step)
                    handler.wfile.flush()
                elif isinstance(step, threading.Event):
                    if not step.wait(5):
                        return
                else:
                    self._closing.wait(float(step))
        except OSError:
            with self._lock:
                self.closed += 1


def _behaviour(what: Any) -> Behaviour:
    assert isinstance(what, Behaviour), what
    return what
