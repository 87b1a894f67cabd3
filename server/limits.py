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
QUEUED_BODY_BYTES = Limit("queued_bodies", 32 * 2**20, "bytes", "bodies of all requests that are not tokenized yet")
MAX_HEADER_BYTES = Limit("headers", 32 * 2**10, "bytes", "URL and headers of a request")
MAX_HEADERS = Limit("header_count", 100, "headers", "request headers")
FREE_FORM_BYTES = Limit(
    "free_form",
    2 * 2**20,
    "bytes",
    "tools, functions, response_format, structured_outputs, chat_template_kwargs, metadata, each as JSON",
)
JSON_OBJECTS = Limit("json_objects", 100_000, "objects and lists", "request body")
MAX_JSON_DEPTH = Limit("json_depth", 100, "nested levels", "each field of the body")
MAX_REQUEST_ID = Limit("request_id", 128, "characters", "X-Request-Id")
MESSAGES = Limit("messages", 4096, "messages", "messages", 1)
CONTENT_PARTS = Limit("content_parts", 1024, "parts", "messages[].content")
NAME = Limit("name", 256, "characters", "messages[].name")
MODEL = Limit("model", 256, "characters", "model")
PROMPT_IDS = Limit("prompt_ids", 2**20, "ids", "prompt")
UNBROKEN_TEXT = Limit(
    "unbroken_text", 256 * 2**10, "characters", "text in which letters, digits, spaces and signs do not change"
)
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
MAX_TOKENS = Limit("max_tokens", 2**31 - 1, "tokens", "completions: max_tokens (and the model's window)", 0)
MAX_COMPLETION_TOKENS = Limit(
    "max_completion_tokens", 2**31 - 1, "tokens", "max_completion_tokens, chat: max_tokens (and the model's window)", 1
)
MIN_TOKENS = Limit("min_tokens", 2**31 - 1, "tokens", "min_tokens (and max_tokens)", 0)
N = Limit("n", 32, "choices", "n", 1)
PROMPTS = Limit("prompts", 64, "prompts", "prompt", 1)
SEQUENCES = Limit("sequences", 64, "choices", "n x prompts", 1)
TOP_LOGPROBS = Limit("top_logprobs", 20, "tokens", "top_logprobs, completions: logprobs", 0)
LOGIT_BIAS = Limit("logit_bias", 1024, "ids", "logit_bias")
LOGIT_BIAS_VALUE = Limit("logit_bias_value", 100.0, "", "logit_bias{}", -100.0)
ALLOWED_TOKEN_IDS = Limit("allowed_token_ids", 2**18, "ids", "allowed_token_ids", 1)
BAD_WORDS = Limit("bad_words", 128, "strings", "bad_words")
BAD_WORD_BYTES = Limit("bad_word_length", 256, "UTF-8 bytes", "bad_words[]", 1)
TIMEOUT = Limit("timeout", 86_400.0, "seconds", "timeout", 0.001)
TOOLS = Limit("tools", 128, "tools", "tools")
TOOL_CALLS = Limit("tool_calls", 128, "calls", "messages[].tool_calls")
FUNCTION_NAME = Limit("function_name", 64, "characters", "tools[].function.name", 1)
TEMPLATE_KWARGS = Limit("chat_template_kwargs", 16, "arguments", "chat_template_kwargs")
PRIORITY = Limit("priority", 2**31 - 1, "", "priority", -(2**31))
CACHE_SALT = Limit("cache_salt", 256, "characters", "cache_salt")
SCHEMA_BYTES = Limit("schema_bytes", 64 * 2**10, "bytes", "JSON schema")
SCHEMA_DEPTH = Limit("schema_depth", 32, "nested schemas", "JSON schema")
SCHEMA_PROPERTIES = Limit("schema_properties", 500, "properties", "JSON schema")
ENUM_VALUES = Limit("enum_values", 1000, "enum values", "JSON schema")
REPEATS = Limit(
    "repeats",
    10_000,
    "repeats",
    "minLength, maxLength, minItems, maxItems, minProperties, maxProperties, digits of multipleOf, nested repeats "
    "of a regular expression",
)
REGEX_BYTES = Limit("regex_bytes", 2 * 2**10, "bytes", "structured_outputs.regex, pattern")
GRAMMAR_BYTES = Limit("grammar_bytes", 64 * 2**10, "bytes", "structured_outputs.grammar, structured_outputs.choice")
CHOICES = Limit("choices", 1000, "texts", "structured_outputs.choice")

LIMITS: tuple[Limit, ...] = (
    MAX_BODY_BYTES,
    QUEUED_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    FREE_FORM_BYTES,
    JSON_OBJECTS,
    MAX_JSON_DEPTH,
    MAX_REQUEST_ID,
    MESSAGES,
    CONTENT_PARTS,
    NAME,
    MODEL,
    PROMPT_IDS,
    UNBROKEN_TEXT,
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
    MAX_COMPLETION_TOKENS,
    MIN_TOKENS,
    N,
    PROMPTS,
    SEQUENCES,
    TOP_LOGPROBS,
    LOGIT_BIAS,
    LOGIT_BIAS_VALUE,
    ALLOWED_TOKEN_IDS,
    BAD_WORDS,
    BAD_WORD_BYTES,
    TIMEOUT,
    TOOLS,
    TOOL_CALLS,
    FUNCTION_NAME,
    TEMPLATE_KWARGS,
    PRIORITY,
    CACHE_SALT,
    SCHEMA_BYTES,
    SCHEMA_DEPTH,
    SCHEMA_PROPERTIES,
    ENUM_VALUES,
    REPEATS,
    REGEX_BYTES,
    GRAMMAR_BYTES,
    CHOICES,
)
