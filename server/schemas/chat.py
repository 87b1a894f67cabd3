"""`/v1/chat/completions`: what comes in (pydantic, strict) and what goes out (msgspec, cheap to encode)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from server import limits
from server.schemas import sampling
from server.schemas.sampling import SamplingFields, StrictModel, by_type, integer, string_or_list
from server.schemas.usage import AnswerTimings, FinishReason, PromptProgress, Usage


class TextPart(StrictModel):
    type: Literal["text", "input_text"]
    text: str


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str


def _kind_of_tool_choice(value: object) -> str | None:
    if isinstance(value, str):
        return "<word>"
    return "<named>" if isinstance(value, dict | NamedToolChoice) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        by_type(("text", "input_text"), "refusal"),
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
FunctionName = Annotated[str, Field(min_length=1, max_length=int(limits.FUNCTION_NAME.maximum))]


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str = Field(description="JSON text.")


class ToolCall(StrictModel):
    id: str | None = Field(None, max_length=int(limits.NAME.maximum))
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(StrictModel):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"] = Field(
        description="`developer` counts as `system`, `function` as `tool`."
    )
    content: Content | None = Field(None, validate_default=True, description="May be null for the assistant only.")
    name: str | None = Field(None, max_length=int(limits.NAME.maximum))
    reasoning_content: str | None = Field(None, description="What the assistant thought, for templates that read it.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=int(limits.TOOL_CALLS.maximum))] | None = None
    tool_call_id: str | None = Field(None, max_length=int(limits.NAME.maximum))
    function_call: CalledFunction | None = Field(None, description="As one of `tool_calls`.")
    prefix: bool | None = Field(
        None, description="On the last message, of the assistant: the answer continues it (as DeepSeek's API)."
    )

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Content | None, others: ValidationInfo) -> Content | None:
        if content is None and others.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("content_missing", "It may be null for the assistant only")
        return content


class Function(StrictModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        min_length=1, max_length=int(limits.FUNCTION_NAME.maximum)
    )
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; absent: no arguments.")
    strict: bool | None = Field(None, description="The arguments of a call match the schema for certain.")


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    name: FunctionName


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedToolChoice, Tag("<named>")],
    Discriminator(
        _kind_of_tool_choice,
        custom_error_type="tool_choice_type",
        custom_error_message="Input should be 'none', 'auto', 'required' or a named function",
    ),
]
_RESERVED = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"bos_token", "eos_token", "documents"}
)


def _check_kwargs(kwargs: dict[str, object]) -> dict[str, object]:
    if not _RESERVED.isdisjoint(kwargs):
        raise PydanticCustomError("reserved_argument", "One of these names is the server's own")
    return kwargs


TemplateKwargs = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=1024)] | bool | int | float | None],
    Field(max_length=int(limits.TEMPLATE_KWARGS.maximum)),
    AfterValidator(_check_kwargs),
]


class Thinking(StrictModel):
    type: Literal["enabled", "disabled", "auto"]


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[
        list[ChatMessage], Field(min_length=int(limits.MESSAGES.minimum or 0), max_length=int(limits.MESSAGES.maximum))
    ]
    logprobs: bool | None = Field(None, description="Send the log-probability of each token.")
    top_logprobs: int | None = integer(limits.TOP_LOGPROBS, "And of so many most likely ones; only with `logprobs`.")
    tools: Annotated[list[Tool], Field(max_length=int(limits.TOOLS.maximum))] | None = Field(
        None, description="Functions the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="`auto`, `none`, `required` or a function's name.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="How long a reasoning model thinks, where its template knows; `none`: not at all."
    )
    thinking: Thinking | None = Field(None, description="DeepSeek's switch for the same.")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables for the chat template.")
    add_generation_prompt: bool | None = Field(None, description="End the prompt with the assistant's turn.")
    continue_final_message: bool | None = Field(
        None, description="The answer continues the last message, which is the assistant's, and does not repeat it."
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin the rendered prompt with the model's BOS too, once; default false."
    )

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


UNSUPPORTED: dict[str, tuple[object, ...]] = sampling.UNSUPPORTED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "prompt": (),
    "suffix": ("",),
}
_IMMATERIAL = frozenset({"request_id", "timeout", "priority", "cache_salt", "stream_options"})
"""An answer is the same without them."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "min_tokens": (0,),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "bad_words": ([],),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_progress": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}


def fields_of_chat(model: type[StrictModel]) -> dict[str, tuple[object, ...]]:
    """What a chat request has and a request of `model` has not, for the latter's UNSUPPORTED: whoever sends `stop` to
    `/v1/responses` expects that it stops."""
    lacking = ChatCompletionRequest.model_fields.keys() - model.model_fields.keys() - _IMMATERIAL
    return {name: _NEUTRAL.get(name, ()) for name in sorted(lacking)}


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    """The token's own UTF-8 bytes, which may be a part of a character; `token` then has U+FFFD."""


class ChatLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    arguments: str
    """JSON text."""


class MessageToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """null only beside tool calls."""
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MessageToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop text or the id of `stop_token_ids` that ended the answer."""
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: AnswerTimings


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallChunk(msgspec.Struct, frozen=True, kw_only=True):
    """`id`, `type` and `name` come once, with the call's first piece: clients join what is repeated."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class ChunkDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    """Empty in the chunk that carries only the usage, and in those with the progress."""
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first chunk."""
    prompt_progress: PromptProgress | UnsetType = UNSET
    timings: AnswerTimings | UnsetType = UNSET
    """In the last chunk."""
