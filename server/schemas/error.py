"""OpenAI's error object, and Anthropic's."""

from __future__ import annotations

import msgspec


class Error(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    """The field the error is about, as a path: `messages[0].content`."""
    code: str | None
    """Machine word, e.g. `context_length_exceeded`."""


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    error: Error


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    """Machine word, e.g. `not_found_error`."""
    message: str


class AnthropicErrorResponse(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    error: AnthropicError
    request_id: str
