"""`/tokenize`, `/detokenize`, `/tokenizer_info` and the rendering of a chat prompt; the shapes are vLLM's."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server import limits
from server.schemas.chat import ChatMessage, TemplateKwargs, Tool
from server.schemas.sampling import StrictModel, TokenId

Name = Annotated[str, Field(max_length=int(limits.MODEL.maximum))]


class TokenizeRequest(StrictModel):
    """A text, or messages as the model would see them."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: Name | None = Field(None, description="A served name; default: the first.")
    prompt: str | None = Field(None, description="A text.")
    messages: (
        Annotated[
            list[ChatMessage],
            Field(min_length=int(limits.MESSAGES.minimum or 0), max_length=int(limits.MESSAGES.maximum)),
        ]
        | None
    ) = Field(None, description="In the place of `prompt`.")
    add_special_tokens: bool | None = Field(
        None, description="Begin with the model's BOS; default true for a text, false for messages."
    )
    add_generation_prompt: bool | None = Field(None, description="End messages where the answer begins; default true.")
    continue_final_message: bool | None = Field(None, description="End messages within the last one, the assistant's.")
    tools: Annotated[list[Tool], Field(max_length=int(limits.TOOLS.maximum))] | None = Field(
        None, description="Functions that messages tell the model of."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables for the chat template.")
    return_token_strs: bool | None = Field(None, description="Answer `token_strs` as well.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt_or_messages", "Exactly one of prompt and messages must be given")
        return self


UNSUPPORTED_TOKENIZE: dict[str, tuple[object, ...]] = {
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    """Most tokens of prompt + answer."""
    tokens: list[int]
    token_strs: list[str] | None = None
    """As the tokenizer's vocabulary spells them, which is not always text."""


class DetokenizeRequest(StrictModel):
    model: Name | None = Field(None, description="A served name; default: the first.")
    tokens: Annotated[list[TokenId], Field(max_length=int(limits.PROMPT_IDS.maximum))] = Field(
        description="Token ids, all below the vocabulary's size."
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out; default false.")


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    text: str
    """The same, under the name that SGLang gives it."""


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    tokenizer_class: str
    """The class of transformers that reads the checkpoint's tokenizer.json."""
    vocab_size: int
    """Rows of the model's embedding."""
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    chat_template: str | None


class RenderResponse(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    prompt: str
    """What the model would read, as text."""
    count: int
    max_model_len: int
    tokens: list[int]
