"""What is remembered of one HTTP request for its line in the log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestRecord:
    """Mutable; filled in while the request is answered. Holds counts and words of ours, nothing a client wrote."""

    request_id: str
    handler: str = "other"
    """Template of the route: `/v1/models/{model_id}`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "-"
    first_token_seconds: float | None = None
