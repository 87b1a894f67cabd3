"""Pieces of an answer to the blocks and events of `/v1/messages`: the stream and the whole come from one machine."""

from __future__ import annotations

from typing import Literal

import msgspec

from server.errors import ApiError, anthropic_error
from server.events import ChoiceEvent, Counts, ToolCallDelta
from server.schemas import messages as wire

Kind = Literal["thinking", "text", "tool_use"]


class MessageEncoder:
    """Feed it every event of the one choice; `result` is then the answer, and what `push` returned was its stream."""

    def __init__(self, message_id: str, model: str, request_id: str) -> None:
        self.result = wire.AnthropicMessage(id=message_id, model=model, usage=_usage(Counts()))
        self._request_id = request_id
        self._events: list[msgspec.Struct] = []
        self._started = False
        self._blocks: list[wire.OutputBlock] = []
        self._kind: Kind | None = None
        """Of the block that grows; there is one at most, and the next kind of piece closes it."""
        self._call: ToolCallDelta | None = None
        self._pieces: list[str] = []

    def push(self, event: ChoiceEvent) -> list[msgspec.Struct]:
        if not self._started:
            self._started = True
            self.result = msgspec.structs.replace(self.result, usage=_usage(event.counts))
            self._events += [wire.MessageStart(message=self.result), wire.Ping()]
        elif event.counts.completion_tokens == 0 and event.finish_reason is None:
            self._events.append(wire.Ping())  # a long prompt
        if event.reasoning:
            self._piece("thinking", event.reasoning, wire.ThinkingDelta(thinking=event.reasoning))
        if event.content:
            self._piece("text", event.content, wire.TextDelta(text=event.content))
        for call in event.tool_calls:
            if self._call is None or self._call.index != call.index:
                self._begin("tool_use", call)
            if call.arguments:
                self._piece("tool_use", call.arguments, wire.InputJsonDelta(partial_json=call.arguments))
        if event.finish_reason is not None:
            self._finish(event)
        return self._take()

    def fail(self, error: ApiError) -> list[msgspec.Struct]:
        """The end of a stream that broke."""
        return [anthropic_error(error, self._request_id)]

    def _piece(self, kind: Kind, text: str, delta: wire.TextDelta | wire.ThinkingDelta | wire.InputJsonDelta) -> None:
        if self._kind != kind:
            self._begin(kind)
        self._pieces.append(text)
        self._events.append(wire.BlockDelta(index=len(self._blocks), delta=delta))

    def _begin(self, kind: Kind, call: ToolCallDelta | None = None) -> None:
        self._close()
        self._kind, self._call = kind, call
        self._events.append(wire.BlockStart(index=len(self._blocks), content_block=self._block()))

    def _close(self) -> None:
        if self._kind is None:
            return
        self._events.append(wire.BlockStop(index=len(self._blocks)))
        self._blocks.append(self._block())
        self._kind, self._call = None, None
        self._pieces = []

    def _block(self) -> wire.OutputBlock:
        text = "".join(self._pieces)
        if self._call is not None:
            return wire.ToolUseBlock(id=self._call.call_id or "", name=self._call.name or "", input=_arguments(text))
        return wire.ThinkingBlock(thinking=text) if self._kind == "thinking" else wire.TextBlock(text=text)

    def _finish(self, event: ChoiceEvent) -> None:
        self._close()
        reason: wire.StopReason
        sequence = event.stop_reason if isinstance(event.stop_reason, str) else None
        match event.finish_reason:
            case "length":
                reason = "max_tokens"
            case "stop" if sequence is not None:
                reason = "stop_sequence"
            case "tool_calls":
                reason = "tool_use"
            case _:
                # A call that the client forced ends with `stop` in OpenAI's words.
                used = any(isinstance(block, wire.ToolUseBlock) for block in self._blocks)
                reason = "tool_use" if used else "end_turn"
        self.result = msgspec.structs.replace(
            self.result,
            content=self._blocks,
            stop_reason=reason,
            stop_sequence=sequence if reason == "stop_sequence" else None,
            usage=_usage(event.counts),
        )
        ending = wire.Ending(stop_reason=reason, stop_sequence=self.result.stop_sequence)
        self._events += [wire.MessageDelta(delta=ending, usage=self.result.usage), wire.MessageStop()]

    def _take(self) -> list[msgspec.Struct]:
        events, self._events = self._events, []
        return events


def _usage(counts: Counts) -> wire.MessageUsage:
    return wire.MessageUsage(
        input_tokens=counts.prompt_tokens - counts.cached_tokens,
        cache_read_input_tokens=counts.cached_tokens,
        output_tokens=counts.completion_tokens,
    )


def _arguments(text: str) -> dict[str, object]:
    """The input of a tool call. Text that is no JSON object, as of a call that max_tokens cut, is kept under the name
    that Anthropic's guide gives it.
    """
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):
        return {"INVALID_JSON": text}
