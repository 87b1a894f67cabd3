"""POST /v1/messages and /v1/messages/count_tokens: chat as Anthropic's clients speak it."""

from __future__ import annotations

import json
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admission import AdmissionGate
from server.chat import ChatService
from server.errors import BadRequest
from server.generation import Generator
from server.json_body import ignored_header, read_body
from server.message_encoder import MessageEncoder
from server.openapi import body_docs, completion_docs
from server.routes.answer import json_response, record_of
from server.routes.translated import answer, chat_request, renamed
from server.schemas import messages as wire
from server.schemas.error import AnthropicErrorResponse
from server.schemas.messages import (
    EVENTS,
    UNSUPPORTED,
    AnthropicMessage,
    CountTokensRequest,
    MessagesRequest,
    PromptFields,
    TokenCount,
)
from server.served import ServedModel

NAMES = {
    r"^max_completion_tokens$": "max_tokens",
    r"^messages\b.*": "messages",
    r"^response_format\b.*": "output_config.format.schema",
    r"^reasoning_effort$": "output_config.effort",
    r"^stop\b": "stop_sequences",
    r"\.function\.parameters\b": ".input_schema",
    r"\.function\b": "",
}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": "enabled", "disabled": "disabled", "adaptive": "auto"}


def messages_router(service: ChatService, generator: Generator, gate: AdmissionGate, served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/messages",
        summary="Continue a conversation, as Anthropic's API",
        **completion_docs(MessagesRequest, AnthropicMessage, *EVENTS, error=AnthropicErrorResponse),
    )
    async def create_message(request: Request) -> Response:
        body, ignored = await read_body(request, MessagesRequest, UNSUPPORTED)
        model = served.resolve(body.model)
        chat = chat_request(chat_fields(body), NAMES)
        answer_id = f"msg_{uuid.uuid4().hex}"
        encoder = MessageEncoder(answer_id, model, record_of(request).request_id)
        return await answer(
            request,
            service,
            chat,
            encoder,
            NAMES,
            answer_id=answer_id,
            stream=bool(body.stream),
            headers=ignored_header(ignored),
        )

    @router.post(
        "/v1/messages/count_tokens",
        summary="How many tokens a conversation has, as Anthropic's API",
        **body_docs(CountTokensRequest, TokenCount, error=AnthropicErrorResponse),
    )
    async def count_tokens(request: Request) -> Response:
        body, ignored = await read_body(request, CountTokensRequest, UNSUPPORTED)
        served.resolve(body.model)
        chat = chat_request(prompt_fields(body), NAMES)
        window = generator.require_ready().max_model_len
        # A place at the door: the tokenizer's threads are the same that open answers wait for.
        with renamed(NAMES), gate.reserve(key=record_of(request).key_digest):
            count = len(await service.encode(chat, window))
        return json_response(TokenCount(input_tokens=count), headers=ignored_header(ignored))

    return router


def chat_fields(body: MessagesRequest) -> dict[str, object]:
    """The chat request that asks for the same."""
    fields = prompt_fields(body)
    fields |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    fields["max_completion_tokens"] = body.max_tokens
    fields["stop"] = body.stop_sequences
    return fields


def prompt_fields(body: PromptFields) -> dict[str, object]:
    """The half of it that the prompt depends on. Raises BadRequest for a choice of a tool without its name."""
    fields: dict[str, object] = {"model": body.model, "messages": _messages(body)}
    if body.messages[-1].role == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in body.tools]
    if (choice := body.tool_choice) is not None:
        if choice.type != "tool":
            fields["tool_choice"] = _TOOL_CHOICES[choice.type]
        elif choice.name is None:
            raise BadRequest("A choice of type 'tool' needs the tool's 'name'.", param="tool_choice.name")
        else:
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        if choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    if body.thinking is not None:
        fields["thinking"] = {"type": _THINKING[body.thinking.type]}
    if body.output_config is not None:
        fields["reasoning_effort"] = body.output_config.effort
        if (output := body.output_config.format) is not None:
            json_schema = {"name": "output", "schema": output.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    return fields


def _messages(body: PromptFields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for index, turn in enumerate(body.messages):
        _check_blocks(turn, index)
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            messages.append(_assistant(turn.content))
        else:
            messages += _user(turn.content)
    return messages


_BLOCKS_OF = {
    "user": (wire.InputTextBlock, wire.InputToolResult),
    "assistant": (wire.InputTextBlock, wire.InputToolUse, wire.InputThinking, wire.InputRedactedThinking),
}


def _check_blocks(turn: wire.Turn, index: int) -> None:
    if isinstance(turn.content, str):
        return
    for position, block in enumerate(turn.content):
        if not isinstance(block, _BLOCKS_OF[turn.role]):
            param = f"messages[{index}].content[{position}]"
            raise BadRequest(f"A message of the {turn.role} cannot have a block of type '{block.type}'.", param=param)


def _assistant(blocks: list[wire.Block]) -> dict[str, Any]:
    texts = [block.text for block in blocks if isinstance(block, wire.InputTextBlock)]
    message: dict[str, Any] = {"role": "assistant", "content": _parts(texts) if texts else None}
    if thoughts := [block.thinking for block in blocks if isinstance(block, wire.InputThinking)]:
        message["reasoning_content"] = "".join(thoughts)
    calls = [block for block in blocks if isinstance(block, wire.InputToolUse)]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input, ensure_ascii=False)},
            }
            for call in calls
        ]
    return message


def _user(blocks: list[wire.Block]) -> list[dict[str, Any]]:
    """What tools gave are messages of their own in a chat; the text around them keeps its place."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            messages.append({"role": "user", "content": _parts(texts)})
            texts.clear()

    for block in blocks:
        match block:
            case wire.InputToolResult():
                flush()
                content = "" if block.content is None else _text(block.content)
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
            case wire.InputTextBlock():
                texts.append(block.text)
    flush()
    return messages or [{"role": "user", "content": ""}]


def _function(tool: wire.CustomTool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name, "parameters": tool.input_schema, "strict": bool(tool.strict)}
    return function if tool.description is None else {**function, "description": tool.description}


def _text(content: str | list[wire.InputTextBlock]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else _parts([block.text for block in content])


def _parts(texts: list[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
