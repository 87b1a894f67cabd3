"""From the fields of a request to the engine's `SamplingParams`: request over generation_config.json over OpenAI."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from model.batch import SamplingParams
from model.config import GenerationDefaults
from server.errors import BadRequest, ContextLengthExceeded
from server.schemas.sampling import SamplingFields

T = TypeVar("T")


def check_fields(fields: SamplingFields, default_max_tokens: int | None) -> None:
    """What no single field can tell. Raises BadRequest."""
    if fields.best_of is not None and fields.best_of != fields.choices:
        raise BadRequest("'best_of' must be equal to 'n': answers are not ranked here.", param="best_of")
    limit = default_max_tokens if fields.token_limit is None else fields.token_limit
    if limit is not None and (fields.min_tokens or 0) > limit:
        raise BadRequest(f"'min_tokens' must not be greater than 'max_tokens', {limit}.", param="min_tokens")
    if fields.stream_options is not None and not fields.stream:
        raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


def sampling_params(
    fields: SamplingFields,
    defaults: GenerationDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
    seeds: Random,
    bad_words: tuple[tuple[int, ...], ...] = (),
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises BadRequest for an id outside the vocabulary. Draws a seed where the client gave none."""
    check_token_ids(fields.stop_token_ids or (), vocab_size, "stop_token_ids")
    check_token_ids(fields.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    bias = {int(token_id): value for token_id, value in (fields.logit_bias or {}).items()}
    check_token_ids(tuple(bias), vocab_size, "logit_bias")
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
        # The window may leave less than was asked for.
        min_tokens=min(fields.min_tokens or 0, max_tokens),
        logit_bias=bias,
        allowed_token_ids=tuple(fields.allowed_token_ids or ()),
        bad_words=bad_words,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises BadRequest that names the place of the largest id where that is outside of the vocabulary."""
    if (highest := max(token_ids, default=0)) >= vocab_size:
        place = f"{param}[{token_ids.index(highest)}]" if param != "logit_bias" else f"{param}.{highest}"
        raise BadRequest(f"A token id must be below the vocabulary's size, {vocab_size}.", param=place)


def fit_max_tokens(prompt_tokens: int, asked: int | None, default: int | None, window: int, param: str) -> int:
    """Tokens the engine may generate: what was asked for, or the default, or else all, clipped to what is left.

    At least one: with `max_tokens` 0 the engine draws a token that is dropped. Raises ContextLengthExceeded, with
    the sentence that clients and agents look for, when the prompt leaves no room.
    """
    room = window - prompt_tokens
    if room < 1:
        raise prompt_too_long(window, f"{prompt_tokens}", param)
    limit = default if asked is None else asked
    return room if limit is None else min(max(limit, 1), room)


def prompt_too_long(window: int, count: str, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {window} tokens. However, your {param} resulted in {count} tokens, "
        f"and at least one must be left for the answer. Please reduce the length of the {param}.",
        param=param,
    )


def _first(asked: T | None, default: T | None, fallback: T) -> T:
    return asked if asked is not None else default if default is not None else fallback
