"""What the model is trained on: conversations (or plain text), and their tokens as the server would make them.

`encode` writes the format of `tokenizer.CHAT_TEMPLATE`, and with tools that of `server/tool_prompt.py`, piece by piece,
because it must know which tokens are answers. The pieces meet only at control tokens, at which a tokenizer cuts a text
anyway: so their ids are those of the whole prompt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from tools.builtin_model.tokenizer import BOS, EOS

ANSWER_WEIGHT = 10
TEXT_WEIGHT = 3
_TOOLS_SYSTEM = "You are a helpful Assistant."


@dataclass(frozen=True)
class ToolCall:
    """`arguments`: a JSON object as text, as in OpenAI's messages."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """`role`: system, user, assistant, tool, or `text` for a document that is no conversation.

    `weight`: of its tokens in the loss, in tenths; None is 10 for answers, 3 for plain text and 0 for all else.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    weight: int | None = None


@dataclass(frozen=True)
class Document:
    """`tools`: as in OpenAI's requests."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def dialogue(*contents: str) -> Document:
    """User and assistant by turns, the user first."""
    return Document(tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents)))


def joined(documents: Sequence[Document]) -> Document:
    """One conversation after another in one; none may have tools."""
    return Document(tuple(turn for document in documents for turn in document.turns))


def from_messages(messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] | None = None) -> Document:
    """OpenAI's messages with string contents."""
    return Document(tuple(map(_turn, messages)), tuple(tools or ()))


def to_messages(document: Document) -> list[dict[str, Any]]:
    """The conversation as OpenAI's messages; calls get the ids call_0, call_1, ..."""
    messages: list[dict[str, Any]] = []
    calls = results = 0
    for turn in document.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.role == "tool":
            message["tool_call_id"] = f"call_{results}"
            results += 1
        if turn.tool_calls:
            message["tool_calls"] = []
        for call in turn.tool_calls:
            function = {"name": call.name, "arguments": call.arguments}
            message["tool_calls"].append({"id": f"call_{calls}", "type": "function", "function": function})
            calls += 1
        messages.append(message)
    return messages


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and of each id its weight as a target of the loss in tenths; equally long."""
    return encode_all([document], tokenizer)[0]


def encode_all(documents: Sequence[Document], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """`encode` of many documents in one call of the library."""
    pieces = [_pieces(document) for document in documents]
    encodings = iter(
        tokenizer.encode_batch_fast([text for of_one in pieces for text, _ in of_one], add_special_tokens=False)
    )
    encoded: list[tuple[list[int], list[int]]] = []
    for of_one in pieces:
        ids: list[int] = []
        weights: list[int] = []
        for _, weight in of_one:
            part = next(encodings).ids
            ids += part
            weights += [weight] * len(part)
        encoded.append((ids, weights))
    return encoded


def _pieces(document: Document) -> list[tuple[str, int]]:
    """Texts with their weights; each ends, or the next begins, with a control token."""
    turns = document.turns
    if turns[0].role == "text":
        return [(BOS, 0), (turns[0].content + EOS, _weight(turns[0], TEXT_WEIGHT))]
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    if document.tools:
        system = (system or _TOOLS_SYSTEM) + "\n\n## Tools\n\n### Function\n\n"
        system += "You have the following functions available:\n" + "".join(
            _tool_text(json.dumps(tool["function"], ensure_ascii=False)) for tool in document.tools
        )
    pieces = [(BOS + system, 0)]
    before = ""
    turns = tuple(turn for turn in turns if turn.role != "system")
    for index, turn in enumerate(turns):
        match turn.role:
            case "user":
                pieces.append(("<｜User｜>" + turn.content, 0))
            case "assistant":
                if before != "tool":
                    pieces.append(("<｜Assistant｜>", 0))
                pieces.append((turn.content + _calls_text(turn.tool_calls) + EOS, _weight(turn, ANSWER_WEIGHT)))
            case "tool":
                last = index + 1 == len(turns) or turns[index + 1].role != "tool"
                text = "\n" if before == "tool" else "<｜tool▁outputs▁begin｜>"
                text += "<｜tool▁output▁begin｜>" + turn.content + "<｜tool▁output▁end｜>"
                pieces.append((text + "<｜tool▁outputs▁end｜>" * last, 0))
        before = turn.role
    return pieces


@functools.lru_cache(maxsize=1024)
def _tool_text(function: str) -> str:
    """`function`: its JSON, as text so that it can be a key of the cache."""
    value = json.loads(function)
    return f"\n- `{value['name']}`:\n```json\n{json.dumps(value, ensure_ascii=False, indent=4)}\n```"


def _calls_text(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    texts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.arguments}\n```<｜tool▁call▁end｜>"
        for call in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(texts) + "<｜tool▁calls▁end｜>"


def _weight(turn: Turn, default: int) -> int:
    return default if turn.weight is None else turn.weight


def _turn(message: Mapping[str, Any]) -> Turn:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = tuple(ToolCall(function["name"], function["arguments"]) for function in functions)
    return Turn(message["role"], message.get("content") or "", calls)
