"""The fields that both completion endpoints share: how to choose tokens, when to stop, how to answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from server import limits
from server.limits import Limit


class StrictModel(BaseModel):
    """No coercion: `true` is not 1, `"1"` is not 1. Fields nobody reads are dropped here and reported by the caller."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def number(limit: Limit, description: str) -> float | None:
    """An optional float field with the bounds of its row in the table of limits."""
    field: float | None = Field(None, ge=limit.minimum, le=limit.maximum, description=description)
    return field


def integer(limit: Limit, description: str) -> int | None:
    """An optional integer field with the bounds of its row in the table of limits."""
    assert limit.minimum is not None
    # As integers: a float cannot hold 2**63 - 1.
    field: int | None = Field(None, ge=int(limit.minimum), le=int(limit.maximum), description=description)
    return field


def _check_bytes(limit: Limit) -> AfterValidator:
    def check(text: str) -> str:
        if not 1 <= len(text.encode()) <= limit.maximum:
            raise PydanticCustomError("byte_length", f"Input should have 1 to {limit.maximum:.0f} UTF-8 bytes")
        return text

    return AfterValidator(check)


def _check_bias(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not _TOKEN_ID.fullmatch(key):
            raise PydanticCustomError("token_id_key", "Keys should be token ids in decimal digits")
    return bias


def string_or_list(value: object) -> str | None:
    """The tag of a union's branch, for pydantic's Discriminator."""
    return "<string>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def by_type(*types: str | tuple[str, ...], absent: str | None = None) -> Callable[[object], str | None]:
    """Likewise, for objects that `type` tells apart: `<type>`, or None for another. Those of a tuple have the tag of
    its first. `absent`: what an object without one is."""
    groups = [(group,) if isinstance(group, str) else group for group in types]
    tags = {name: f"<{group[0]}>" for group in groups for name in group}

    def tag(value: object) -> str | None:
        kind = value.get("type", absent) if isinstance(value, dict) else getattr(value, "type", None)
        return tags.get(kind) if isinstance(kind, str) else None

    return tag


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
"""One spelling for each id: of two the last one would win."""
StopString = Annotated[
    str, _check_bytes(limits.STOP_BYTES), Field(min_length=1, max_length=int(limits.STOP_BYTES.maximum))
]
BadWord = Annotated[
    str, _check_bytes(limits.BAD_WORD_BYTES), Field(min_length=1, max_length=int(limits.BAD_WORD_BYTES.maximum))
]
# Tags in angle brackets do not appear in the path of an error.
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[Annotated[list[StopString], Field(max_length=int(limits.STOPS.maximum))], Tag("<list>")],
    Discriminator(
        string_or_list,
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]
TokenId = Annotated[int, Field(ge=0, le=int(limits.TOKEN_ID.maximum))]
Bias = Annotated[float, Field(ge=limits.LOGIT_BIAS_VALUE.minimum, le=limits.LOGIT_BIAS_VALUE.maximum)]
LogitBias = Annotated[dict[str, Bias], Field(max_length=int(limits.LOGIT_BIAS.maximum)), AfterValidator(_check_bias)]


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(None, description="One more chunk with the usage, before `[DONE]`.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is obfuscated.")
    include_progress: bool | None = Field(
        None, description="Comments `: progress 512/2048` (prompt tokens computed) until the first token."
    )


class SamplingFields(StrictModel):
    """null counts as absent everywhere. Absent: generation_config.json of the checkpoint, then OpenAI's default."""

    model: str | None = Field(
        None, max_length=int(limits.MODEL.maximum), description="A served name; default: the first."
    )
    n: int | None = integer(limits.N, "Choices for each prompt; choice i is drawn with `seed` + i.")
    best_of: int | None = integer(limits.N, "Only as `n` says.")
    max_tokens: int | None = integer(
        limits.MAX_COMPLETION_TOKENS, "Most tokens to generate; what the model's window leaves, if that is less."
    )
    max_completion_tokens: int | None = integer(limits.MAX_COMPLETION_TOKENS, "As `max_tokens`, and wins over it.")
    min_tokens: int | None = integer(limits.MIN_TOKENS, "Nothing ends the answer before so many tokens.")
    temperature: float | None = number(limits.TEMPERATURE, "0 is greedy.")
    top_p: float | None = number(limits.TOP_P, "0 is greedy.")
    top_k: int | None = integer(limits.TOP_K, "-1 and 0 are off.")
    min_p: float | None = number(limits.MIN_P, "0 is off.")
    presence_penalty: float | None = number(limits.PRESENCE_PENALTY, "Over the output.")
    frequency_penalty: float | None = number(limits.FREQUENCY_PENALTY, "Over the output.")
    repetition_penalty: float | None = number(limits.REPETITION_PENALTY, "Over prompt and output; 1 is off.")
    seed: int | None = integer(limits.SEED, "The same request with the same seed gives the same tokens.")
    logit_bias: LogitBias | None = Field(
        None, description="Token id (as a string) to what is added to its logit; -100 bans."
    )
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=int(limits.ALLOWED_TOKEN_IDS.maximum))] | None
    ) = Field(None, description="Only these tokens can be drawn.")
    bad_words: Annotated[list[BadWord], Field(max_length=int(limits.BAD_WORDS.maximum))] | None = Field(
        None, description="Texts whose tokens cannot be drawn in a row."
    )
    response_format: dict[str, Any] | None = Field(
        None, description="`text`, `json_object`, or `json_schema` with a schema that the answer must match."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="One of `regex`, `choice`, `grammar` or `json` that the answer must match."
    )
    stop: Stop | None = Field(None, description="Texts that end the answer; they are not part of it.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=int(limits.STOP_TOKEN_IDS.maximum))] | None = Field(
        None, description="Tokens that end the answer, beside the model's own."
    )
    ignore_eos: bool | None = Field(None, description="The model's end-of-text token does not end the answer.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop text that matched.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; default true.")
    return_token_ids: bool | None = Field(None, description="Send `token_ids` and `prompt_token_ids` too.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    return_progress: bool | None = Field(
        None, description="With `stream`: chunks with `prompt_progress` and no choices until the first token."
    )
    timeout: float | None = number(
        limits.TIMEOUT, "Seconds for the answer: then 408, or an error event once it has begun."
    )
    request_id: str | None = Field(
        None,
        min_length=1,
        max_length=int(limits.MAX_REQUEST_ID.maximum),
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Comes back as `X-Request-Id`; the header of the same name wins.",
    )
    priority: int | None = integer(limits.PRIORITY, "Lower runs first.")
    cache_salt: str | None = Field(
        None,
        max_length=int(limits.CACHE_SALT.maximum),
        description="Cached prompt blocks are shared only between requests with the same salt and API key.",
    )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_progress(self) -> bool:
        options = self.stream_options
        return bool(self.stream) and (bool(self.return_progress) or bool(options and options.include_progress))

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "verbosity",
        "moderation",
        "prediction",
        "spaces_between_special_tokens",
    }
)
"""Known and without a meaning here: accepted, also with `--strict`, and named in `X-Ignored-Fields`."""

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "json_schema": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "lora_request": (),
    "prompt_embeds": (),
}
"""Known to other servers, would change the answer, not built: refused by name unless neutral."""
