"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from array import array

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.errors import BadRequest, UnsupportedParameter
from server.generation import Generator, Job, Output, refuse_long_text
from server.json_body import ignored_header, read_body
from server.openapi import completion_docs
from server.routes.answer import answer_stream, answer_whole, check_stream_options, output_usage
from server.schemas.completion import (
    DEFAULT_MAX_TOKENS,
    UNSUPPORTED,
    Completion,
    CompletionChoice,
    CompletionRequest,
)
from server.schemas.usage import Usage
from server.served import ServedModel
from server.sse import event


def completions_router(generator: Generator, served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        **completion_docs(CompletionRequest, Completion, Completion),
    )
    async def create_completion(request: Request) -> Response:
        body, ignored = await read_body(request, CompletionRequest, UNSUPPORTED)
        check_stream_options(body)
        model = served.resolve(body.model)
        if len(body.prompts) != 1:
            raise UnsupportedParameter(
                "Several prompts in one request are not supported by this server.", param="prompt"
            )
        [prompt] = body.prompts

        async def encode(window: int) -> array[int]:
            if isinstance(prompt, str):
                refuse_long_text(prompt, generator.tokenizer, window, "prompt")
                add_special_tokens = body.add_special_tokens is not False
                return await generator.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            vocab_size = generator.tokenizer.vocab_size
            for index, token_id in enumerate(prompt):
                if token_id >= vocab_size:
                    raise BadRequest(
                        f"A token id must be below the vocabulary's size, {vocab_size}; entry {index} is not.",
                        param="prompt",
                    )
            return array("I", prompt)

        answer = _CompletionAnswer(body, model, served.fingerprint)
        job = Job(
            request_id=answer.id, fields=body, encode=encode, param="prompt", default_max_tokens=DEFAULT_MAX_TOKENS
        )
        headers = ignored_header(ignored)
        if body.stream:
            return await answer_stream(request, generator, job, answer.chunks, answer.last, headers)
        return await answer_whole(request, generator, job, answer.whole, headers)

    return router


class _CompletionAnswer:
    """The objects of one answer: all of them have the same id, time and model."""

    def __init__(self, body: CompletionRequest, model: str, fingerprint: str) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._usage_in_all = options is not None and bool(options.continuous_usage_stats)

    def whole(self, output: Output) -> Completion:
        return self._completion(output_usage(output), [_choice(output)])

    def chunks(self, output: Output, first: bool) -> bytes:
        """One chunk with the text; in the last one the reason too."""
        if not output.text and output.finish_reason is None:
            return b""
        usage = output_usage(output) if self._usage_in_all else None if self._with_usage else UNSET
        return event(self._completion(usage, [_choice(output)]))

    def last(self, output: Output) -> bytes:
        return event(self._completion(output_usage(output), [])) if self._with_usage else b""

    def _completion(self, usage: Usage | UnsetType | None, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )


def _choice(output: Output) -> CompletionChoice:
    stop_reason = UNSET if output.finish_reason is None else output.stop_reason
    return CompletionChoice(index=0, text=output.text, finish_reason=output.finish_reason, stop_reason=stop_reason)
