"""The token counts of an answer, and how it ended."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]
"""Only words OpenAI's clients know: strict ones fail on any other."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    """Every token that was sampled, the one that ended the answer included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    prompt_cache_hit_tokens: int
    """DeepSeek's names for the same: hit + miss = prompt_tokens."""
    prompt_cache_miss_tokens: int


class AnswerTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a request went, in milliseconds."""

    queue_ms: float
    """From the arrival in the engine to the first step."""
    prefill_ms: float
    """From the first step to the first token."""
    first_token_ms: float
    """From the arrival of the request to the first token."""
    decode_ms: float
    """From the first token to the last."""
    total_ms: float
    cached_tokens: int
    """Prompt tokens that were not computed."""
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    """Of all choices together; null where there is nothing to measure."""


class PromptProgress(msgspec.Struct, frozen=True):
    total: int
    """Prompt tokens of the request."""
    processed: int


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens),
        prompt_cache_hit_tokens=cached_tokens,
        prompt_cache_miss_tokens=prompt_tokens - cached_tokens,
    )
