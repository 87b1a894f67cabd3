"""`/v1/chat/completions`: what comes in (pydantic, strict) and what goes out (msgspec, cheap to encode)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server import limits
from server.schemas import sampling
from server.schemas.sampling import SamplingFields, StrictModel
from server.schemas.usage import FinishReason, Usage


class TextPart(StrictModel):
    type: Literal["text", "input_text"]
    text: str


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str


def _kind_of_part(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "<text>", "input_text": "<text>", "refusal": "<refusal>"}.get(str(kind))


def _kind_of_content(value: object) -> str | None:
    return "<string>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part_type",
        custom_error_message="Only text parts are supported: this model reads text only",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Annotated[list[Part], Field(max_length=int(limits.CONTENT_PARTS.maximum))], Tag("<parts>")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class ChatMessage(StrictModel):
    role: Literal["developer", "system", "user", "assistant"] = Field(description="`developer` counts as `system`.")
    content: Content | None = Field(None, description="May be null for the assistant only.")
    name: str | None = Field(None, max_length=int(limits.NAME.maximum))
    tool_calls: Annotated[list[object], Field(max_length=0)] | None = Field(None, description="Not supported yet.")
    function_call: None = None
    prefix: Literal[False] | None = Field(None, description="Not supported yet.")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "Content may be null for the assistant only")
        return self


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[
        list[ChatMessage], Field(min_length=int(limits.MESSAGES.minimum or 0), max_length=int(limits.MESSAGES.maximum))
    ]


UNSUPPORTED: dict[str, tuple[object, ...]] = sampling.UNSUPPORTED | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: Message
    logprobs: None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop text or the id of `stop_token_ids` that ended the answer."""


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChunkDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChunkDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    """Empty in the chunk that carries only the usage."""
    usage: Usage | UnsetType | None = UNSET
