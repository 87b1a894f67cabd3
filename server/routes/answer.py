"""The half of a completion request that both endpoints share: collect the events, or stream them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.choices import Tally, WholeChoice, collect, server_timing
from server.events import ChoiceEvent
from server.record import RequestRecord
from server.schemas.sampling import SamplingFields
from server.schemas.usage import PromptProgress
from server.sse import DONE, KEEP_ALIVE, start_stream, until_disconnect


class Encoder(Protocol):
    """How an endpoint spells an answer."""

    def whole(self, choices: list[WholeChoice], tally: Tally) -> msgspec.Struct: ...

    def chunks(self, event: ChoiceEvent, tally: Tally) -> bytes:
        """The server-sent events for one event, joined; empty when there is nothing to tell."""
        ...

    def progress(self, progress: PromptProgress) -> bytes: ...

    def last(self, tally: Tally) -> bytes:
        """What comes after the last choice's end: the usage, where it was asked for."""
        ...


def json_response(data: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers=headers, media_type="application/json")


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


def name_request(request: Request, fields: SamplingFields) -> RequestRecord:
    """The request's record, under the id of its body where no header gave one."""
    record = record_of(request)
    if fields.request_id is not None and "x-request-id" not in request.headers:
        record.request_id = fields.request_id
    return record


async def answer_whole(
    request: Request,
    events: AsyncGenerator[ChoiceEvent, None],
    encoder: Encoder,
    fields: SamplingFields,
    num_prompts: int,
    headers: dict[str, str],
) -> Response:
    work = collect(events, num_prompts * fields.choices, fields.choices)
    choices, tally = await until_disconnect(request, work)
    return json_response(
        encoder.whole(choices, tally), headers={**headers, "Server-Timing": server_timing(tally.timings)}
    )


async def answer_stream(
    request: Request,
    events: AsyncGenerator[ChoiceEvent, None],
    encoder: Encoder,
    fields: SamplingFields,
    num_prompts: int,
    headers: dict[str, str],
) -> Response:
    options = fields.stream_options
    in_comments = options is not None and bool(options.include_progress)

    async def pieces() -> AsyncGenerator[bytes, None]:
        tally = Tally(num_prompts * fields.choices, fields.choices)
        has_begun = False
        async with aclosing(events):
            async for event in events:
                tally.add(event)
                data = encoder.chunks(event, tally)
                if tally.is_complete:
                    data += encoder.last(tally) + DONE
                elif event.progress is not None and not event.token_ids:
                    progress = PromptProgress(event.counts.prompt_tokens, event.progress)
                    data += b": progress %d/%d\n\n" % (progress.processed, progress.total) if in_comments else b""
                    data += encoder.progress(progress) if fields.return_progress else b""
                elif not data and not has_begun and not event.token_ids:
                    data = KEEP_ALIVE
                has_begun = has_begun or bool(event.token_ids)
                if data:
                    yield data

    return await start_stream(request, pieces(), headers, record_of(request).request_id)
