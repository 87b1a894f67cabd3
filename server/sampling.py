"""From the fields of a request to the engine's `SamplingParams`: request over generation_config.json over OpenAI."""

from __future__ import annotations

from random import Random
from typing import TypeVar

from model.batch import SamplingParams
from model.config import GenerationDefaults
from server.errors import BadRequest, ContextLengthExceeded
from server.schemas.sampling import SamplingFields

T = TypeVar("T")


def sampling_params(
    fields: SamplingFields, defaults: GenerationDefaults, *, max_tokens: int, vocab_size: int, seeds: Random
) -> SamplingParams:
    """Raises BadRequest for a stop id outside the vocabulary. Draws a seed where the client gave none."""
    for index, token_id in enumerate(fields.stop_token_ids or ()):
        if token_id >= vocab_size:
            raise BadRequest(
                f"A stop token id must be below the vocabulary's size, {vocab_size}.", param=f"stop_token_ids[{index}]"
            )
    temperature = _first(fields.temperature, 0.0 if defaults.do_sample is False else defaults.temperature, 1.0)
    top_p = _first(fields.top_p, defaults.top_p, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=(seeds.getrandbits(64) if fields.seed is None else fields.seed) & (2**64 - 1),
        # The smallest nucleus is the most likely token alone.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=min(max(_first(fields.top_k, defaults.top_k, 0), 0), vocab_size),
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
    )


def fit_max_tokens(prompt_tokens: int, asked: int | None, default: int | None, window: int, param: str) -> int:
    """Tokens the answer may have. What the client asked for must fit; a default is clipped to what is left.

    Raises ContextLengthExceeded with the sentence that clients and agents look for.
    """
    room = window - prompt_tokens
    if room < 1:
        raise prompt_too_long(window, f"{prompt_tokens}", param)
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {window} tokens. However, you requested {prompt_tokens + asked} "
            f"tokens ({prompt_tokens} in the {param}, {asked} in the completion). Please reduce the length of the "
            f"{param} or completion.",
            param=param,
        )
    return asked


def prompt_too_long(window: int, count: str, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {window} tokens. However, your {param} resulted in {count} tokens, "
        f"and at least one must be left for the answer. Please reduce the length of the {param}.",
        param=param,
    )


def _first(asked: T | None, default: T | None, fallback: T) -> T:
    return asked if asked is not None else default if default is not None else fallback
