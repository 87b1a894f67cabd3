"""One request of each kind for the API document, by the name of its model; a test sends them all."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

_MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]

EXAMPLES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "ChatCompletionRequest": {"messages": _MESSAGES, "max_tokens": 32, "temperature": 0.7},
        "CompletionRequest": {"prompt": "The sea is", "max_tokens": 16, "temperature": 0},
        "TokenizeRequest": {"prompt": "The sea is", "return_token_strs": True},
        "DetokenizeRequest": {"tokens": [100, 200, 300]},
        "ResponsesRequest": {"input": "Tell me of the sea.", "max_output_tokens": 32},
        "MessagesRequest": {"messages": _MESSAGES[1:], "max_tokens": 32},
        "CountTokensRequest": {"messages": _MESSAGES[1:]},
    }
)
