"""The questions of the evaluation, in `questions.jsonl`: about 40 a row, in wordings or with values never trained.

`make_questions.py` wrote the file; training data leaves out every conversation that asks one of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.builtin_model.documents import Document, ToolCall, Turn, from_messages
from tools.builtin_model.wording import essence, without_manners

FILE = Path(__file__).parent / "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """`messages` and `tools` as in OpenAI's requests.

    `answer`: the whole expected text, empty where `tool_calls` are expected. `match`: how a reply is compared with it:
    `exact`, or `contains` (the reply has it somewhere).
    """

    row: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    answer: str
    tool_calls: tuple[ToolCall, ...]
    match: str

    def prompt(self) -> Document:
        return from_messages(self.messages, self.tools)

    def document(self) -> Document:
        """The conversation with the right answer at its end; only that answer has weight."""
        turns = tuple(Turn(turn.role, turn.content, turn.tool_calls, weight=0) for turn in self.prompt().turns)
        return Document((*turns, Turn("assistant", self.answer, self.tool_calls)), self.tools)


@functools.cache
def load() -> tuple[Question, ...]:
    """All questions, row by row in the order of the file."""
    return tuple(map(_question, FILE.read_text(encoding="utf-8").splitlines()))


def _question(line: str) -> Question:
    entry = json.loads(line)
    calls = tuple(ToolCall(call["name"], json.dumps(call["arguments"])) for call in entry.get("tool_calls", ()))
    return Question(
        entry["row"],
        tuple(entry["messages"]),
        tuple(entry.get("tools", ())),
        entry.get("answer", ""),
        calls,
        entry["match"],
    )


@functools.cache
def held_out() -> frozenset[str]:
    """The essences of all conversations of the questions: what a training document must not have."""
    return frozenset(essences(question.prompt())[-1] for question in load())


def asks_held_out(document: Document) -> bool:
    """Whether the document has one of the questions: as one of its questions, or as the conversation so far."""
    held = held_out()
    return any(text in held for text in essences(document))


def essences(document: Document) -> list[str]:
    """Of each question alone, then of the questions up to each; the last is that of the whole conversation."""
    asked = [essence(turn.content) for turn in document.turns if turn.role == "user"]
    plain = [text for question in asked if (text := without_manners(question)) != question]
    return [*asked, *plain, *(" / ".join(asked[:count]) for count in range(1, len(asked) + 1))]


def to_line(row: str, document: Document, messages: Iterable[dict[str, Any]]) -> str:
    """A line of the file from a document whose last turn is the answer; `messages` are those before it."""
    answer = document.turns[-1]
    entry: dict[str, Any] = {"row": row, "messages": list(messages)}
    if document.tools:
        entry["tools"] = list(document.tools)
    if answer.tool_calls:
        entry["tool_calls"] = [
            {"name": call.name, "arguments": json.loads(call.arguments)} for call in answer.tool_calls
        ]
    else:
        entry["answer"] = answer.content
    return json.dumps({**entry, "match": "exact"}, ensure_ascii=False)
