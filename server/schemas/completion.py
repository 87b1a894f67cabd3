"""`/v1/completions`: what comes in (pydantic, strict) and what goes out (msgspec, cheap to encode)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag

from server import limits
from server.schemas import sampling
from server.schemas.sampling import SamplingFields, TokenId
from server.schemas.usage import FinishReason, Usage

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
Prompt = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[Text], Tag("<strings>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Tag("<id lists>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a text, a list of token ids, or a list with one of these, and not empty",
    ),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt = Field(description="A text or token ids, also as a list with one entry.")
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


UNSUPPORTED: dict[str, tuple[object, ...]] = sampling.UNSUPPORTED | {
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
}


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None
    """null in every chunk of a stream but the last."""
    stop_reason: str | int | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer, and each chunk of a stream: OpenAI gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
