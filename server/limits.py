"""Every number, length and depth a request may have, in one table.

The schemas and the middleware take their bounds from here, `latentd serve --print-config` prints the
table, and a test sends the bound and the bound plus one for every row. A bound is checked before a
block, a thread or a tokenizer call is spent on the request.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    name: str
    maximum: float
    unit: str
    where: str
    """The field or the part of the request, as the error names it."""
    minimum: float | None = None
    """Smallest value; None where only the size is bounded."""


MAX_BODY_BYTES = Limit("body", 16 * 2**20, "bytes", "request body")
MAX_HEADER_BYTES = Limit("headers", 32 * 2**10, "bytes", "request headers")
MAX_HEADERS = Limit("header_count", 100, "headers", "request headers")
MAX_JSON_DEPTH = Limit("json_depth", 200, "nested levels", "each field of the body")
MAX_REQUEST_ID = Limit("request_id", 128, "characters", "X-Request-Id")
MESSAGES = Limit("messages", 4096, "messages", "messages", 1)
CONTENT_PARTS = Limit("content_parts", 1024, "parts", "messages[].content")
NAME = Limit("name", 256, "characters", "messages[].name")
MODEL = Limit("model", 256, "characters", "model")
PROMPT_IDS = Limit("prompt_ids", 2**20, "ids", "prompt")
STOPS = Limit("stop", 16, "strings", "stop")
STOP_BYTES = Limit("stop_length", 256, "UTF-8 bytes", "stop[]", 1)
STOP_TOKEN_IDS = Limit("stop_token_ids", 1024, "ids", "stop_token_ids")
TOKEN_ID = Limit("token_id", 2**31 - 1, "", "prompt[], stop_token_ids[] (and below the vocabulary's size)", 0)
TEMPERATURE = Limit("temperature", 2.0, "", "temperature", 0.0)
TOP_P = Limit("top_p", 1.0, "", "top_p", 0.0)
TOP_K = Limit("top_k", 2**31 - 1, "tokens", "top_k", -1)
MIN_P = Limit("min_p", 1.0, "", "min_p", 0.0)
PRESENCE_PENALTY = Limit("presence_penalty", 2.0, "", "presence_penalty", -2.0)
FREQUENCY_PENALTY = Limit("frequency_penalty", 2.0, "", "frequency_penalty", -2.0)
REPETITION_PENALTY = Limit("repetition_penalty", 10.0, "", "repetition_penalty", 0.01)
SEED = Limit("seed", 2**63 - 1, "", "seed", -(2**63))
MAX_TOKENS = Limit("max_tokens", 2**31 - 1, "tokens", "max_tokens, max_completion_tokens (and the model's window)", 1)
PRIORITY = Limit("priority", 2**31 - 1, "", "priority", -(2**31))
CACHE_SALT = Limit("cache_salt", 256, "characters", "cache_salt")

LIMITS: tuple[Limit, ...] = (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_JSON_DEPTH,
    MAX_REQUEST_ID,
    MESSAGES,
    CONTENT_PARTS,
    NAME,
    MODEL,
    PROMPT_IDS,
    STOPS,
    STOP_BYTES,
    STOP_TOKEN_IDS,
    TOKEN_ID,
    TEMPERATURE,
    TOP_P,
    TOP_K,
    MIN_P,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
    REPETITION_PENALTY,
    SEED,
    MAX_TOKENS,
    PRIORITY,
    CACHE_SALT,
)
