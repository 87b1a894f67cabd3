"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.chat import ChatService
from server.choices import Tally, WholeChoice
from server.events import ChoiceEvent, ToolCallDelta
from server.generation import Generator
from server.json_body import ignored_header, read_body
from server.logprobs import chat_logprobs
from server.openapi import completion_docs
from server.routes.answer import answer_stream, answer_whole, name_request
from server.schemas.chat import (
    UNSUPPORTED,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    ChunkDelta,
    FunctionCall,
    FunctionDelta,
    Message,
    MessageToolCall,
    ToolCallChunk,
)
from server.schemas.usage import AnswerTimings, PromptProgress, Usage
from server.served import ServedModel
from server.sse import event as sse_event
from server.tokenizer import Tokenizer


def chat_router(generator: Generator, service: ChatService, served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        summary="Continue a conversation",
        **completion_docs(ChatCompletionRequest, ChatCompletion, ChatCompletionChunk, done=True),
    )
    async def create_chat_completion(request: Request) -> Response:
        body, ignored = await read_body(request, ChatCompletionRequest, UNSUPPORTED)
        record = name_request(request, body)
        encoder = ChatEncoder(body, served.resolve(body.model), served.fingerprint, generator.tokenizer)
        events = service.events(body, record, encoder.id)
        answer = answer_stream if body.stream else answer_whole
        return await answer(request, events, encoder, body, 1, ignored_header(ignored))

    return router


class ChatEncoder:
    """The objects of one answer: all of them have the same id, time and model."""

    def __init__(self, body: ChatCompletionRequest, model: str, fingerprint: str, tokenizer: Tokenizer) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self._tokenizer = tokenizer
        self._num_choices = body.choices
        self._with_logprobs = bool(body.logprobs)
        self._with_ids = bool(body.return_token_ids)
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._usage_in_all = options is not None and bool(options.continuous_usage_stats)
        self._has_roles = False

    def whole(self, choices: list[WholeChoice], tally: Tally) -> ChatCompletion:
        prompt = choices[0].prompt
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=[self._choice(choice) for choice in choices],
            usage=tally.usage,
            prompt_token_ids=list(prompt.token_ids) if self._with_ids and prompt is not None else UNSET,
            timings=tally.timings,
        )

    def chunks(self, event: ChoiceEvent, tally: Tally) -> bytes:
        """The roles of all choices in order, then pieces, then for each an empty delta with the reason."""
        has_piece = bool(event.content or event.reasoning or event.tool_calls)
        # Withheld text must not withhold what belongs to the tokens.
        has_piece = has_piece or bool(event.token_ids and (self._with_logprobs or self._with_ids))
        if not has_piece and event.finish_reason is None:
            return b""
        usage = tally.usage if self._usage_in_all else None if self._with_usage else UNSET
        data = b""
        if not self._has_roles:
            self._has_roles = True
            for index in range(self._num_choices):
                role = ChunkChoice(index=index, delta=ChunkDelta(role="assistant", content=""))
                ids = list(event.prompt.token_ids) if self._with_ids and event.prompt and index == 0 else UNSET
                data += self._chunk([role], usage, prompt_token_ids=ids)
        if has_piece:
            delta = ChunkDelta(
                content=event.content or UNSET,
                reasoning_content=event.reasoning or UNSET,
                tool_calls=[_call_chunk(call) for call in event.tool_calls] or UNSET,
            )
            choice = ChunkChoice(
                index=event.index,
                delta=delta,
                logprobs=self._logprobs(event) if event.token_ids else None,
                token_ids=list(event.token_ids) if self._with_ids else UNSET,
            )
            data += self._chunk([choice], usage)
            # Clients take a call's first delta for its name alone: what it has of arguments comes after it.
            if filled := [_arguments_chunk(call) for call in event.tool_calls if call.call_id and call.arguments]:
                choice = ChunkChoice(index=event.index, delta=ChunkDelta(tool_calls=filled))
                data += self._chunk([choice], usage)
        if event.finish_reason is not None:
            choice = ChunkChoice(
                index=event.index,
                delta=ChunkDelta(),
                finish_reason=event.finish_reason,
                stop_reason=UNSET if event.stop_reason is None else event.stop_reason,
            )
            is_last = tally.is_complete and not self._with_usage
            data += self._chunk([choice], usage, timings=tally.timings if is_last else UNSET)
        return data

    def progress(self, progress: PromptProgress) -> bytes:
        return self._chunk([], None if self._with_usage else UNSET, prompt_progress=progress)

    def last(self, tally: Tally) -> bytes:
        return self._chunk([], tally.usage, timings=tally.timings) if self._with_usage else b""

    def _choice(self, choice: WholeChoice) -> Choice:
        calls = [
            MessageToolCall(id=call.call_id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in choice.tool_calls
        ]
        message = Message(
            content=choice.content if choice.content or not calls else None,
            reasoning_content=choice.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
        return Choice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self._with_ids else UNSET,
        )

    def _logprobs(self, source: ChoiceEvent | WholeChoice) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, source.logprobs) if self._with_logprobs else None

    def _chunk(
        self,
        choices: list[ChunkChoice],
        usage: Usage | UnsetType | None,
        *,
        prompt_token_ids: list[int] | UnsetType = UNSET,
        prompt_progress: PromptProgress | UnsetType = UNSET,
        timings: AnswerTimings | UnsetType = UNSET,
    ) -> bytes:
        return sse_event(
            ChatCompletionChunk(
                id=self.id,
                created=self._created,
                model=self._model,
                system_fingerprint=self._fingerprint,
                choices=choices,
                usage=usage,
                prompt_token_ids=prompt_token_ids,
                prompt_progress=prompt_progress,
                timings=timings,
            )
        )


def _call_chunk(call: ToolCallDelta) -> ToolCallChunk:
    """A call's next delta: its name with no arguments, or arguments."""
    if call.call_id is None:
        return _arguments_chunk(call)
    function = FunctionDelta(name=UNSET if call.name is None else call.name)
    return ToolCallChunk(index=call.index, id=call.call_id, type="function", function=function)


def _arguments_chunk(call: ToolCallDelta) -> ToolCallChunk:
    return ToolCallChunk(index=call.index, function=FunctionDelta(arguments=call.arguments))
