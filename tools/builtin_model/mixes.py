"""Which documents each phase of the training sees, and in which shares of its tokens.

| mix | windows | for |
| --- | --- | --- |
| short | 256 | facts, small talk and short recall |
| copy | 256 | copying and looking up, so that neither is lost again; it is mixed into every phase |
| long | 512 | everything, texts and lists up to 500 tokens |
| recall | 1,024 or 2,048 | half long lists and texts |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.builtin_model import arithmetic, capitals, facts, recall, records, tool_use
from tools.builtin_model.chat import conversation, small_talk
from tools.builtin_model.documents import Document, Turn
from tools.builtin_model.prose import Prose

Generator = Callable[[Random], Document]


@dataclass(frozen=True)
class Mix:
    """`shares`: of tokens, by type of document, in percent; `longest`: tokens of a document at most.

    `tokens`: how many the data set has of it.
    """

    tokens: int
    longest: int
    shares: dict[str, float]


MIXES = {
    "short": Mix(
        10_000_000,
        250,
        {
            "small_talk": 11,
            "capital": 14,
            "element": 4,
            "language": 7,
            "fact": 5,
            "definition": 3,
            "arithmetic": 9,
            "form": 9,
            "name": 6,
            "people": 2,
            "copy": 11,
            "key_value": 12,
            "code_in_text": 7,
        },
    ),
    "copy": Mix(
        8_000_000,
        250,
        {
            "capital": 4,
            "arithmetic": 2,
            "form": 4,
            "name": 5,
            "people": 5,
            "copy": 40,
            "key_value": 28,
            "code_in_text": 12,
        },
    ),
    "long": Mix(
        40_000_000,
        508,
        {
            "small_talk": 12,
            "capital": 7,
            "element": 4,
            "language": 5,
            "fact": 9,
            "definition": 6,
            "arithmetic": 6,
            "form": 8,
            "tool_conversation": 8,
            "name": 3,
            "people": 2,
            "copy": 10,
            "key_value": 7,
            "code_in_text": 12,
            "text": 1,
        },
    ),
    "recall": Mix(
        12_000_000,
        2040,
        {
            "small_talk": 8,
            "capital": 5,
            "element": 3,
            "language": 3,
            "fact": 6,
            "definition": 4,
            "arithmetic": 5,
            "form": 5,
            "tool_conversation": 7,
            "name": 2,
            "people": 1,
            "copy": 10,
            "key_value": 15,
            "code_in_text": 26,
        },
    ),
}
VALIDATION_TOKENS = 40_000
"""Of the long mix."""


def generators(prose: Prose, longest: int) -> dict[str, Generator]:
    """By type; documents are at most about `longest` tokens, single questions come one to three in a conversation."""

    def chat(of: Generator) -> Generator:
        return lambda rng: conversation(rng, [of(rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))])

    def other(rng: Random) -> Document:
        """A short exchange of any kind."""
        return rng.choice((small_talk, capitals.capital, facts.language, arithmetic.arithmetic, facts.fact))(rng)

    def for_no_tool(rng: Random) -> Document:
        """No sums: these are for a tool where there is one."""
        return rng.choice((small_talk, capitals.capital, facts.language, facts.fact, facts.definition))(rng)

    def chat_of(of: Generator) -> Generator:
        """As `chat`, but one of five conversations goes on with something else."""
        plain = chat(of)
        return lambda rng: conversation(rng, [of(rng), other(rng)]) if rng.random() < 0.2 else plain(rng)

    def copy(rng: Random) -> Document:
        return conversation(rng, [recall.copy(rng, prose, 14) for _ in range(rng.choice((1, 1, 2, 3)))])

    def people(rng: Random) -> Document:
        count = rng.randint(2, 4)
        relation = rng.randrange(len(recall.PEOPLE_RELATIONS))
        return conversation(rng, [recall.people(rng, relation, count, rng.randint(1, count))])

    def key_value(rng: Random) -> Document:
        # A line has about 7 tokens, a question with its answer 20; small lists stay the most frequent ones.
        most = max(8, (min(longest, 1020) - 60) // 9)
        lines = rng.randint(2, 8) if rng.random() < 0.5 else rng.randint(4, most)
        return recall.key_value(rng, lines, rng.randint(1, 6 if lines > 8 else 4))

    def code_in_text(rng: Random) -> Document:
        statements = rng.choice((1, 1, 1, 2, 3, 4)) if longest < 300 else rng.choice((1, 1, 1, 2, 3, 4, 6))
        # One of seven is longer than 1,020 tokens where that is allowed: these have a third of the tokens.
        room = longest if rng.random() < 0.15 else min(longest, 1020)
        most = max(100, round(2.9 * (room - 20 - 35 * statements)))
        characters = rng.randint(60, most) if rng.random() < 0.6 else rng.randint(most // 2, most)
        return recall.code_in_text(rng, prose, characters, statements)

    def tool_conversation(rng: Random) -> Document:
        return tool_use.tool_conversation(rng, for_no_tool, 3 if longest < 600 else 6, rng.randint(1, 4))

    def text(rng: Random) -> Document:
        return Document((Turn("text", prose.text(rng, rng.randint(200, 1200))),))

    return {
        "small_talk": chat(small_talk),
        "capital": chat_of(capitals.capital),
        "element": chat_of(facts.element),
        "language": chat_of(facts.language),
        "fact": chat_of(facts.fact),
        "definition": chat_of(facts.definition),
        "arithmetic": chat_of(arithmetic.arithmetic),
        "form": chat_of(records.form),
        "tool_conversation": tool_conversation,
        "name": lambda rng: conversation(rng, [recall.name(rng, other)]),
        "people": people,
        "copy": copy,
        "key_value": key_value,
        "code_in_text": code_in_text,
        "text": text,
    }
