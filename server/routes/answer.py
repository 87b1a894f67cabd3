"""The half of a completion request that both endpoints share: run the job, answer whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.errors import BadRequest
from server.generation import Generator, Job, Output, collect
from server.record import RequestRecord
from server.schemas.sampling import SamplingFields
from server.schemas.usage import Usage, usage_of
from server.sse import DONE, KEEP_ALIVE, start_stream, until_disconnect

Chunks = Callable[[Output, bool], bytes]
"""The events for one output, joined; the flag says whether it is the first. Empty when there is nothing to tell."""


def json_response(data: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers=headers, media_type="application/json")


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


def check_stream_options(fields: SamplingFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


def output_usage(output: Output) -> Usage:
    return usage_of(output.prompt_tokens, output.completion_tokens, output.cached_tokens)


async def answer_whole(
    request: Request,
    generator: Generator,
    job: Job,
    body: Callable[[Output], msgspec.Struct],
    headers: dict[str, str],
) -> Response:
    outputs = generator.generate(job, record_of(request))
    return json_response(body(await until_disconnect(request, collect(outputs))), headers=headers)


async def answer_stream(
    request: Request,
    generator: Generator,
    job: Job,
    chunks: Chunks,
    last: Callable[[Output], bytes],
    headers: dict[str, str],
) -> Response:
    """`last` gives the events after the finish: the usage, where it was asked for."""
    record = record_of(request)

    async def events() -> AsyncGenerator[bytes, None]:
        first = True
        async with aclosing(generator.generate(job, record)) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    yield chunks(output, first) + last(output) + DONE
                elif data := chunks(output, first):
                    yield data
                elif output.completion_tokens == 0:
                    yield KEEP_ALIVE
                    continue
                else:
                    continue
                first = False

    return await start_stream(request, events(), headers, record.request_id)
