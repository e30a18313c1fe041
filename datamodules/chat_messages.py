"""What is asked of a chat endpoint, what comes back, and how an answer is read (used by datamodules/chat_api.py).

Whatever is wrong with an answer is one of three exceptions, which say whether asking again can help.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any


@dataclass(frozen=True)
class Request:
    """One chat completion. `schema`: a JSON schema (an object) that the answer must follow; None: free text."""

    messages: tuple[Mapping[str, Any], ...]
    schema: Mapping[str, Any] | None = None

    @classmethod
    def user(cls, text: str, system: str | None = None, schema: Mapping[str, Any] | None = None) -> Request:
        """A single-turn request."""
        head = ({"role": "system", "content": system},) if system else ()
        return cls((*head, {"role": "user", "content": text}), schema)


@dataclass(frozen=True)
class Reply:
    """Exactly one of `text` and `error` is set; `data` is the parsed object if the request had a schema."""

    text: str | None = None
    data: dict[str, Any] | None = None
    error: str | None = None
    cached: bool = False


class RetryableError(Exception):
    """An attempt failed in a way that another may mend. `wait`: seconds the server asked for, None if it did not."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class UnusableError(RetryableError):
    """The model did answer, and is paid, but the content cannot be used."""


class PermanentError(Exception):
    """An attempt failed in a way that repeating will not mend. `all_requests`: the others would fail likewise."""

    def __init__(self, why: str, all_requests: bool = False):
        super().__init__(why)
        self.all_requests = all_requests


def read_completion(completion: Any) -> tuple[str, tuple[int, int]]:
    """Text and (prompt, completion) tokens; what is no chat completion is an attempt to repeat."""
    choices = getattr(completion, "choices", None)  # the library checks no types: any JSON comes through
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message: Any = getattr(choice, "message", None)
    if not hasattr(message, "content"):
        raise RetryableError("the answer is no chat completion (no choices[0].message)")
    if refusal := getattr(message, "refusal", None):
        raise PermanentError(f"the model refused to answer: {str(refusal)[:200]}")
    if choice.finish_reason == "length":
        raise PermanentError("the answer was cut off: raise max_tokens")
    if choice.finish_reason == "content_filter":
        raise PermanentError("the answer was withheld by the server's content filter")
    if not message.content:
        raise UnusableError("the answer is empty")
    if not isinstance(message.content, str):
        raise RetryableError(f"the answer is no chat completion (its content is a {type(message.content).__name__})")
    counted = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, answer = (count if isinstance(count, int) else 0 for count in counted)
    return message.content, (prompt, answer)


def parse_content(text: str, schema: Mapping[str, Any] | None) -> Reply:
    """The reply; with a schema, the first JSON object in the text, which must have the required keys."""
    if schema is None:
        return Reply(text=text)
    start = text.find("{")
    try:
        data, _ = json.JSONDecoder().raw_decode(text[max(start, 0) :])
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, brackets without end
        raise UnusableError(f"the answer is not JSON ({error})") from None
    missing = [key for key in schema.get("required", ()) if not isinstance(data, dict) or key not in data]
    if missing or not isinstance(data, dict):
        raise UnusableError(
            f"the answer lacks the key(s) {', '.join(missing)}" if missing else "the answer is no object"
        )
    return Reply(text=text, data=data)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `Retry-After` (RFC 9110: seconds or a date), None if absent or unreadable."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
