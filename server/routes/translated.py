"""Chat in other spellings: a request becomes a chat request, its answer is encoded as the endpoint says."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Protocol

import msgspec
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.chat import ChatService
from server.choices import Tally, server_timing
from server.errors import ApiError, invalid_fields
from server.events import ChoiceEvent
from server.routes.answer import json_response, record_of
from server.schemas.chat import ChatCompletionRequest
from server.sse import KEEP_ALIVE, start_stream, typed_event, until_disconnect

Names = Mapping[str, str]
"""Pattern for a part of a chat request's field path -> what the endpoint calls it."""


class Encoder(Protocol):
    """Turns the events of one choice into those of an endpoint's stream, and into its answer."""

    def push(self, event: ChoiceEvent) -> list[msgspec.Struct]:
        """The tagged events to send; none where there is nothing to tell."""

    def fail(self, error: ApiError) -> list[msgspec.Struct]:
        """The events that end a stream that failed."""

    @property
    def result(self) -> msgspec.Struct:
        """The whole answer, after the last event."""


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Errors about fields of the chat request leave as errors about the fields that the client sent."""
    try:
        yield
    except ApiError as error:
        if error.param is not None:
            param = error.param
            for pattern, name in names.items():
                param = re.sub(pattern, name, param)
            error.message = error.message.replace(f"'{error.param}'", f"'{param}'")
            error.param = param
        raise


def chat_request(fields: Mapping[str, object], names: Names) -> ChatCompletionRequest:
    """The chat request with these fields, without those that are None. Raises BadRequest."""
    with renamed(names):
        try:
            return ChatCompletionRequest.model_validate(
                {name: value for name, value in fields.items() if value is not None}
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[:1]
            raise invalid_fields(first) from None


async def answer(
    request: Request,
    service: ChatService,
    chat: ChatCompletionRequest,
    encoder: Encoder,
    names: Names,
    *,
    answer_id: str,
    stream: bool,
    headers: dict[str, str],
) -> Response:
    """Runs `chat` and answers whole or as a stream of typed events."""
    record = record_of(request)

    async def events() -> AsyncGenerator[bytes, None]:
        with renamed(names):
            async with aclosing(service.events(chat, record, answer_id)) as pieces:
                async for piece in pieces:
                    if data := encoder.push(piece):
                        yield b"".join(map(typed_event, data))
                    elif piece.counts.completion_tokens == 0:
                        yield KEEP_ALIVE

    async def whole() -> Response:
        tally = Tally(1)
        with renamed(names):
            async with aclosing(service.events(chat, record, answer_id)) as pieces:
                async for piece in pieces:
                    encoder.push(piece)
                    tally.add(piece)
        timing = {"Server-Timing": server_timing(tally.timings)}
        return json_response(encoder.result, headers=headers | timing)

    if not stream:
        return await until_disconnect(request, whole())

    def on_error(error: ApiError) -> bytes:
        return b"".join(map(typed_event, encoder.fail(error)))

    return await start_stream(request, events(), headers, record.request_id, on_error)
