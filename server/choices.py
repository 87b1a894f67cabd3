"""The choices of one answer taken together: whole choices from their events, and the counts and times of all."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from server.events import ChoiceEvent, Counts, PromptTokens, Timings, TokenLogprob, ToolCallDelta
from server.schemas.usage import AnswerTimings, FinishReason, Usage, usage_of


@dataclass(slots=True)
class WholeToolCall:
    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class WholeChoice:
    """One choice from beginning to end."""

    index: int
    content: str = ""
    reasoning: str = ""
    tool_calls: list[WholeToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: PromptTokens | None = None
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    counts: Counts = field(default_factory=Counts)
    timings: Timings | None = None

    def add(self, event: ChoiceEvent) -> None:
        self.content += event.content
        self.reasoning += event.reasoning
        for delta in event.tool_calls:
            self._add_call(delta)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt = event.prompt or self.prompt
        self.counts = event.counts
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
            self.timings = event.timings

    def _add_call(self, delta: ToolCallDelta) -> None:
        if delta.index == len(self.tool_calls):
            self.tool_calls.append(WholeToolCall(delta.call_id or "", delta.name or ""))
        self.tool_calls[delta.index].arguments += delta.arguments


class Tally:
    """What all choices of an answer have cost so far."""

    def __init__(self, num_choices: int, choices_per_prompt: int = 1) -> None:
        self._counts: dict[int, Counts] = {}
        self._timings: dict[int, Timings] = {}
        self._num_choices = num_choices
        self._per_prompt = choices_per_prompt

    def add(self, event: ChoiceEvent) -> None:
        self._counts[event.index] = event.counts
        if event.timings is not None:
            self._timings[event.index] = event.timings

    @property
    def is_complete(self) -> bool:
        """Every choice has ended."""
        return len(self._timings) == self._num_choices

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        counts = self._counts.values()
        firsts = self._firsts()
        return usage_of(
            sum(each.prompt_tokens for each in firsts),
            sum(each.completion_tokens for each in counts),
            sum(each.cached_tokens for each in firsts),
            sum(each.reasoning_tokens for each in counts),
        )

    @property
    def timings(self) -> AnswerTimings:
        """The way to the first token is the first choice's, the rates are those of all. Only when complete."""
        first = self._timings[0]
        usage = self.usage
        decode = max(each.decode for each in self._timings.values())
        later = sum(max(each.completion_tokens - 1, 0) for each in self._counts.values())
        first_counts = self._counts[0]
        computed = first_counts.prompt_tokens - first_counts.cached_tokens
        return AnswerTimings(
            queue_ms=_milliseconds(first.queue),
            prefill_ms=_milliseconds(first.prefill),
            first_token_ms=_milliseconds(first.first_token),
            decode_ms=_milliseconds(decode),
            total_ms=_milliseconds(max(each.total for each in self._timings.values())),
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            prefill_tokens_per_second=round(computed / first.prefill, 2) if first.prefill > 0 else None,
            decode_tokens_per_second=round(later / decode, 2) if decode > 0 else None,
        )

    def _firsts(self) -> list[Counts]:
        return [each for index, each in self._counts.items() if index % self._per_prompt == 0]


async def collect(
    events: AsyncGenerator[ChoiceEvent, None], num_choices: int = 1, choices_per_prompt: int = 1
) -> tuple[list[WholeChoice], Tally]:
    """The whole answer, choices by their numbers."""
    choices: dict[int, WholeChoice] = {}
    tally = Tally(num_choices, choices_per_prompt)
    async with aclosing(events):
        async for event in events:
            choices.setdefault(event.index, WholeChoice(event.index)).add(event)
            tally.add(event)
    return [choices[index] for index in sorted(choices)], tally


def server_timing(timings: AnswerTimings) -> str:
    """The value of a Server-Timing header: browsers and tracing tools draw it."""
    phases = {"queue": timings.queue_ms, "prefill": timings.prefill_ms, "decode": timings.decode_ms}
    return ", ".join(f"{name};dur={value}" for name, value in {**phases, "total": timings.total_ms}.items())


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
