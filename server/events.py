"""What an answer is made of, before any endpoint's spelling: chat completions, responses and messages encode these.

Structs, because some are made for every token.
"""

from __future__ import annotations

from array import array

import msgspec

from server.schemas.usage import FinishReason


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token with its raw log-probability and the most likely alternatives, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptTokens(msgspec.Struct, frozen=True):
    """A prompt as the engine got it."""

    token_ids: array[int]
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of all tokens but the first, where they were asked for."""


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of one tool call. `call_id` and `name` come with the call's first piece and never again."""

    index: int
    """0, 1, 2 ... within the choice, without holes."""
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""
    """The next characters of the JSON text."""


class Counts(msgspec.Struct, frozen=True):
    """Token counts of one choice so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


class Timings(msgspec.Struct, frozen=True):
    """Seconds, as measured; sent with a choice's last event."""

    queue: float
    prefill: float
    first_token: float
    """From arrival at the door to the first token."""
    decode: float
    """From the first token to the last."""
    total: float


class ChoiceEvent(msgspec.Struct, frozen=True):
    """The newest piece of one choice; every field may be empty."""

    index: int
    counts: Counts
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: PromptTokens | None = None
    """Set in the choice's first event with a token or an end."""
    progress: int | None = None
    """Prompt tokens computed, while there is no token yet."""
    finish_reason: FinishReason | None = None
    """Set in the choice's last event and in no other."""
    stop_reason: str | int | None = None
    timings: Timings | None = None
