"""An OpenAI-compatible chat server that lets no unscored text out (`python -m mllm.guard serve`).

    client -> key, size, fields -> queue -> upstream or local model -> guard -> client

Routes: POST /v1/chat/completions (streaming or not), GET /v1/models, GET /healthz (open), GET /metrics. It fails
closed: whatever goes wrong with the detector ends in the refusal, anything else in an error with words of ours.
What a request may ask and a response may hold: guard_protocol.py. Needs the extra `serve` (fastapi, uvicorn, httpx,
prometheus-client); the guard itself does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from mllm.guard import Guard
from mllm.guard_backends import Backend, Piece
from mllm.guard_metrics import Metrics
from mllm.guard_protocol import Chat, Chunks, FinishReason, RequestError, completion, parse_chat, sse
from mllm.guard_queue import Place, Queue, Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
SHORTEST_KEY = 16
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back


def make_app(guard: Guard, backend: Backend, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application. It closes guard and backend when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        guard.close()
        await backend.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if settings.api_key is None:  # a page in a browser must not reach this server under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    queue = Queue(settings, metrics)

    def failed(error: RequestError) -> Response:
        metrics.errors.labels(str(error.status)).inc()
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestError)
    async def expected(request: Request, error: RequestError) -> Response:
        return failed(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return failed(RequestError(error.status_code, "there is no such route"))

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"}) if guard.alive else JSONResponse({"status": "guard has ended"}, 503)

    @app.get("/metrics")
    async def page(request: Request) -> Response:
        _authorize(request, settings)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authorize(request, settings)
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "seawall"} for n in await backend.models()]
        return JSONResponse({"object": "list", "data": data})

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        deadline = time.monotonic() + settings.timeout
        _authorize(request, settings)
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the content type must be application/json")
        chat = parse_chat(await _body(request, settings.max_body, deadline))
        backend.check(chat)
        place = await queue.enter(deadline)
        try:
            if chat.stream:
                pieces = backend.stream(chat)
                first = await _until(_next(pieces), deadline, request)  # errors before the first word keep their status
                return Events(_events(guard, chat, first, pieces, deadline, metrics), place, pieces)
            with place:
                return JSONResponse(await _until(_answer(guard, backend, chat, metrics), deadline, request))
        except RequestError:
            place.leave()
            raise
        except BaseException as error:  # not one exception may carry a model's words out
            place.leave()
            if not isinstance(error, Exception):
                raise
            log.error("guard server: %s", type(error).__name__)
            raise RequestError(500, "the guard failed") from None

    return app


class Events(StreamingResponse):
    """Server-sent events. Gives its place back and closes the upstream, also if the client left before the first."""

    def __init__(self, events: AsyncIterator[bytes], place: Place, pieces: AsyncIterator[Piece]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._place, self._pieces = place, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()
            await _close(self.body_iterator)
            await _close(self._pieces)


async def _answer(guard: Guard, backend: Backend, chat: Chat, metrics: Metrics) -> dict[str, Any]:
    """A whole response."""
    piece = await backend.complete(chat)
    guarded = await guard.check_async(chat.question, piece.text)
    metrics.answers.labels(guarded.action, guarded.reason).inc()
    finish: FinishReason = piece.finish or "stop"
    if guarded.action != "passed":
        finish = "content_filter" if guarded.action == "refused" else "stop"
    return completion(chat, guarded.answer, finish, piece.usage, guarded.action)


async def _events(
    guard: Guard, chat: Chat, first: Piece | None, pieces: AsyncIterator[Piece], deadline: float, metrics: Metrics
) -> AsyncIterator[bytes]:
    """A streamed response: text leaves only through `growing`. An error ends it, without the final event."""
    chunks, growing = Chunks(chat), guard.begin(chat.question)
    piece, finish, usage = first, "stop", dict[str, int]()
    try:
        yield chunks.role()
        while piece is not None and not growing.stopped:
            for text in await growing.feed_async(piece.text):
                yield chunks.text(text)
            finish, usage = piece.finish or finish, {**usage, **piece.usage}
            if not growing.stopped:
                piece = await _until(_next(pieces), deadline)
        if not growing.stopped:
            for text in await growing.finish_async():
                yield chunks.text(text)
        if growing.stopped:
            finish = "content_filter"
        metrics.answers.labels(growing.action, growing.reason).inc()
        yield chunks.end(finish, usage, growing.action)  # type: ignore[arg-type]  # a FinishReason, from a Piece
    except Exception as error:  # as above; what was released was scored, what was not never leaves
        if not isinstance(error, RequestError):
            log.error("guard server: %s", type(error).__name__)
            error = RequestError(500, "the guard failed")
        metrics.errors.labels(str(error.status)).inc()
        yield sse(error.body())


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


async def _until(work: Coroutine[Any, Any, T], deadline: float, request: Request | None = None) -> T:
    """The work's result, unless the deadline passes or (given the request) the client leaves: then it is cancelled.

    Raises:
        RequestError: 504 at the deadline, 499 for a client that has gone and will not read it.
    """
    task = asyncio.ensure_future(work)
    tasks: set[asyncio.Future[Any]] = {task}
    if request is not None:
        tasks.add(asyncio.ensure_future(_gone(request)))
    try:
        seconds = max(0.0, deadline - time.monotonic())
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise RequestError(499, "the client left") if done else RequestError(504, "the answer took too long")
    finally:
        for one in tasks:
            one.cancel()
        # Not gather: cancelled once more (Starlette's task group cancels until we are gone), it would cancel them once
        # more too, in the middle of closing the upstream's connection.
        await asyncio.wait(tasks)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _close(iterator: Any) -> None:
    """An async generator, ended now rather than when it is collected."""
    with contextlib.suppress(RuntimeError, RequestError):  # still running in a cancelled task: it ends by itself
        await iterator.aclose()


async def _body(request: Request, limit: int, deadline: float) -> bytes:
    """Raises RequestError: 413 for more than `limit` bytes, 408 if they do not come in time."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise RequestError(413, f"the request is longer than {limit} bytes")
    body, parts = bytearray(), request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(parts, None), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestError(408, "the request did not arrive in time") from None
        if part is None:
            return bytes(body)
        body += part
        if len(body) > limit:
            raise RequestError(413, f"the request is longer than {limit} bytes")


def _authorize(request: Request, settings: Settings) -> None:
    if settings.api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Of digests: neither the contents nor the length of the key shows in the time that this takes.
    digests = [hashlib.sha256(k.encode("utf-8", "replace")).digest() for k in (given.strip(), settings.api_key)]
    if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
        raise RequestError(401, "the API key is missing or wrong")


def check_address(host: str, api_key: str | None) -> None:
    """Raises ValueError: others could reach the server, and it has no key or a short one."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and len(api_key or "") < SHORTEST_KEY:
        raise ValueError(
            f"--host {host} can be reached from elsewhere: set an API key of {SHORTEST_KEY} characters or more in the "
            "environment variable named by --api-key-env, or bind to 127.0.0.1"
        )


class Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for address in self.addresses():
            log.warning("guard: listening on %s", address)

    def addresses(self) -> list[str]:
        """Base addresses for a client; a port of 0 has become a real one."""
        names = [sock.getsockname()[:2] for server in self.servers for sock in server.sockets]
        return [f"http://{f'[{host}]' if ':' in host else host}:{port}/v1" for host, port in names]


def make_server(app: FastAPI, settings: Settings, host: str, port: int) -> Server:
    """Raises ValueError: the address is not a safe one."""
    check_address(host, settings.api_key)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, int(settings.grace)),
        # Connections, idle ones too; requests have the queue.
        limit_concurrency=4 * (settings.max_active + settings.max_waiting) + 64,
        backlog=1024,
    )
    return Server(config)
