"""A client for any OpenAI-compatible chat endpoint that never pays for the same call twice.

    api = ChatAPI("http://127.0.0.1:8000/v1", model="some-model", cache_dir="cache", api_key_env="MY_KEY")
    replies = api.complete_many([Request.user("Say hello."), ...], progress=lambda done, total: ...)

What the `openai` library gives is used (transport, errors, types). What is added here, because a batch of thousands
of paid calls needs it: a cache on disk (datamodules/text_cache.py), bounded concurrency, one retry policy for status
errors, time-outs and unusable bodies alike (the library retries only the first two, waits at most 8 s, and does not
say how many requests it sent), and counters. A request that fails for good is a `Reply` with `error`: it does not end
the batch, is not cached, and is therefore asked again by the next run.

The key is read from the environment variable `api_key_env` when the first request leaves, is not kept on the object,
and is cut out of every error text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from datamodules.chat_messages import (
    PermanentError,
    Reply,
    Request,
    RetryableError,
    UnusableError,
    parse_content,
    read_completion,
    retry_after,
)
from datamodules.text_cache import TextCache, content_key

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass
class Usage:
    """What a client has cost since it was made. `requests` counts what was sent, retries included."""

    requests: int = 0
    retries: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class ChatAPI:
    """An OpenAI-compatible endpoint.

    Args:
        base_url: e.g. `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`.
        model: the name the server knows. It is part of the cache key, the URL is not: moving a server keeps the cache,
            so give two different models behind two URLs two names or two `cache_dir`s.
        cache_dir: replies are kept here; several processes may share it.
        api_key_env: the NAME of the environment variable with the key; None for a server that wants none.
        concurrency: requests in flight at once.
        max_retries: further attempts after a failed one (429, 408, 409, 5xx, time-out, lost connection, garbled body).
        max_content_retries: the same after an answer that is empty or breaks the schema: those have cost tokens.
        timeout: seconds for one attempt, from start to the last byte.
        backoff: seconds before the first retry; doubles each time, with jitter in [0.5, 1]; `Retry-After` overrides.
        max_wait: longest pause (s) between two attempts; a server that asks for more makes the request fail.
        temperature, max_tokens: sent unless None.
        env_setting: what the caller's users call `api_key_env`, for the message that the key is not there.
        params: further request parameters, sent as they are (`{"seed": 0}`, `{"max_completion_tokens": 300}`).

    Raises:
        ValueError: an impossible setting, or the environment variable is unset when a request has to be sent.
    """

    base_url: str
    model: str
    cache_dir: str | Path
    api_key_env: str | None = "OPENAI_API_KEY"
    concurrency: int = 8
    max_retries: int = 5
    max_content_retries: int = 1
    timeout: float = 60.0
    backoff: float = 1.0
    max_wait: float = 120.0
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    env_setting: str = "api_key_env"
    params: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage, init=False)

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url={_without_login(self.base_url)!r}: expected http(s)://host[:port]/path")
        if url.username or url.password:
            raise ValueError("base_url holds a user name or password: put the key into an environment variable instead")
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            # Not shown: it may be the key itself, put here by mistake.
            raise ValueError("api_key_env: expected the NAME of an environment variable, such as OPENAI_API_KEY")
        if self.concurrency < 1 or self.timeout <= 0:
            raise ValueError(f"concurrency={self.concurrency}, timeout={self.timeout}: expected positive numbers")
        for name in ("max_retries", "max_content_retries", "backoff", "max_wait"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        self._cache = TextCache(Path(self.cache_dir))
        self._schema_refused = False

    def complete_many(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Answer all requests, in their order. Equal requests are sent once. `progress(done, total)` after each."""
        run = self._complete_many(requests, progress)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(run)
        # Inside a notebook or another event loop: give the batch a loop of its own in a thread of its own.
        box: list[list[Reply] | BaseException] = []
        thread = threading.Thread(target=lambda: box.append(_outcome(run)))
        thread.start()
        thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    async def _complete_many(self, requests: Sequence[Request], progress: Progress | None) -> list[Reply]:
        keys = [self._key(request) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        copies = Counter(keys)
        replies: dict[str, Reply] = {}
        done = 0

        def finish(key: str, reply: Reply) -> None:
            nonlocal done
            replies[key] = reply
            self.usage.cached += copies[key] if reply.cached else copies[key] - 1 if reply.error is None else 0
            self.usage.failed += copies[key] if reply.error is not None else 0
            done += copies[key]
            if progress is not None:
                progress(done, len(requests))

        for key, request in wanted.items():
            if (hit := self._from_cache(key, request)) is not None:
                finish(key, hit)
        queue = [(key, request) for key, request in reversed(wanted.items()) if key not in replies]
        if queue:
            async with self._client() as client:

                async def work() -> None:
                    while queue:
                        key, request = queue.pop()
                        try:
                            reply = await self._answer(client, key, request)
                        except PermanentError as error:
                            reply = Reply(error=str(error))
                            if error.all_requests:
                                while queue:
                                    finish(queue.pop()[0], Reply(error=f"not sent: {error}"))
                        finish(key, reply)

                await _run_workers([work() for _ in range(min(self.concurrency, len(queue)))], queue)
        return [replies[key] for key in keys]

    async def _answer(self, client: openai.AsyncOpenAI, key: str, request: Request) -> Reply:
        """The reply to a request that was not in the cache a moment ago; another process may be fetching it too."""
        async with self._cache.claim(key):
            if (hit := self._from_cache(key, request)) is not None:
                return hit
            attempts = unusable = 0
            while True:
                try:
                    return await self._send(client, key, request)
                except RetryableError as error:
                    why, wait = str(error), error.wait
                    attempts += 1
                    unusable += isinstance(error, UnusableError)
                if attempts > self.max_retries or unusable > self.max_content_retries:
                    raise PermanentError(f"{why}; gave up after {attempts} attempt(s)")
                if wait is None:
                    wait = min(self.backoff * 2 ** (attempts - 1), self.max_wait) * random.uniform(0.5, 1.0)
                elif wait > self.max_wait:
                    raise PermanentError(
                        f"{why}; the server asks to wait {wait:.0f} s, max_wait is {self.max_wait:.0f}"
                    )
                log.debug("%s; next attempt in %.1f s", why, wait)
                self.usage.retries += 1
                await asyncio.sleep(wait)

    async def _send(self, client: openai.AsyncOpenAI, key: str, request: Request) -> Reply:
        """One attempt (two where the server refuses the schema); caches what is usable."""
        plain = request.schema is None or self._schema_refused
        try:
            completion = await self._post(client, request, plain)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if plain:
                raise PermanentError(self._say(error)) from None
            # Many servers know no response_format. Ask in words; remember it only if that was indeed the reason.
            try:
                completion = await self._post(client, request, True)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as second:
                raise PermanentError(self._say(second)) from None
            if not self._schema_refused:
                log.warning("%s refuses response_format=json_schema; the schema is put into the prompt", self.model)
            self._schema_refused = True
        text, tokens = read_completion(completion)
        self.usage.prompt_tokens += tokens[0]
        self.usage.completion_tokens += tokens[1]
        reply = parse_content(text, request.schema)
        self._cache.write(key, text)
        return reply

    async def _post(self, client: openai.AsyncOpenAI, request: Request, plain: bool) -> Any:
        """Send one request; network trouble and busy servers become `RetryableError`, the rest `PermanentError`."""
        self.usage.requests += 1
        body = self._body(request, plain)
        try:
            return await asyncio.wait_for(client.chat.completions.create(**body), self.timeout)
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise RetryableError(f"no complete answer within {self.timeout:g} s") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except openai.APIStatusError as error:
            busy = error.status_code in (408, 409, 429) or error.status_code >= 500
            if not busy or error.code == "insufficient_quota":  # the latter comes as a 429
                raise PermanentError(self._say(error), all_requests=error.status_code in (401, 404, 429)) from None
            raise RetryableError(self._say(error), retry_after(error.response.headers)) from None
        except (openai.APIConnectionError, openai.APIResponseValidationError, ValueError, RecursionError) as error:
            # The last two are what the JSON reader says to garbage.
            raise RetryableError(self._say(error)) from None

    def _body(self, request: Request, plain: bool) -> dict[str, Any]:
        messages = [dict(message) for message in request.messages]
        body: dict[str, Any] = {"model": self.model, "messages": messages, **self._settings()}
        if request.schema is not None and plain:
            messages[-1]["content"] += f"\n\nAnswer with one JSON object only. Its schema: {json.dumps(request.schema)}"
        elif request.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _settings(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in given.items() if value is not None} | dict(self.params)

    def _key(self, request: Request) -> str:
        return content_key(
            {"model": self.model, "messages": request.messages, "params": self._settings(), "schema": request.schema}
        )

    def _from_cache(self, key: str, request: Request) -> Reply | None:
        if (text := self._cache.read(key)) is None:
            return None
        try:
            return replace(parse_content(text, request.schema), cached=True)
        except RetryableError as error:
            log.warning("%s: cached reply ignored (%s)", self._cache.path(key), error)
            return None

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=self._secret() or "none", max_retries=0)

    def _secret(self) -> str | None:
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise ValueError(
                f"the environment variable {self.api_key_env} is not set: export it, or set {self.env_setting} to the "
                "name of the variable that holds the key (to nothing for a server without one)"
            )
        return key

    def _say(self, error: Exception) -> str:
        """One line for people, without the key (some servers send it back in the error)."""
        status = f"HTTP {error.status_code}: " if isinstance(error, openai.APIStatusError) else ""
        text = f"{status}{type(error).__name__}: {error}".replace("\n", " ")
        key = self._secret()
        return (text.replace(key, "[key]") if key else text)[:300]


async def _run_workers(workers: list[Any], queue: list[Any]) -> None:
    """Wait for all; if one fails or we are interrupted, empty the queue, cancel the others and wait until they end.

    Cancelling is not enough: before Python 3.12 `asyncio.wait_for` drops a cancellation that comes together with the
    answer, and the worker would go on through the whole queue, paying for what nobody waits for.
    """
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        queue.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(run: Any) -> list[Reply] | BaseException:
    try:
        return asyncio.run(run)
    except BaseException as error:  # handed to the caller's thread, which raises it
        return error


def _without_login(url: str) -> str:
    return url.rpartition("@")[2]
