"""The token counts of an answer, and how it ended."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]
"""Only words OpenAI's clients know: strict ones fail on any other."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    """Every token that was sampled, the one that ended the answer included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    prompt_cache_hit_tokens: int
    """DeepSeek's names for the same: hit + miss = prompt_tokens."""
    prompt_cache_miss_tokens: int


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
        prompt_cache_hit_tokens=cached_tokens,
        prompt_cache_miss_tokens=prompt_tokens - cached_tokens,
    )
