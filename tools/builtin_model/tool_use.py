"""Conversations with tools: calls with values of the question, answers after results, and questions for no tool.

A tool has several names and argument names, so that both are read in its definition and not only remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, ToolCall, Turn

Arguments = dict[str, str | int]

_CURRENCIES = ("euro", "dollar", "pound", "yen", "franc", "peso")
_PHRASES = (
    "see you at noon",
    "I am late",
    "dinner is ready",
    "the train is late",
    "happy birthday",
    "call me",
    "good luck",
    "the meeting is over",
    "I am at home",
    "thank you",
    "good night",
    "buy milk",
)
_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")


@dataclass(frozen=True)
class Variant:
    """One way to define a tool: `arguments` are name and JSON type."""

    name: str
    description: str
    arguments: Mapping[str, str]

    def definition(self) -> dict[str, Any]:
        """As in OpenAI's requests."""
        parameters = {
            "type": "object",
            "properties": {name: {"type": kind} for name, kind in self.arguments.items()},
            "required": list(self.arguments),
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tool:
    """`values` draws arguments in the order of the variants; `asked` and `told` are formats over {0}, {1}, ...

    `practised` draws from more values than the tests ask for, where those are few enough to be guessed.
    `results`: what the tool may say, and what the model then says, both formats over the arguments and what `outcome`
    draws.
    """

    variants: Sequence[Variant]
    values: Callable[[Random], tuple[str | int, ...]]
    asked: Sequence[str]
    held_out: Sequence[str]
    outcome: Callable[[Random, tuple[str | int, ...]], dict[str, str | int]]
    result: Sequence[str]
    told: str
    practised: Callable[[Random], tuple[str | int, ...]] | None = None


def _variants(description: str, *forms: tuple[str, Mapping[str, str]]) -> tuple[Variant, ...]:
    """The first form is the one that the tests use, so it comes as often as the others together."""
    return tuple(Variant(name, description, arguments) for name, arguments in (*forms[:1] * (len(forms) - 1), *forms))


TOOLS = (
    Tool(
        _variants(
            "Get the weather in a city",
            ("get_weather", {"city": "string"}),
            ("get_weather", {"location": "string"}),
            ("weather", {"city": "string"}),
            ("current_weather", {"place": "string"}),
        ),
        lambda rng: (rng.choice(tables.cities()),),
        (
            "What is the weather in {0}?",
            "What is the weather in {0}?",
            "What's the weather in {0}?",
            "weather in {0}?",
            "What is the weather like in {0}?",
            "How is the weather in {0}?",
            "Tell me the weather in {0}.",
            "weather {0}",
            "Is it raining in {0}?",
            "How warm is it in {0}?",
            "What is the weather in {0} today?",
            "I am in {0}. How is the weather?",
        ),
        ("Can you tell me the weather in {0}?", "Please tell me the weather in {0}."),
        lambda rng, _: {"sky": rng.choice(_SKIES), "degrees": rng.randrange(1, 36)},
        ("{sky}, {degrees} degrees", '{{"sky": "{sky}", "temperature": {degrees}}}'),
        "The weather in {0} is {sky}, {degrees} degrees.",
    ),
    Tool(
        _variants(
            "Get the time in a city",
            ("get_time", {"city": "string"}),
            ("get_time", {"location": "string"}),
            ("current_time", {"city": "string"}),
        ),
        lambda rng: (rng.choice(tables.cities()),),
        (
            "What time is it in {0}?",
            "What time is it in {0}?",
            "what time is it in {0}",
            "What is the time in {0}?",
            "Tell me the time in {0}.",
            "time in {0}?",
            "How late is it in {0}?",
            "What time is it now in {0}?",
            "Do you know the time in {0}?",
        ),
        ("Can you tell me the time in {0}?", "Please tell me the time in {0}."),
        lambda rng, _: {"clock": f"{rng.randrange(10, 24)}:{rng.randrange(10, 60)}"},
        ("{clock}", '{{"time": "{clock}"}}'),
        "The time in {0} is {clock}.",
    ),
    Tool(
        _variants(
            "Convert an amount of money",
            ("convert_currency", {"amount": "integer", "from": "string", "to": "string"}),
            ("convert", {"amount": "integer", "source": "string", "target": "string"}),
        ),
        lambda rng: (rng.randrange(1, 1000), *rng.sample(_CURRENCIES, 2)),
        (
            "Convert {0} {1} to {2}.",
            "Convert {0} {1} to {2}.",
            "convert {0} {1} to {2}",
            "How much is {0} {1} in {2}?",
            "What is {0} {1} in {2}?",
            "{0} {1} in {2}?",
            "{0} {1} to {2}",
            "Change {0} {1} to {2}.",
            "Now convert {0} {1} to {2}.",
            "I want to convert {0} {1} to {2}.",
            "Could you convert {0} {1} to {2}?",
            "You can convert {0} {1} to {2}.",
            "Please change {0} {1} to {2}.",
            "Can you tell me how much {0} {1} is in {2}?",
        ),
        ("Please convert {0} {1} to {2}.", "Can you convert {0} {1} to {2}?"),
        lambda rng, _: {"sum": rng.randrange(1, 1000)},
        ("{sum}", "{sum} {2}", '{{"result": {sum}}}'),
        "{0} {1} is {sum} {2}.",
        lambda rng: (
            rng.randrange(1, 1000),
            *(rng.sample(tables.words(), 2) if rng.random() < 0.4 else rng.sample(_CURRENCIES, 2)),
        ),
    ),
    Tool(
        _variants(
            "Add two numbers",
            ("add", {"a": "integer", "b": "integer"}),
            ("add_numbers", {"a": "integer", "b": "integer"}),
            ("sum", {"x": "integer", "y": "integer"}),
        ),
        lambda rng: (rng.randrange(1, 1000), rng.randrange(1, 1000)),
        (
            "Add {0} and {1}.",
            "Add {0} and {1}.",
            "add {0} and {1}",
            "What is {0} + {1}?",
            "What is {0} plus {1}?",
            "Add the numbers {0} and {1}.",
            "{0} + {1}",
            "Sum of {0} and {1}?",
            "Now add {0} and {1}.",
            "Could you add {0} and {1}?",
            "I want to add {0} and {1}.",
        ),
        ("Please add {0} and {1}.", "Can you add {0} and {1}?"),
        lambda _, numbers: {"sum": int(numbers[0]) + int(numbers[1])},
        ("{sum}", '{{"result": {sum}}}'),
        "{0} + {1} = {sum}",
    ),
    Tool(
        _variants(
            "Send a message to a person",
            ("send_message", {"to": "string", "text": "string"}),
            ("send_message", {"name": "string", "message": "string"}),
            ("message", {"person": "string", "text": "string"}),
        ),
        lambda rng: (rng.choice(tables.names()), rng.choice(_PHRASES)),
        (
            "Send {0} a message: {1}",
            "Send {0} the message: {1}",
            "Tell {0}: {1}",
            "Send a message to {0}: {1}",
            "Message {0}: {1}",
            "Write to {0}: {1}",
            "send {0} this: {1}",
            "Could you send {0} a message: {1}",
            "Now send {0} the message: {1}",
            "I want to send a message to {0}: {1}",
        ),
        ("Please send {0} a message: {1}", "Please send a message to {0}: {1}"),
        lambda rng, _: {},
        ("ok", "sent", '{{"sent": true}}'),
        "I have sent the message to {0}.",
    ),
    Tool(
        _variants(
            "Search for a word",
            ("search", {"query": "string"}),
            ("search", {"word": "string"}),
            ("find", {"query": "string"}),
        ),
        lambda rng: (rng.choice(tables.words()),),
        (
            "Search for {0}.",
            "Search for {0}.",
            "search for {0}",
            "Search {0}.",
            "Look for {0}.",
            "Find {0}.",
            "Search the word {0}.",
            "Look up {0}.",
            "Could you search for {0}?",
            "Now search for {0}.",
            "I want to search for {0}.",
            "Please look for {0}.",
            "Can you find {0}?",
        ),
        ("Please search for {0}.", "Can you search for {0}?"),
        lambda rng, _: {"found": rng.randrange(1, 100)},
        ("{found} results", '{{"results": {found}}}'),
        "The search for {0} found {found} results.",
    ),
)


def tool_call(rng: Random, held_out: bool = False, count: int | None = None) -> Document:
    """One question and the right call; held-out wordings with the first variant of each tool."""
    offered = _offered(rng, count or rng.randint(2, 4), first_variants=held_out)
    tool, variant = rng.choice(offered)
    values = tool.values(rng)
    question = rng.choice(tool.held_out if held_out else tool.asked).format(*values)
    turns = (Turn("user", question), Turn("assistant", "", (_call(variant, values),)))
    return Document(turns, tuple(variant.definition() for _, variant in offered))


def tool_conversation(rng: Random, other: Callable[[Random], Document], most_tools: int, questions: int) -> Document:
    """Several questions under one list of tools; one of five is for none of them, as `other` gives it."""
    offered = _offered(rng, rng.randint(1, most_tools))
    turns: list[Turn] = []
    for _ in range(questions):
        if rng.random() < 0.2:
            turns += other(rng).turns
            continue
        # Calls with several values are the hard ones.
        tool, variant = rng.choices(offered, [len(variant.arguments) for _, variant in offered])[0]
        values = (tool.practised or tool.values)(rng)
        question = rng.choice(tool.asked).format(*values)
        turns.append(Turn("user", question.lower() if rng.random() < 0.05 else question))
        turns.append(Turn("assistant", "", (_call(variant, values),)))
        outcome = tool.outcome(rng, values)
        turns.append(Turn("tool", rng.choice(tool.result).format(*values, **outcome)))
        turns.append(Turn("assistant", tool.told.format(*values, **outcome)))
    if rng.random() < 0.3 and turns[-2].role == "tool":
        turns = turns[:-2]
    system = (Turn("system", "You are a helpful assistant."),) if rng.random() < 0.3 else ()
    return Document((*system, *turns), tuple(variant.definition() for _, variant in offered))


def _offered(rng: Random, count: int, first_variants: bool = False) -> list[tuple[Tool, Variant]]:
    chosen = rng.sample(TOOLS, count)
    return [(tool, tool.variants[0] if first_variants else rng.choice(tool.variants)) for tool in chosen]


def _call(variant: Variant, values: tuple[str | int, ...]) -> ToolCall:
    return ToolCall(variant.name, json.dumps(dict(zip(variant.arguments, values, strict=True))))
