"""`/v1/completions`: what comes in (pydantic, strict) and what goes out (msgspec, cheap to encode)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag

from server import limits
from server.schemas import sampling
from server.schemas.chat import fields_of_chat
from server.schemas.sampling import SamplingFields, TokenId, integer
from server.schemas.usage import AnswerTimings, FinishReason, PromptProgress, Usage

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint only."""


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "<string>"
    if isinstance(value, list) and value:
        # The first element decides; one of another type is then an error at its own place.
        return {str: "<strings>", int: "<ids>", list: "<id lists>"}.get(type(value[0]))
    return None


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=int(limits.PROMPT_IDS.maximum))]
_Several = Field(max_length=int(limits.PROMPTS.maximum))
Prompt = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[Annotated[list[Text], _Several], Tag("<strings>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[Annotated[list[TokenIds], _Several], Tag("<id lists>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a text, a list of token ids, or a list with one of these, and not empty",
    ),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt = Field(description="A text or token ids, or a list of either: choices are numbered across all.")
    suffix: str | None = Field(None, description="What comes after the answer, for models that can fill in.")
    max_tokens: int | None = integer(
        limits.MAX_TOKENS,
        "Most tokens to generate, default 16; what the model's window leaves, if that is less. 0 with `echo` scores.",
    )
    echo: bool | None = Field(None, description="The text begins with the prompt, and `logprobs` are given for it.")
    logprobs: int | None = integer(limits.TOP_LOGPROBS, "Send each token's log-probability and so many likely ones.")
    add_special_tokens: bool | None = Field(None, description="Begin a text with the model's BOS; default true.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request, in order."""
        prompts: list[str | list[int]] = []
        ids: list[int] = []
        for each in [self.prompt] if isinstance(self.prompt, str) else self.prompt:
            if isinstance(each, int):
                ids.append(each)
            else:
                prompts.append(each)
        return [ids] if ids else prompts


UNSUPPORTED: dict[str, tuple[object, ...]] = sampling.UNSUPPORTED | fields_of_chat(CompletionRequest)


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Four lists, one entry a token each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt: nothing predicts it."""
    top_logprobs: list[dict[str, float] | None]
    """The most likely tokens and the one that was drawn; of two with the same text the likelier."""
    text_offset: list[int]
    """Characters from the start of the choice's text; goes on over the chunks of a stream."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    """Number of the prompt x n + number of the choice."""
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    """null in every chunk of a stream but the last."""
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer, and each chunk of a stream: OpenAI gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    timings: AnswerTimings | UnsetType = UNSET
    """In the whole answer and in the last chunk."""
