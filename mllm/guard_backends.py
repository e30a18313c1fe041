"""What stands behind the guard: an OpenAI-compatible server over HTTP. (A local checkpoint: guard_local.py.)

The upstream is not trusted. It may hang, die in mid-stream, send garbage or without end: each becomes a `RequestError`
with words of ours. Of its responses only the answer's text, the reason why it ended and the token counts are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from mllm.guard_protocol import Chat, FinishReason, RequestError

log = logging.getLogger(__name__)

MAX_EVENT = 1 << 20  # bytes of one server-sent event
# The upstream's status -> ours; anything else is a 502.
PASSED_ON = {400: 400, 404: 404, 413: 413, 422: 400, 429: 429, 503: 503, 504: 504}


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes, or all of it. `finish` is set on the last part with text or after it."""

    text: str = ""
    finish: FinishReason | None = None
    usage: Mapping[str, int] = field(default_factory=dict)


class Backend(Protocol):
    """Anything that answers chats."""

    def check(self, chat: Chat) -> None:
        """Raises RequestError for what this backend cannot do."""

    async def complete(self, chat: Chat) -> Piece:
        """The whole answer. Raises RequestError."""

    def stream(self, chat: Chat) -> AsyncIterator[Piece]:
        """The answer in parts; ends only after a `finish`. Raises RequestError."""

    async def models(self) -> list[str]:
        """Names that may be asked for. Raises RequestError."""

    async def close(self) -> None:
        """Free what is held."""


class Upstream:
    """A server that speaks the OpenAI chat API.

    Args:
        url: up to and with /v1.
        key: its bearer token; the client's own is never passed on.
        connect_timeout, idle_timeout: seconds to connect, and between two parts of a response.
        max_chars: longest answer; its scoring takes time that grows with the square of its length.
        max_bytes: longest response, with everything around the answer.

    Raises:
        ValueError: not an http(s) address, or one with a login in it.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        connect_timeout: float = 10.0,
        idle_timeout: float = 60.0,
        max_chars: int = 100_000,
        max_bytes: int = 32 << 20,
        connections: int = 256,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("--upstream: expected http(s)://host[:port]/v1 and no login; a key goes into a variable")
        # identity: a compressed response could be small on the wire and endless in memory.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(idle_timeout, connect=connect_timeout, pool=connect_timeout),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=32),
            follow_redirects=False,
            trust_env=parts.hostname not in ("127.0.0.1", "::1", "localhost"),  # no proxy to this machine
        )
        self._max_chars, self._max_bytes = max_chars, max_bytes

    def check(self, chat: Chat) -> None:
        pass  # the upstream decides

    async def complete(self, chat: Chat) -> Piece:
        body = await self._json("POST", "/chat/completions", chat.payload())
        piece = _piece(body, "message")
        self._check_length(len(piece.text))
        return piece

    async def stream(self, chat: Chat) -> AsyncIterator[Piece]:
        finished, length = False, 0
        async with self._response("POST", "/chat/completions", chat.payload()) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise _garbage("no event stream")
            async for data in _events(self._bytes(response)):
                if data == b"[DONE]":
                    break
                piece = _piece(_object(data), "delta")
                length += len(piece.text)
                self._check_length(length)
                finished = finished or piece.finish is not None
                yield piece
        if not finished:
            raise RequestError(502, "the upstream broke off its answer")

    async def models(self) -> list[str]:
        body = await self._json("GET", "/models", None)
        data = body.get("data")
        names = [m.get("id") for m in data if isinstance(m, dict)] if isinstance(data, list) else []
        return [n for n in names if isinstance(n, str) and len(n) <= 256 and n.isprintable()]

    async def close(self) -> None:
        await self._client.aclose()

    def _check_length(self, chars: int) -> None:
        if chars > self._max_chars:
            raise RequestError(502, f"the upstream's answer is longer than {self._max_chars} characters")

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        async with self._response(method, path, body) as response:
            return _object(b"".join([part async for part in self._bytes(response)]))

    @asynccontextmanager
    async def _response(self, method: str, path: str, body: Mapping[str, Any] | None) -> AsyncIterator[httpx.Response]:
        try:
            async with self._client.stream(method, path, json=body) as response:
                if response.status_code != 200:
                    raise _status(response)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise _garbage("a compressed response")
                yield response
        except httpx.TimeoutException as error:
            raise RequestError(504, "the upstream did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            log.warning("upstream: %s", type(error).__name__)
            raise RequestError(502, "the upstream cannot be reached, or broke off its answer") from error

    async def _bytes(self, response: httpx.Response) -> AsyncIterator[bytes]:
        size = 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > self._max_bytes:
                raise RequestError(502, f"the upstream's response is longer than {self._max_bytes} bytes")
            yield part


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    rest, data = b"", b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data += (b"\n" if data else b"") + line[5:].removeprefix(b" ")
            elif not line and data:
                yield data
                data = b""
        if len(rest) + len(data) > MAX_EVENT:
            raise _garbage(f"an event of more than {MAX_EVENT} bytes")
    if data:
        yield data


def _piece(body: Mapping[str, Any], kind: str) -> Piece:
    """Text, reason and counts of a chunk (kind "delta") or a whole response ("message")."""
    if body.get("error"):
        raise RequestError(502, "the upstream reported an error")
    choices = body.get("choices")
    usage = _usage(body.get("usage"))
    if kind == "delta" and choices == []:
        return Piece(usage=usage)
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise _garbage("not one choice")
    choice = choices[0]
    message = choice.get(kind)
    if kind == "delta" and message is None:
        message = {}
    if not isinstance(message, dict) or choice.get("index", 0) != 0:
        raise _garbage(f"no {kind} of choice 0")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise RequestError(502, f"the upstream answered with {name}, which the guard does not pass")
    # A refusal of the upstream's own is text like any other: scored, and sent as content. Reasoning is not read at all.
    text = _text(message.get("content")) + _text(message.get("refusal"))
    reason = choice.get("finish_reason")
    if kind == "message" and reason is None:
        reason = "stop"
    if reason in ("tool_calls", "function_call"):
        raise RequestError(502, "the upstream ended with a tool call, which the guard does not pass")
    finish: FinishReason | None = None
    if reason is not None:
        finish = "length" if reason == "length" else "content_filter" if reason == "content_filter" else "stop"
    return Piece(text, finish, usage)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # some servers answer in parts; only those of type text are an answer
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        content = "".join(p if isinstance(p, str) else "" for p in parts)
    if not isinstance(content, str):
        raise _garbage("content that is no text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise _garbage("content that is no UTF-8") from None
    return content


def _usage(usage: Any) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    counts = {n: usage.get(n) for n in names}
    return {n: c for n, c in counts.items() if type(c) is int and 0 <= c < 1 << 53}


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _garbage("no JSON") from None
    if not isinstance(body, dict):
        raise _garbage("no JSON object")
    return body


def _status(response: httpx.Response) -> RequestError:
    code = response.status_code
    log.warning("upstream: HTTP %d", code)
    wait = response.headers.get("retry-after", "")
    retry_after = min(int(wait), 3600) if wait.isascii() and wait.isdigit() and len(wait) < 6 else None
    return RequestError(PASSED_ON.get(code, 502), f"the upstream refused the request (HTTP {code})", None, retry_after)


def _garbage(what: str) -> RequestError:
    return RequestError(502, f"the upstream's answer cannot be read: {what}")
