"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from array import array
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.chat_template import ChatTemplate, TemplateError
from server.errors import BadRequest
from server.generation import Generator, Job, Output, refuse_long_text
from server.json_body import ignored_header, read_body
from server.openapi import completion_docs
from server.routes.answer import answer_stream, answer_whole, check_stream_options, output_usage
from server.schemas.chat import (
    UNSUPPORTED,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatMessage,
    Choice,
    ChunkChoice,
    ChunkDelta,
    Message,
)
from server.schemas.usage import FinishReason, Usage
from server.served import ServedModel
from server.sse import event


def chat_router(generator: Generator, template: ChatTemplate | None, served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        summary="Continue a conversation",
        **completion_docs(ChatCompletionRequest, ChatCompletion, ChatCompletionChunk),
    )
    async def create_chat_completion(request: Request) -> Response:
        body, ignored = await read_body(request, ChatCompletionRequest, UNSUPPORTED)
        check_stream_options(body)
        model = served.resolve(body.model)
        if template is None:
            raise BadRequest("This model has no chat template; use /v1/completions.", code="no_chat_template")
        messages = [_plain(message) for message in body.messages]

        async def encode(window: int) -> array[int]:
            try:
                prompt = template.render(messages)
            except TemplateError as error:
                raise BadRequest(str(error), param="messages") from None
            refuse_long_text(prompt.text, generator.tokenizer, window, "messages")
            return await generator.tokenizer.encode_segments(prompt.segments)

        answer = _ChatAnswer(body, model, served.fingerprint)
        job = Job(
            request_id=answer.id,
            fields=body,
            encode=encode,
            param="messages",
            strip_leading_space=template.strip_leading_space,
        )
        headers = ignored_header(ignored)
        if body.stream:
            return await answer_stream(request, generator, job, answer.chunks, answer.last, headers)
        return await answer_whole(request, generator, job, answer.whole, headers)

    return router


class _ChatAnswer:
    """The objects of one answer: all of them have the same id, time and model."""

    def __init__(self, body: ChatCompletionRequest, model: str, fingerprint: str) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._usage_in_all = options is not None and bool(options.continuous_usage_stats)

    def whole(self, output: Output) -> ChatCompletion:
        choice = Choice(
            index=0,
            message=Message(content=output.text),
            finish_reason=output.finish_reason or "stop",
            stop_reason=output.stop_reason,
        )
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[choice],
            usage=output_usage(output),
        )

    def chunks(self, output: Output, first: bool) -> bytes:
        """The role with the first text, then texts, then an empty delta with the reason: each exactly once."""
        if not output.text and output.finish_reason is None:
            return b""
        data = self._event(output, ChunkDelta(role="assistant", content="")) if first else b""
        if output.text:
            data += self._event(output, ChunkDelta(content=output.text))
        if output.finish_reason is not None:
            data += self._event(output, ChunkDelta(), output.finish_reason)
        return data

    def last(self, output: Output) -> bytes:
        return event(self._completion_chunk(output_usage(output), [])) if self._with_usage else b""

    def _event(self, output: Output, delta: ChunkDelta, finish_reason: FinishReason | None = None) -> bytes:
        stop_reason = UNSET if finish_reason is None or output.stop_reason is None else output.stop_reason
        choice = ChunkChoice(index=0, delta=delta, finish_reason=finish_reason, stop_reason=stop_reason)
        usage = output_usage(output) if self._usage_in_all else None if self._with_usage else UNSET
        return event(self._completion_chunk(usage, [choice]))

    def _completion_chunk(self, usage: Usage | UnsetType | None, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message for the template. An assistant's null is an empty text."""
    plain = message.model_dump(include={"role", "content", "name"}, exclude_none=True)
    plain.setdefault("content", "")
    return plain
