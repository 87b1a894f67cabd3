"""What the clients of the soak ask, and what they must get.

Every question has one right answer as long as weights and options stay the same: it is greedy or seeded, and its rows
do not depend on their neighbours. The first answer of each is kept, and all later ones are compared with it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

CITIES = ["France", "Italy", "Japan", "Norway", "Egypt", "Peru", "Kenya", "Canada", "Poland", "Greece"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "describe", "description": "Describe it.", "parameters": SCHEMA}}
]


@dataclass(frozen=True)
class Question:
    path: str
    body: dict[str, Any]
    check: Callable[[dict[str, Any]], None] = lambda answer: None
    """Of a whole answer, raises where it cannot be right, whatever was said earlier."""

    @property
    def key(self) -> str:
        """Streamed or not, the answer is the same."""
        return json.dumps([self.path, {name: value for name, value in self.body.items() if name != "stream"}])


@dataclass(frozen=True)
class Refusal:
    """What no server should take, and the status that says so."""

    path: str
    content: bytes
    status: int
    content_type: str = "application/json"


def _chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40, "temperature": 0} | fields


def _follows_schema(answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def _calls_a_tool(answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        [call] = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def _echoes(prompt: str) -> Callable[[dict[str, Any]], None]:
    def check(answer: dict[str, Any]) -> None:
        assert answer["choices"][0]["text"].startswith(prompt)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) >= answer["usage"]["prompt_tokens"] - 1

    return check


def questions(seed: int) -> list[Question]:
    """About a hundred, of every kind, with prompts from a few to some thousand tokens that begin alike."""
    rng = random.Random(seed)
    asked: list[Question] = []
    for city in CITIES:
        text = f"What is the capital of {city}?"
        asked.append(Question("/v1/chat/completions", _chat(text)))
        asked.append(Question("/v1/chat/completions", _chat(text, temperature=1.3, seed=rng.randrange(1 << 31), n=2)))
        asked.append(Question("/v1/responses", {"input": text, "max_output_tokens": 40, "temperature": 0}))
        asked.append(Question("/v1/messages", _chat(text, model="latentd-builtin")))
        prompt = f"The capital of {city} is"
        echo = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 8, "temperature": 0}
        asked.append(Question("/v1/completions", echo, _echoes(prompt)))
        penalised = {"prompt": prompt, "max_tokens": 60, "temperature": 0.8, "seed": 1, "frequency_penalty": 0.5}
        asked.append(Question("/v1/completions", penalised | {"top_p": 0.9, "stop": ["\n\n"], "ignore_eos": True}))
        response_format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
        fields: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 80}
        body = _chat(f"Describe {city}.", response_format=response_format, **fields)
        asked.append(Question("/v1/chat/completions", body, _follows_schema))
        body = _chat(f"Describe {city}.", tools=TOOLS, tool_choice="required", **fields)
        asked.append(Question("/v1/chat/completions", body, _calls_a_tool))
    story = [f"{rng.choice(CITIES)} has {rng.randrange(100)} towns." for _ in range(400)]
    for sentences in (20, 60, 61, 120, 250, 400):
        body = {"prompt": " ".join(story[:sentences]), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        asked.append(Question("/v1/completions", body))
    return asked


def refusals() -> list[Refusal]:
    chat, text = "/v1/chat/completions", "/v1/completions"
    ids = json.dumps({"prompt": [1] * 9000}).encode()
    return [
        Refusal(chat, b'{"messages": [', 400),
        Refusal(chat, b'{"messages": []}', 400),
        Refusal(chat, b'{"messages": [{"role": "user", "content": NaN}]}', 400),
        Refusal(chat, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        Refusal(chat, json.dumps(_chat("x", temperature=99)).encode(), 400),
        Refusal(chat, json.dumps(_chat("x", n=1000)).encode(), 400),
        Refusal(chat, json.dumps(_chat("x", logit_bias={"99999999": 1})).encode(), 400),
        Refusal(chat, json.dumps(_chat("x", tools=[{"type": "function", "function": {"name": "a b"}}])).encode(), 400),
        Refusal(text, ids, 400),
        Refusal(text, b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
        Refusal(text, b"prompt=x", 415, "application/x-www-form-urlencoded"),
        Refusal("/v1/nothing", b"{}", 404),
    ]
