"""The OpenAI chat protocol as far as the guard lets it through: what a request may ask, what a response may hold.

Both directions are lists of what is allowed. A request field that could carry generated text around the detector (tool
calls, several choices, log-probabilities, audio, a prefilled answer) is refused by name, and so is any field that is
not known here. A response is built anew: of the upstream's own words only the answer's text gets in, after it was
scored; never its ids, model names, error messages, reasoning or refusal fields.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

FinishReason = Literal["stop", "length", "content_filter"]

SAMPLING = (
    "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "metadata", "min_p", "presence_penalty",
    "reasoning_effort", "repetition_penalty", "response_format", "safety_identifier", "seed", "service_tier", "stop",
    "temperature", "top_k", "top_p", "user", "verbosity",
)  # fmt: skip
"""Passed upstream as they are: they bend the answer, which is scored whatever it is."""

UNGUARDED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),  # without tools it says nothing
    "modalities": (["text"],),
    "store": (False,),
    "echo": (False,),
}
"""Fields that would open a way around the detector, and the values with which they do not (these are left out)."""

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("text", "image_url", "input_audio", "audio_url", "video_url")


class RequestError(Exception):
    """A request that is answered with an error. `message` is ours: it quotes nothing that a model wrote."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        kind = (
            "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "api_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Chat:
    """A request that may be passed on.

    messages: as they came. question: what the detector is told was asked. sampling: fields of `SAMPLING`.
    """

    model: str
    messages: list[dict[str, Any]]
    question: str
    stream: bool
    include_usage: bool
    sampling: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """The body for an upstream."""
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, **self.sampling}
        if self.stream:
            body["stream"] = True
            if self.include_usage:
                body["stream_options"] = {"include_usage": True}
        return body


def parse_chat(raw: bytes) -> Chat:
    """A request's body, checked.

    Raises:
        RequestError: 400, naming the field.
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair breaks tokenizers
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON in UTF-8 ({type(error).__name__})") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    for name, harmless in UNGUARDED.items():
        if name in given and not any(_same(given[name], value) for value in harmless):
            _refuse(name, f"{name} would let text through that the guard does not score; leave it out")
    known = {"model", "messages", "stream", "stream_options", *SAMPLING, *UNGUARDED}
    for name in given:
        if name not in known:
            _refuse(str(name)[:64], f"{str(name)[:64]} is not known to the guard; leave it out")
    model, stream = given.get("model"), given.get("stream", False)
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        _refuse("model", "model must be a string of 1 to 256 characters")
    if not isinstance(stream, bool):
        _refuse("stream", "stream must be true or false")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        _refuse("stream_options", "stream_options may hold include_usage only")
    messages = _messages(given.get("messages"))
    sampling = {name: given[name] for name in SAMPLING if name in given}
    return Chat(model, messages, question_of(messages), stream, options.get("include_usage") is True, sampling)


def question_of(messages: list[dict[str, Any]]) -> str:
    """The text of the last user turn, its text parts joined by line feeds.

    The last turn may hold media alone; then the nearest earlier user turn that has text is the question (a request
    followed by the image that it is about). Without any text the question is empty: the answer is judged by itself.
    """
    for message in reversed(messages):
        if message["role"] == "user" and (text := text_of(message).strip()):
            return text
    return ""


def text_of(message: Mapping[str, Any]) -> str:
    """The text of one message, without its media."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def completion(chat: Chat, content: str, finish: FinishReason, usage: Mapping[str, int], guard: str) -> dict[str, Any]:
    """A whole response. `guard`: the action, an extension that the official client leaves readable."""
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    made = _head(chat, "chat.completion") | {"choices": [choice], "guard": {"action": guard}}
    return made | {"usage": usage} if usage else made


class Chunks:
    """The events of one streamed response, as server-sent events."""

    def __init__(self, chat: Chat) -> None:
        self._head = _head(chat, "chat.completion.chunk")
        self._usage_wanted = chat.include_usage

    def role(self) -> bytes:
        return self._event({"role": "assistant", "content": ""}, None)

    def text(self, text: str) -> bytes:
        return self._event({"content": text}, None)

    def end(self, finish: FinishReason, usage: Mapping[str, int], guard: str) -> bytes:
        last = self._event({}, finish, guard={"action": guard})
        if self._usage_wanted and usage:
            last += sse({**self._head, "choices": [], "usage": usage})
        return last + b"data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], finish: FinishReason | None, **more: Any) -> bytes:
        return sse({**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def sse(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": chat.model}


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "messages must be a list of one message or more")
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            _refuse(where, f"{where} must have a role of {', '.join(ROLES)}; tools are not passed")
        for key, value in message.items():
            if key not in ("role", "content", "name") and value not in (None, [], ""):
                _refuse(f"{where}.{str(key)[:64]}", f"{where}: only role, content and name are passed")
        if not isinstance(message.get("name", ""), str):
            _refuse(f"{where}.name", f"{where}.name must be a string")
        _content(message.get("content"), message["role"], where)
    if messages[-1]["role"] != "user":
        _refuse(
            "messages", "the last message must be the user's: the guard cannot score an answer that was begun elsewhere"
        )
    return [{k: m[k] for k in ("role", "content", "name") if k in m} for m in messages]


def _content(content: Any, role: str, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        _refuse(f"{where}.content", f"{where}.content must be a string or a list of parts")
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PARTS or (role != "user" and kind != "text"):
            allowed = ", ".join(PARTS) if role == "user" else "text"
            _refuse(f"{where}.content[{n}]", f"{where}.content[{n}] must be a part of type {allowed}")
        if kind == "text" and not isinstance(part.get("text"), str):
            _refuse(f"{where}.content[{n}].text", f"{where}.content[{n}].text must be a string")


def _same(value: Any, harmless: Any) -> bool:
    return type(value) is type(harmless) and value == harmless  # 1 == True in Python


def _refuse(param: str, message: str) -> NoReturn:
    raise RequestError(400, message, param)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
