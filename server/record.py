"""What is remembered of one HTTP request for its line in the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class RequestRecord:
    """Mutable; filled in while the request is answered. Holds counts and words of ours, nothing a client wrote."""

    request_id: str
    key_digest: bytes = b""
    """Of the API key that was sent, where there are keys."""
    response_id: str = ""
    """The `id` of the answer, once there is one: the other name a client knows it by."""
    release_body: Callable[[], None] = lambda: None
    """The body has become tokens: it does not count any more against what all bodies may have."""
    cancelled: bool = False
    """By the client, over another connection."""
    handler: str = "other"
    """Template of the route: `/v1/models/{model_id}`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "-"
    first_token_seconds: float | None = None
