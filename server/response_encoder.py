"""Pieces of an answer to the items and events of `/v1/responses`: the stream and the whole come from one machine."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from server.errors import ApiError
from server.events import ChoiceEvent, Counts, TokenLogprob, ToolCallDelta
from server.schemas import response_events as wire
from server.schemas.chat import ChatLogprob

Spell = Callable[[Iterable[TokenLogprob]], list[ChatLogprob]]
"""Log-probabilities with the tokens' texts and bytes."""

E = TypeVar("E", bound=wire.Event)
_PREFIX = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}


@dataclass(slots=True)
class _OpenItem:
    """The output item that grows; there is one at most, and the next kind of piece closes it."""

    kind: Literal["reasoning", "message", "function_call"]
    index: int
    """Of the item within the output."""
    id: str
    call: ToolCallDelta | None = None
    """The first piece of a function call."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)

    def item(self, status: wire.ItemStatus) -> wire.OutputItem:
        text = "".join(self.pieces)
        if self.call is not None:
            return wire.FunctionCallItem(
                id=self.id,
                call_id=self.call.call_id or "",
                name=self.call.name or "",
                arguments=text,
                status=status,
            )
        if self.kind == "reasoning":
            content = [] if status == "in_progress" else [wire.ReasoningText(text=text)]
            return wire.ReasoningItem(id=self.id, status=status, content=content)
        parts = [] if status == "in_progress" else [wire.OutputText(text=text, logprobs=self.logprobs)]
        return wire.MessageItem(id=self.id, status=status, content=parts)


class ResponseEncoder:
    """Feed it every event of the one choice; `result` is then the answer, and what `push` returned was its stream."""

    def __init__(self, shell: wire.ResponseObject, spell: Spell) -> None:
        """`shell`: the response as it is before there is any output."""
        self.result = shell
        self._spell = spell
        self._events: list[msgspec.Struct] = []
        self._sequence = 0
        self._items: list[wire.OutputItem] = []
        self._open: _OpenItem | None = None
        self._held: list[ChatLogprob] = []
        """Of tokens whose text is held back: a stop text may be beginning, or a character is not whole."""

    def push(self, event: ChoiceEvent) -> list[msgspec.Struct]:
        self._start()
        if event.reasoning:
            item = self._item("reasoning")
            item.pieces.append(event.reasoning)
            self._emit(wire.ReasoningDelta, item_id=item.id, output_index=item.index, delta=event.reasoning)
        self._held += self._spell(event.logprobs)
        if event.content:
            self._text(event.content)
        elif event.reasoning or event.tool_calls:
            self._held.clear()  # not tokens of the text
        for call in event.tool_calls:
            self._call(call)
        if event.finish_reason is not None:
            self._finish(event.counts, complete=event.finish_reason != "length")
        return self._take()

    def fail(self, error: ApiError) -> list[msgspec.Struct]:
        """The end of a stream that broke: what there is of the output, and why there is no more."""
        self._start()
        self._close("incomplete")
        failure = wire.ResponseError(code="server_error", message=error.message)
        self.result = msgspec.structs.replace(self.result, status="failed", error=failure, output=self._items)
        self._emit(wire.Failed, response=self.result)
        return self._take()

    def _start(self) -> None:
        if self._sequence == 0:
            self._emit(wire.Created, response=self.result)
            self._emit(wire.InProgress, response=self.result)

    def _text(self, text: str) -> None:
        item = self._item("message")
        item.pieces.append(text)
        logprobs, self._held = self._held, []
        item.logprobs += logprobs
        self._emit(wire.OutputTextDelta, item_id=item.id, output_index=item.index, delta=text, logprobs=logprobs)

    def _call(self, call: ToolCallDelta) -> None:
        item = self._open
        if item is None or item.call is None or item.call.index != call.index:
            item = self._begin("function_call", call)
        if call.arguments:
            item.pieces.append(call.arguments)
            self._emit(wire.ArgumentsDelta, item_id=item.id, output_index=item.index, delta=call.arguments)

    def _item(self, kind: Literal["reasoning", "message"]) -> _OpenItem:
        if self._open is not None and self._open.kind == kind:
            return self._open
        return self._begin(kind)

    def _begin(
        self, kind: Literal["reasoning", "message", "function_call"], call: ToolCallDelta | None = None
    ) -> _OpenItem:
        self._close("completed")
        item = self._open = _OpenItem(kind, len(self._items), f"{_PREFIX[kind]}{uuid.uuid4().hex}", call)
        self._emit(wire.ItemAdded, output_index=item.index, item=item.item("in_progress"))
        if kind == "reasoning":
            self._emit(wire.PartAdded, item_id=item.id, output_index=item.index, part=wire.ReasoningText(text=""))
        elif kind == "message":
            self._emit(wire.PartAdded, item_id=item.id, output_index=item.index, part=wire.OutputText(text=""))
        return item

    def _close(self, status: wire.ItemStatus) -> None:
        item, self._open = self._open, None
        if item is None:
            return
        done = item.item(status)
        where: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        match done:
            case wire.ReasoningItem(content=[part]):
                self._emit(wire.ReasoningDone, text=part.text, **where)
                self._emit(wire.PartDone, part=part, **where)
            case wire.MessageItem(content=[part]):
                self._emit(wire.OutputTextDone, text=part.text, logprobs=part.logprobs, **where)
                self._emit(wire.PartDone, part=part, **where)
            case wire.FunctionCallItem(name=name, arguments=arguments):
                self._emit(wire.ArgumentsDone, name=name, arguments=arguments, **where)
        self._emit(wire.ItemDone, output_index=item.index, item=done)
        self._items.append(done)

    def _finish(self, counts: Counts, *, complete: bool) -> None:
        if self._open is None:
            self._item("message")  # an answer without a token is an empty text
        if self._held and self._open is not None and self._open.kind == "message":
            self._text("")
        self._close("completed" if complete else "incomplete")
        self.result = msgspec.structs.replace(
            self.result,
            status="completed" if complete else "incomplete",
            completed_at=int(time.time()) if complete else None,
            incomplete_details=None if complete else wire.IncompleteDetails(reason="max_output_tokens"),
            output=self._items,
            usage=wire.ResponseUsage(
                input_tokens=counts.prompt_tokens,
                input_tokens_details=wire.InputTokensDetails(cached_tokens=counts.cached_tokens),
                output_tokens=counts.completion_tokens,
                output_tokens_details=wire.OutputTokensDetails(reasoning_tokens=counts.reasoning_tokens),
                total_tokens=counts.prompt_tokens + counts.completion_tokens,
            ),
        )
        self._emit(wire.Completed if complete else wire.Incomplete, response=self.result)

    def _emit(self, event: type[E], **fields: Any) -> None:
        self._events.append(event(sequence_number=self._sequence, **fields))
        self._sequence += 1

    def _take(self) -> list[msgspec.Struct]:
        events, self._events = self._events, []
        return events
