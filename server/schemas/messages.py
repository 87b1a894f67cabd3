"""`/v1/messages`, Anthropic's spelling: what comes in (pydantic, strict), what goes out and the events (msgspec)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Discriminator, Field, Tag

from server import limits
from server.schemas import chat
from server.schemas.chat import fields_of_chat
from server.schemas.sampling import StopString, StrictModel, by_type, integer, number, string_or_list

# ---------------------------------------------------------------- request


class InputTextBlock(StrictModel):
    type: Literal["text"]
    text: str


class InputThinking(StrictModel):
    type: Literal["thinking"]
    thinking: str


class InputRedactedThinking(StrictModel):
    """Nobody here can read it; it is left out, as a template leaves out thoughts of earlier rounds."""

    type: Literal["redacted_thinking"]


class InputToolUse(StrictModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


TextContent = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Annotated[list[InputTextBlock], Field(max_length=int(limits.CONTENT_PARTS.maximum))], Tag("<list>")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text blocks",
    ),
]


class InputToolResult(StrictModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None


_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Block = Annotated[
    Annotated[InputTextBlock, Tag("<text>")]
    | Annotated[InputThinking, Tag("<thinking>")]
    | Annotated[InputRedactedThinking, Tag("<redacted_thinking>")]
    | Annotated[InputToolUse, Tag("<tool_use>")]
    | Annotated[InputToolResult, Tag("<tool_result>")],
    Discriminator(
        by_type(*_BLOCKS),
        custom_error_type="block_type",
        custom_error_message=f"Only blocks of these types are supported: {', '.join(_BLOCKS)}",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Annotated[list[Block], Field(max_length=int(limits.CONTENT_PARTS.maximum))], Tag("<list>")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of blocks",
    ),
]


class Turn(StrictModel):
    role: Literal["user", "assistant"]
    content: Content


class CustomTool(StrictModel):
    type: Literal["custom"] | None = Field(None, description="Tools that a server would have to run are refused.")
    name: str
    description: str | None = None
    input_schema: dict[str, object]
    strict: bool | None = None


class ToolUseChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With `tool`.")
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(StrictModel):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(StrictModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptFields(StrictModel):
    """What a prompt is made of; null counts as absent everywhere."""

    model: str | None = Field(
        None, max_length=int(limits.MODEL.maximum), description="A served name; default: the first."
    )
    messages: Annotated[list[Turn], Field(min_length=1, max_length=int(limits.MESSAGES.maximum))] = Field(
        description="Texts or blocks: text, tool_use, tool_result, thinking. A last one of the assistant is continued."
    )
    system: TextContent | None = Field(None, description="A text, or text blocks.")
    tools: list[CustomTool] | None = Field(None, description="Tools the model may use.")
    tool_choice: ToolUseChoice | None = Field(None, description="auto, any, tool or none.")
    thinking: ThinkingConfig | None = Field(
        None, description="Whether the model thinks first; a budget is not enforced."
    )
    output_config: OutputConfig | None = Field(None, description="`effort`, and `format` with a JSON schema.")


class CountTokensRequest(PromptFields):
    pass


class MessagesRequest(PromptFields):
    max_tokens: int = Field(
        ge=1,
        le=int(limits.MAX_COMPLETION_TOKENS.maximum),
        description="Most tokens to generate, the thinking included.",
    )
    stop_sequences: Annotated[list[StopString], Field(max_length=int(limits.STOPS.maximum))] | None = Field(
        None, description="Texts that end the answer; they are not part of it."
    )
    temperature: float | None = Field(None, ge=0, le=1, description="0 is greedy.")
    top_p: float | None = number(limits.TOP_P, "0 is greedy.")
    top_k: int | None = integer(limits.TOP_K, "-1 and 0 are off.")
    stream: bool | None = Field(None, description="Answer with typed server-sent events.")


UNSUPPORTED: dict[str, tuple[object, ...]] = (
    chat.UNSUPPORTED
    | fields_of_chat(MessagesRequest)
    | {
        "container": (),
        "mcp_servers": ([],),
        "context_management": (),
        "output_format": (),
    }
)
"""Also what asks for tools of a server, or for an answer to another prompt than the one that was sent."""


# ---------------------------------------------------------------- answer

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Nothing is signed; clients want the key."""


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The whole prompt is the sum of the three input counts."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0] = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int


# ---------------------------------------------------------------- events


class MessageStart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message_start"):
    message: AnthropicMessage


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ping"):
    pass


class BlockStart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: OutputBlock


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputJsonDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message_delta"):
    delta: Ending
    usage: MessageUsage


class MessageStop(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message_stop"):
    pass


EVENTS = (MessageStart, Ping, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop)
