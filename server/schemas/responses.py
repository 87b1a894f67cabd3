"""`/v1/responses`: what comes in (pydantic, strict), what goes out and the events of a stream (msgspec).

An event's type is the tag of its struct, so that nothing can be sent under another's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Discriminator, Field, Tag

from server import limits
from server.schemas.chat import ChatLogprob
from server.schemas.sampling import StrictModel, integer, number, string_or_list

# ---------------------------------------------------------------- request


class InputText(StrictModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(StrictModel):
    type: Literal["refusal"]
    refusal: str


def _kind_of_part(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"input_text": "<text>", "output_text": "<text>", "text": "<text>", "refusal": "<refusal>"}.get(str(kind))


Part = Annotated[
    Annotated[InputText, Tag("<text>")] | Annotated[InputRefusal, Tag("<refusal>")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part_type",
        custom_error_message="Only text parts are supported: this model reads text only",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Annotated[list[Part], Field(max_length=int(limits.CONTENT_PARTS.maximum))], Tag("<list>")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class InputMessage(StrictModel):
    type: Literal["message"] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: Content


class InputFunctionCall(StrictModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputFunctionCallOutput(StrictModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(StrictModel):
    """What the model thought in an earlier round. Only the text counts: nothing here is encrypted or summarised."""

    type: Literal["reasoning"]
    content: list[InputReasoningText] | None = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _kind_of_item(value: object) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _ITEMS else None


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputFunctionCall, Tag("<function_call>")]
    | Annotated[InputFunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item_type",
        custom_error_message=f"Only items of these types are supported: {', '.join(_ITEMS)}",
    ),
]
Input = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[
        Annotated[list[Item], Field(min_length=1, max_length=int(limits.MESSAGES.maximum))],
        Tag("<list>"),
    ],
    Discriminator(
        string_or_list,
        custom_error_type="input_type",
        custom_error_message="Input should be a string or a list of items",
    ),
]


class FunctionTool(StrictModel):
    type: Literal["function"] = Field(description="Tools that a server would have to run are refused.")
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ChosenFunction(StrictModel):
    type: Literal["function"]
    name: str


def _kind_of_choice(value: object) -> str | None:
    return "<string>" if isinstance(value, str) else "<object>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[ChosenFunction, Tag("<object>")],
    Discriminator(_kind_of_choice),
]


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class JsonSchemaFormat(StrictModel):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, object] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


_FORMATS = ("text", "json_object", "json_schema")


def _kind_of_format(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _FORMATS else None


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _kind_of_format,
        custom_error_type="format_type",
        custom_error_message=f"Only formats of these types are supported: {', '.join(_FORMATS)}",
    ),
]


class TextOptions(StrictModel):
    format: Format | None = None


class Reasoning(StrictModel):
    effort: str | None = Field(None, max_length=int(limits.NAME.maximum))


class ResponseStreamOptions(StrictModel):
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is obfuscated.")


class ResponsesRequest(StrictModel):
    """null counts as absent everywhere. Nothing is stored: a conversation is sent whole each time."""

    input: Input = Field(description="A text, or messages, function calls and their outputs, and reasoning.")
    instructions: str | None = Field(None, description="A system message before the input.")
    model: str | None = Field(
        None, max_length=int(limits.MODEL.maximum), description="A served name; default: the first."
    )
    max_output_tokens: int | None = integer(
        limits.MAX_COMPLETION_TOKENS, "Most tokens to generate, the reasoning included."
    )
    temperature: float | None = number(limits.TEMPERATURE, "0 is greedy.")
    top_p: float | None = number(limits.TOP_P, "0 is greedy.")
    top_logprobs: int | None = integer(limits.TOP_LOGPROBS, "Log-probabilities of so many most likely tokens too.")
    include: list[str] | None = Field(None, description="`message.output_text.logprobs`; others have nothing to add.")
    stream: bool | None = Field(None, description="Answer with typed server-sent events.")
    stream_options: ResponseStreamOptions | None = Field(None, description="Only with `stream`.")
    text: TextOptions | None = Field(None, description="`format`: text, json_object or json_schema.")
    tools: list[FunctionTool] | None = Field(None, description="Functions the model may call.")
    tool_choice: ToolChoice | None = Field(None, description="none, auto, required, or one function.")
    parallel_tool_calls: bool | None = Field(None, description="More than one call in an answer; default true.")
    max_tool_calls: int | None = Field(None, description="Accepted: it bounds tools of a server, and there are none.")
    reasoning: Reasoning | None = Field(None, description="`effort`: how much the model thinks.")
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="Given back in the answer.")
    store: bool | None = Field(None, description="Accepted; nothing is stored, and the answer says so.")
    seed: int | None = integer(limits.SEED, "The same request with the same seed gives the same tokens.")
    top_k: int | None = integer(limits.TOP_K, "-1 and 0 are off.")
    min_p: float | None = number(limits.MIN_P, "0 is off.")
    presence_penalty: float | None = number(limits.PRESENCE_PENALTY, "Over the output.")
    frequency_penalty: float | None = number(limits.FREQUENCY_PENALTY, "Over the output.")
    repetition_penalty: float | None = number(limits.REPETITION_PENALTY, "Over prompt and output; 1 is off.")
    priority: int | None = integer(limits.PRIORITY, "Lower runs first.")
    cache_salt: str | None = Field(
        None, max_length=int(limits.CACHE_SALT.maximum), description="As for chat completions."
    )


UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "truncation": ("disabled",),
    "context_management": ([],),
}
"""Asks for something that is remembered, or for an answer to another prompt than the one that was sent."""


# ---------------------------------------------------------------- answer

JsonObject = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningText]


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = MessageItem | ReasoningItem | FunctionCallItem
OutputPart = OutputText | ReasoningText


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


class ReasoningConfig(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None
    summary: str | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    format: JsonObject


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: ReasoningConfig
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float | None
    """null where the client left it to the checkpoint's generation_config.json; `top_p` too."""
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


# ---------------------------------------------------------------- events


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    sequence_number: int


class Created(Event, frozen=True, kw_only=True, tag="response.created"):
    response: ResponseObject


class InProgress(Event, frozen=True, kw_only=True, tag="response.in_progress"):
    response: ResponseObject


class Completed(Event, frozen=True, kw_only=True, tag="response.completed"):
    response: ResponseObject


class Incomplete(Event, frozen=True, kw_only=True, tag="response.incomplete"):
    response: ResponseObject


class Failed(Event, frozen=True, kw_only=True, tag="response.failed"):
    response: ResponseObject


class ItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartAdded(Event, frozen=True, kw_only=True, tag="response.content_part.added"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputPart


class PartDone(Event, frozen=True, kw_only=True, tag="response.content_part.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputPart


class OutputTextDelta(Event, frozen=True, kw_only=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[ChatLogprob]


class OutputTextDone(Event, frozen=True, kw_only=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[ChatLogprob]


class ReasoningDelta(Event, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(Event, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class ArgumentsDelta(Event, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS = (
    Created,
    InProgress,
    ItemAdded,
    PartAdded,
    ReasoningDelta,
    ReasoningDone,
    OutputTextDelta,
    OutputTextDone,
    ArgumentsDelta,
    ArgumentsDone,
    PartDone,
    ItemDone,
    Completed,
    Incomplete,
    Failed,
)
