"""POST /v1/responses, stateless: nothing of a conversation is remembered between two requests."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.chat import ChatService
from server.errors import BadRequest
from server.json_body import ignored_header, read_body
from server.logprobs import chat_logprobs
from server.openapi import completion_docs
from server.response_encoder import ResponseEncoder
from server.routes.translated import answer, chat_request
from server.schemas import responses as wire
from server.schemas.response_events import EVENTS, ReasoningConfig, ResponseObject, TextConfig
from server.schemas.responses import UNSUPPORTED, ResponsesRequest
from server.served import ServedModel
from server.tokenizer import Tokenizer

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
NAMES = {
    r"^messages\b.*": "input",
    r"^max_completion_tokens$": "max_output_tokens",
    r"^response_format\.json_schema\b": "text.format",
    r"^response_format\b": "text.format",
    r"^reasoning_effort$": "reasoning.effort",
    r"\.function\b": "",
}
_SAME = (
    "model",
    "temperature",
    "top_p",
    "tool_choice",
    "parallel_tool_calls",
    "seed",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "priority",
    "cache_salt",
)
"""Fields that a chat request has under the same name."""


def responses_router(service: ChatService, tokenizer: Tokenizer, served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/responses",
        summary="Continue a conversation, in items and typed events",
        **completion_docs(ResponsesRequest, ResponseObject, *EVENTS),
    )
    async def create_response(request: Request) -> Response:
        body, ignored = await read_body(request, ResponsesRequest, UNSUPPORTED)
        if body.stream_options is not None and not body.stream:
            raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
        shell = new_response(body, served.resolve(body.model))
        chat = chat_request(chat_fields(body), NAMES)
        encoder = ResponseEncoder(shell, lambda entries: chat_logprobs(tokenizer, entries).content)
        return await answer(
            request,
            service,
            chat,
            encoder,
            NAMES,
            answer_id=shell.id,
            stream=bool(body.stream),
            headers=ignored_header(ignored),
        )

    return router


def new_response(body: ResponsesRequest, model: str) -> ResponseObject:
    """The response to `body` before there is any output."""
    text = None if body.text is None else body.text.format
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=ReasoningConfig(effort=None if body.reasoning is None else body.reasoning.effort),
        temperature=body.temperature,
        text=TextConfig(format={"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)),
        tool_choice=body.tool_choice.model_dump()
        if isinstance(body.tool_choice, wire.ChosenFunction)
        else body.tool_choice or "auto",
        tools=[{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
    )


def chat_fields(body: ResponsesRequest) -> dict[str, object]:
    """The chat request that asks for the same. Raises BadRequest for an `include` that does not exist."""
    include = body.include or ()
    for index, name in enumerate(include):
        if name not in INCLUDABLE:
            raise BadRequest("Nothing of this name can be included.", param=f"include[{index}]")
    fields: dict[str, object] = {name: getattr(body, name) for name in _SAME}
    fields["messages"] = _messages(body)
    fields["max_completion_tokens"] = body.max_output_tokens
    if LOGPROBS in include or body.top_logprobs:
        fields["logprobs"], fields["top_logprobs"] = True, body.top_logprobs
    match None if body.text is None else body.text.format:
        case wire.JsonObjectFormat():
            fields["response_format"] = {"type": "json_object"}
        case wire.JsonSchemaFormat() as schema:
            json_schema = schema.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
            fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in body.tools
        ]
    if isinstance(body.tool_choice, wire.ChosenFunction):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    return fields


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Items are finer than messages: thoughts, text and calls of one round become one message of the assistant."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thoughts: list[str] = []

    def assistant() -> dict[str, Any]:
        """The message of the round that is being put together."""
        if thoughts or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
            if thoughts:
                messages[-1]["reasoning_content"] = "".join(thoughts)
                thoughts.clear()
        return messages[-1]

    for item in body.input:
        match item:
            case wire.InputReasoning():
                thoughts += [part.text for part in item.content or ()]
            case wire.InputMessage(role="assistant"):
                message = assistant()
                if message["content"] is not None or "tool_calls" in message:
                    message = {"role": "assistant"}
                    messages.append(message)
                message["content"] = _content(item.content)
            case wire.InputFunctionCall():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                assistant().setdefault("tool_calls", []).append(call)
            case wire.InputFunctionCallOutput():
                content = _content(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case wire.InputMessage():
                thoughts.clear()  # nothing followed them
                messages.append({"role": item.role, "content": _content(item.content)})
    return messages


def _content(content: str | list[wire.InputText | wire.InputRefusal]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    texts = [part.refusal if isinstance(part, wire.InputRefusal) else part.text for part in content]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
