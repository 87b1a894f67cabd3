"""What a step gave its requests: new tokens, progress of prompts, ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.batch import Logprobs, ScheduledRow
from scheduler.messages import Finished, Started
from scheduler.request import Request


@dataclass(slots=True)
class StepResult:
    """In the columns of `messages.StepOutput`."""

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    finished: dict[str, Finished] = field(default_factory=dict)
    """Also the terminal events of `Scheduler.finish` since the last take."""
    started: dict[str, Started] = field(default_factory=dict)
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, Logprobs] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """There is anything to tell."""
        return bool(self.request_ids or self.finished or self.prompt_logprobs or self.progress)

    def append(self, request: Request, token_ids: list[int], logprobs: Logprobs | None, now: float) -> None:
        """Give sampled tokens, one or more, to their request. `logprobs`: of them, and perhaps of some that are not."""
        if len(request.tokens) == request.num_prompt_tokens:
            self.started[request.request_id] = Started(
                cached_tokens=request.num_cached_tokens or 0,
                queue_seconds=request.scheduled_at - request.arrived_at,
                prefill_seconds=now - request.scheduled_at,
            )
        request.tokens.extend(token_ids)
        self.request_ids.append(request.request_id)
        self.token_ids.append(token_ids)
        if logprobs is not None:
            count = len(token_ids)
            self.logprobs[request.request_id] = Logprobs(logprobs.token_ids[:count], logprobs.logprobs[:count])

    def advance(self, request: Request, row: ScheduledRow, prompt_logprobs: Logprobs | None) -> int:
        """Tell what a step did for a prompt, and how many tokens of it were computed for the first time.

        What a resumed request does again was told and counted before.
        """
        done = min(row.start + row.num_tokens, request.num_prompt_tokens)
        new = max(0, done - request.num_prompt_tokens_done)
        request.num_prompt_tokens_done += new
        if new and request.progress and not row.sample:
            self.progress[request.request_id] = done
        if prompt_logprobs is not None:
            known = request.num_prompt_logprobs - row.start
            if known:
                prompt_logprobs = Logprobs(prompt_logprobs.token_ids[known:], prompt_logprobs.logprobs[known:])
            if prompt_logprobs.token_ids:
                request.num_prompt_logprobs += len(prompt_logprobs.token_ids)
                self.prompt_logprobs[request.request_id] = prompt_logprobs
        return new
