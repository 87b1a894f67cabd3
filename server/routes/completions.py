"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from array import array
from collections.abc import Awaitable

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.choices import Tally, WholeChoice
from server.detokenizer import Detokenizer
from server.events import ChoiceEvent, PromptTokens
from server.generation import Encode, Generator, Job
from server.json_body import ignored_header, read_body
from server.logprobs import CompletionLogprobWriter, joined
from server.openapi import completion_docs
from server.prompts import check_prompts, encode_prompt
from server.routes.answer import answer_stream, answer_whole, name_request
from server.schemas.completion import (
    DEFAULT_MAX_TOKENS,
    UNSUPPORTED,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from server.schemas.usage import AnswerTimings, PromptProgress, Usage
from server.served import ServedModel
from server.sse import event as sse_event
from server.structured import response_grammar
from server.tokenizer import Tokenizer


def completions_router(generator: Generator, served: ServedModel) -> APIRouter:
    router = APIRouter()
    tokenizer = generator.tokenizer

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        **completion_docs(CompletionRequest, Completion, Completion, done=True),
    )
    async def create_completion(request: Request) -> Response:
        body, ignored = await read_body(request, CompletionRequest, UNSUPPORTED)
        record = name_request(request, body)
        encoder = CompletionEncoder(body, served.resolve(body.model), served.fingerprint, tokenizer)
        check_prompts(body, tokenizer)

        def encoded(prompt: str | list[int]) -> Encode:
            def encode(window: int) -> Awaitable[array[int]]:
                return encode_prompt(prompt, body, tokenizer, window)

            return encode

        job = Job(
            request_id=encoder.id,
            fields=body,
            prompts=[encoded(prompt) for prompt in body.prompts],
            param="prompt",
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            grammar=lambda: response_grammar(body.response_format, body.structured_outputs),
        )
        events = generator.generate(job, record)
        answer = answer_stream if body.stream else answer_whole
        return await answer(request, events, encoder, body, len(body.prompts), ignored_header(ignored))

    return router


class CompletionEncoder:
    """The objects of one answer: all of them have the same id, time and model."""

    def __init__(self, body: CompletionRequest, model: str, fingerprint: str, tokenizer: Tokenizer) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self._tokenizer = tokenizer
        self._echo = bool(body.echo)
        self._with_logprobs = body.logprobs is not None
        self._with_ids = bool(body.return_token_ids)
        self._skip_special_tokens = body.skip_special_tokens is not False
        self._writers: dict[int, CompletionLogprobWriter] = {}
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._usage_in_all = options is not None and bool(options.continuous_usage_stats)

    def whole(self, choices: list[WholeChoice], tally: Tally) -> Completion:
        return self._completion([self._choice(choice) for choice in choices], tally.usage, timings=tally.timings)

    def chunks(self, event: ChoiceEvent, tally: Tally) -> bytes:
        """One chunk with the text; in a choice's last one the reason too."""
        has_piece = bool(event.content or (self._echo and event.prompt))
        # Withheld text must not withhold what belongs to the tokens.
        has_piece = has_piece or bool(event.token_ids and (self._with_logprobs or self._with_ids))
        if not has_piece and event.finish_reason is None:
            return b""
        usage = tally.usage if self._usage_in_all else None if self._with_usage else UNSET
        timings = tally.timings if tally.is_complete and not self._with_usage else UNSET
        return sse_event(self._completion([self._choice(event)], usage, timings=timings))

    def progress(self, progress: PromptProgress) -> bytes:
        usage = None if self._with_usage else UNSET
        return sse_event(self._completion([], usage, prompt_progress=progress))

    def last(self, tally: Tally) -> bytes:
        return sse_event(self._completion([], tally.usage, timings=tally.timings)) if self._with_usage else b""

    def _choice(self, source: ChoiceEvent | WholeChoice) -> CompletionChoice:
        prompt = source.prompt
        text = source.content
        if self._echo and prompt is not None:
            text = self._prompt_text(prompt) + text
        return CompletionChoice(
            index=source.index,
            text=text,
            logprobs=self._logprobs(source),
            finish_reason=source.finish_reason,
            stop_reason=UNSET if source.finish_reason is None else source.stop_reason,
            token_ids=list(source.token_ids) if self._with_ids else UNSET,
            prompt_token_ids=list(prompt.token_ids) if self._with_ids and prompt is not None else UNSET,
        )

    def _logprobs(self, source: ChoiceEvent | WholeChoice) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        writer = self._writers.get(source.index)
        if writer is None:
            writer = CompletionLogprobWriter(self._tokenizer, skip_special_tokens=self._skip_special_tokens)
            self._writers[source.index] = writer
        if not self._echo or source.prompt is None:
            return writer.answer(source.logprobs)
        return joined(writer.prompt(source.prompt), writer.answer(source.logprobs))

    def _prompt_text(self, prompt: PromptTokens) -> str:
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=self._skip_special_tokens)
        return detokenizer.push(prompt.token_ids) + detokenizer.finish()

    def _completion(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        *,
        prompt_progress: PromptProgress | UnsetType = UNSET,
        timings: AnswerTimings | UnsetType = UNSET,
    ) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
            prompt_progress=prompt_progress,
            timings=timings,
        )
