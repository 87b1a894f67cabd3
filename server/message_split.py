"""Events whose text is a whole message into events with content, thoughts and tool calls apart."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from server.events import ChoiceEvent, ToolCallDelta
from server.message_parser import MessageParser


class MessageSplitter:
    """Of all choices of one answer; each has a parser of its own.

    `think_end`: the token that ends thoughts. It and all tokens before it count as reasoning tokens.
    """

    def __init__(self, new_parser: Callable[[], MessageParser], think_end: int | None) -> None:
        self._new_parser = new_parser
        self._think_end = think_end
        self._choices: dict[int, _Choice] = {}

    def split(self, event: ChoiceEvent) -> ChoiceEvent:
        choice = self._choices.get(event.index)
        if choice is None:
            choice = self._choices[event.index] = _Choice(self._new_parser(), self._think_end)
        return choice.split(event)


class _Choice:
    def __init__(self, parser: MessageParser, think_end: int | None) -> None:
        self._parser = parser
        self._think_end = think_end
        self._reasoning_tokens = 0

    def split(self, event: ChoiceEvent) -> ChoiceEvent:
        parser = self._parser
        was_thinking = parser.reasoning
        pieces = parser.push(event.content)
        if event.finish_reason is not None:
            pieces += parser.finish()
        if was_thinking or parser.reasoning or any(piece.reasoning for piece in pieces):
            ids = event.token_ids
            self._reasoning_tokens += ids.index(self._think_end) + 1 if self._think_end in ids else len(ids)
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            if (delta := piece.tool_call) is not None:
                first = calls.get(delta.index)
                whole = delta if first is None else replace(first, arguments=first.arguments + delta.arguments)
                calls[delta.index] = whole
        # A stop text inside a call is a stop: the call is not whole.
        called = parser.num_calls > 0 and event.finish_reason == "stop" and event.stop_reason is None
        return replace(
            event,
            counts=replace(event.counts, reasoning_tokens=self._reasoning_tokens),
            content="".join(piece.content for piece in pieces),
            reasoning="".join(piece.reasoning for piece in pieces),
            tool_calls=tuple(calls.values()),
            finish_reason="tool_calls" if called else event.finish_reason,
        )
