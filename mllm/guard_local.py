"""A local checkpoint behind the guard: concurrent requests, batched generation, text as it is made.

Requests of one kind (as many images, the same sampling) share a `generate` call; each row ends for itself: at its end
token, at its own limit, or because nobody listens any more (the client left, or the guard stopped the answer).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from trl import apply_chat_template

from mllm.guard_backends import Piece
from mllm.guard_batching import Batcher
from mllm.guard_media import decode_audio, decode_image
from mllm.guard_protocol import Chat, RequestError
from mllm.loading import MLLM, to_device
from mllm.media import media_arguments, sampling_rate
from mllm.prompts import encode_text

PARTS = {"image": "image_url", "audio": "input_audio"}
"""What a request calls the medium of each modality; OpenAI knows no part for a video, nor for any other."""
SUPPORTED = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "user", "metadata", "safety_identifier"}


@dataclass(eq=False)
class Job:
    """One answer to be made. emit: takes the text as it grows, from the generating thread."""

    prompt: str
    media: list[Any]
    max_new_tokens: int
    temperature: float
    top_p: float
    emit: Callable[[str], None] = lambda text: None
    cancelled: bool = False
    begun: bool = False  # text is out: it must not be made a second time

    @property
    def kind(self) -> tuple[int, float, float]:
        return len(self.media), self.temperature, self.top_p


class Local:
    """Answers with a model in this process.

    Args:
        max_new_tokens: longest answer; a request may ask for less.
        batch_size: answers generated at once.
    """

    def __init__(self, mllm: MLLM, max_new_tokens: int = 256, batch_size: int = 16) -> None:
        self._mllm, self._max_new_tokens = mllm, max_new_tokens
        self._context = mllm.model.config.get_text_config().max_position_embeddings
        self._batcher: Batcher[Job, Piece | None] = Batcher(self._run, batch_size, "guard-model")

    def check(self, chat: Chat) -> None:
        for name in chat.sampling:
            if name not in SUPPORTED:
                raise RequestError(400, f"{name} is not supported by a local checkpoint; leave it out", name)
        special = [t for t in self._mllm.processor.tokenizer.all_special_tokens if t]
        for message in chat.messages:
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            # The template joins the texts: a token may be split over two of them.
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if any(token in text for token in special):  # would end the turn, or stand for an image
                raise RequestError(400, "a message holds a special token of the model", "messages")
            for part in parts:
                if part["type"] == "text":
                    continue
                modality = self._mllm.spec.modality
                if modality not in PARTS:
                    raise RequestError(
                        400, f"this server takes no media of modality {modality}: text alone", "messages"
                    )
                if part["type"] != PARTS[modality]:
                    raise RequestError(400, f"this model takes {modality} parts only", "messages")

    async def complete(self, chat: Chat) -> Piece:
        job = await asyncio.to_thread(self._job, chat)
        return await self._result(job)

    async def stream(self, chat: Chat) -> AsyncIterator[Piece]:
        job = await asyncio.to_thread(self._job, chat)
        loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        job.emit = lambda text: _call(loop, texts.put_nowait, text)
        result = asyncio.ensure_future(self._result(job))
        result.add_done_callback(lambda done: texts.put_nowait(None))
        try:
            while (text := await texts.get()) is not None:
                yield Piece(text)
            end = await result
            yield Piece("", end.finish, end.usage)
        finally:
            job.cancelled = True
            result.cancel()

    async def models(self) -> list[str]:
        return [self._mllm.spec.name]

    async def close(self) -> None:
        self._batcher.close()

    async def _result(self, job: Job) -> Piece:
        try:
            made = await asyncio.wrap_future(self._batcher.submit([job])[0])
        finally:
            job.cancelled = True  # whoever waited has gone, or it is done
        if made is None:
            raise RequestError(500, "the model's answer cannot be decoded")
        return made

    def _job(self, chat: Chat) -> Job:
        """Raises RequestError."""
        messages, media = [], []
        for message in chat.messages:
            content, parts = message["content"], []
            for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
                if part["type"] != "text":
                    media.append(self._medium(part))
                    parts.append({"type": self._mllm.spec.modality})
                else:
                    parts.append({"type": "text", "text": part["text"]})
            role = "system" if message["role"] == "developer" else message["role"]
            messages.append({"role": role, "content": parts})
        if self._mllm.spec.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._mllm.spec.system_prompt}]})
        limit = chat.sampling.get("max_completion_tokens", chat.sampling.get("max_tokens", self._max_new_tokens))
        temperature = _number(chat.sampling.get("temperature", 0), "temperature", 0, 2)
        top_p = _number(chat.sampling.get("top_p", 1), "top_p", 0, 1)
        if type(limit) is not int or limit < 1:
            raise RequestError(400, "max_tokens must be an integer of 1 or more", "max_tokens")
        prompt = apply_chat_template({"prompt": messages}, self._mllm.processor)["prompt"]
        return Job(prompt, media, min(limit, self._max_new_tokens), temperature, top_p)

    def _medium(self, part: dict[str, Any]) -> Any:
        mllm = self._mllm
        if mllm.spec.modality == "image":
            return decode_image(part)
        clip = decode_audio(part, sampling_rate(mllm.processor))
        try:
            media_arguments(mllm.spec, mllm.processor, [clip])  # too short or too long for the model
        except ValueError as error:
            raise RequestError(400, str(error), "messages") from None
        return clip

    def _run(self, jobs: list[Job]) -> list[Piece | None]:
        done: dict[int, Piece | None] = {}
        for kind in dict.fromkeys(job.kind for job in jobs):
            rows = [i for i, job in enumerate(jobs) if job.kind == kind]
            done.update(zip(rows, self._generate([jobs[i] for i in rows]), strict=True))
        return [done[i] for i in range(len(jobs))]

    @torch.inference_mode()
    def _generate(self, jobs: Sequence[Job]) -> list[Piece | None]:
        if any(job.begun for job in jobs):
            raise RuntimeError("generation broke off")
        mllm, (n_media, temperature, top_p) = self._mllm, jobs[0].kind
        if mllm.spec.modality == "image":
            given = [job.media[0] if n_media == 1 else job.media for job in jobs]
        else:
            given = [medium for job in jobs for medium in job.media]
        media = media_arguments(mllm.spec, mllm.processor, given) if n_media else {}
        inputs = to_device(encode_text(mllm.processor, [job.prompt for job in jobs], media), mllm.model.device)
        for key, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[key] = value.to(mllm.model.dtype)
        lengths = inputs["attention_mask"].sum(1).tolist()
        room = self._context - inputs["input_ids"].shape[1]
        if room < 1:
            raise RequestError(400, f"the conversation is longer than the model's {self._context} tokens", "messages")
        rows = [_Row(job, mllm, int(n), min(job.max_new_tokens, room)) for job, n in zip(jobs, lengths, strict=True)]
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        mllm.model.generate(  # type: ignore[operator]
            **inputs,
            **sampling,
            max_new_tokens=max(row.limit for row in rows),
            pad_token_id=mllm.processor.tokenizer.pad_token_id or mllm.prompts.end_ids[0],
            streamer=_Watch(rows),
            stopping_criteria=StoppingCriteriaList([_Stop(rows)]),
        )
        return [row.end() for row in rows]


class _Row:
    """One answer as it grows. Text is emitted up to the last blank: what follows may still change."""

    def __init__(self, job: Job, mllm: MLLM, prompt_tokens: int, limit: int) -> None:
        self.job, self._mllm, self._prompt_tokens, self.limit = job, mllm, prompt_tokens, limit
        self._tokens: list[int] = []
        self._text = ""
        self.done = self._ended = self._failed = False

    def add(self, token: int) -> None:
        if self.done:
            return
        self._tokens.append(token)
        self._ended = token in self._mllm.prompts.end_ids
        self.done = self._ended or len(self._tokens) >= self.limit or self.job.cancelled
        text = self._mllm.prompts.decode(torch.tensor(self._tokens))
        stable = text if self.done else text[: max(text.rfind(" "), text.rfind("\n"), 0)]
        if len(stable) > len(self._text):
            if not stable.startswith(
                self._text
            ):  # the tokenizer changed what it had decoded: not the neighbours' fault
                self.done = self._failed = True
                return
            self.job.begun = True
            self.job.emit(stable[len(self._text) :])
            self._text = stable

    def end(self) -> Piece | None:
        """All of it; None if it cannot be decoded steadily."""
        if self._failed:
            return None
        n, new = self._prompt_tokens, len(self._tokens)
        usage = {"prompt_tokens": n, "completion_tokens": new, "total_tokens": n + new}
        return Piece(self._text, "stop" if self._ended else "length", usage)


class _Watch(BaseStreamer):
    """`generate` shows it the prompts first, then one token of each row at every step."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows, self._prompt = rows, True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.add(token)

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([row.done or row.job.cancelled for row in self._rows], device=input_ids.device)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], text: str) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended: the server is shutting down
        loop.call_soon_threadsafe(function, text)


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(400, f"{name} must be a number in {low}..{high}", name)
    return float(value)
