"""What `/v1/responses` takes in (pydantic, strict)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from server import limits
from server.schemas import chat
from server.schemas.chat import fields_of_chat
from server.schemas.sampling import StrictModel, by_type, integer, number, string_or_list


class InputText(StrictModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(StrictModel):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[InputText, Tag("<text>")] | Annotated[InputRefusal, Tag("<refusal>")],
    Discriminator(
        by_type(("text", "input_text", "output_text"), "refusal"),
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
Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputFunctionCall, Tag("<function_call>")]
    | Annotated[InputFunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    Discriminator(
        by_type(*_ITEMS, absent="message"),
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
Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        by_type(*_FORMATS),
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


UNSUPPORTED: dict[str, tuple[object, ...]] = (
    chat.UNSUPPORTED
    | fields_of_chat(ResponsesRequest)
    | {
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "truncation": ("disabled",),
        "context_management": ([],),
    }
)
"""Also what asks for something that is remembered, or for an answer to another prompt than the one that was sent."""
