"""Decides what every step computes: it and its parts alone write to requests; free of torch, clocks and randomness.
Moments (`now`, in seconds) come from the caller, and nothing is decided by them.

**The one rule.** There is no prefill phase and no decode phase. A request has `num_tokens` (prompt and
output) and `num_computed_tokens`; every step hands out a budget of tokens so that the second catches up
with the first. Decode, chunked prefill, prefix hits and resumed preemptions are the same arithmetic,
and it stands in one place, `Scheduler._assign`. (The rule is vLLM v1's.)

**Steps in flight.** `num_computed_tokens` advances when a step is scheduled, and a token that a step
will sample counts at once, so the next step can be planned before this one's tokens are known. A request whose next
token is limited by the ones before it, by a grammar, banned sequences or drafts, sits such a step out.

**Fairness.** Waiting requests of equal priority are admitted in turns, one of each tenant
(`waiting_queue.py`). Long prompts are served one after the other, so that a later one can take the earlier
one's blocks from the prefix cache. But a long chunk leaves room for what is short: all that running requests need of at
most a quarter of the budget (a decoding one needs one token), and up to half of the rest for short requests that wait.
Where there are neither, a chunk may be longer than the budget, up to half of the context before it: the work that a
chunk repeats for that context is then spread over more tokens.

**Memory.** A request is admitted when the pool can hold every token it already has, beside what the
running ones still need for theirs, above a watermark. When a running request needs a block and none is
free, the newest running request is preempted: it gives its blocks back and waits, at its place in the
order, to start over (mostly from the prefix cache). The oldest request is thus never held up by a newer
one, and alone it always fits: something always gets done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from model.batch import ForwardBatch, Logprobs, NewRow, SampledTokens, ScheduledRow
from scheduler.block_pool import BlockPool
from scheduler.drafts import Drafts
from scheduler.holdings import Holdings
from scheduler.messages import EngineStats, Finished, FinishReason
from scheduler.request import FAULTS, NAN_LOGITS, Request, RequestStatus
from scheduler.request_maker import RequestMaker
from scheduler.request_queue import RequestQueue
from scheduler.step_result import StepResult
from scheduler.waiting_queue import WaitingQueue


class Scheduler:
    def __init__(
        self,
        *,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        prefix_cache: bool,
        fingerprint: str,
        speculative: bool = False,
        watermark_blocks: int | None = None,
        max_lone_chunk: int = 0,
    ) -> None:
        """`watermark_blocks`: free blocks that an admission leaves for running requests to grow into;
        None takes 1 % of the pool, at least one. A request that would run alone may use them.
        `speculative`: draft tokens, except under a grammar, whose state follows known tokens alone.
        `max_lone_chunk`: how long, beyond the budget, the chunk of a deep prompt may be that holds nobody up."""
        if min(block_size, max_num_seqs, max_num_batched_tokens) < 1:
            raise ValueError("block_size, max_num_seqs and max_num_batched_tokens must be at least 1")
        self.pool = pool
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_lone_chunk = max(max_lone_chunk, max_num_batched_tokens)
        # The last token of a request is sampled but never computed, so it needs no place in the pool.
        self.max_num_tokens = min(max_model_len, pool.num_blocks * block_size + 1)
        self.make_request = RequestMaker(
            fingerprint, block_size, self.max_num_tokens, frozenset(eos_token_ids), prefix_cache, speculative
        ).make
        self.speculative = speculative
        self._watermark = max(1, pool.num_blocks // 100) if watermark_blocks is None else watermark_blocks

        self._requests: dict[str, Request] = {}
        self._running = RequestQueue()
        self._waiting = WaitingQueue()
        self._holdings = Holdings(pool, block_size, max_num_seqs, prefix_cache)
        self._drafts = Drafts(block_size)
        self._steps: deque[tuple[ForwardBatch, list[Request]]] = deque()
        self._finished: dict[str, Finished] = {}

        self._num_arrivals = 0
        self._num_scheduled_steps = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._num_steps = 0
        self._step_tokens = 0
        self._unknown_ids = 0
        self._nan_logits = 0

    @property
    def has_work(self) -> bool:
        """Requests are running or waiting."""
        return bool(self._requests)

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not yet processed by `update`."""
        return len(self._steps)

    @property
    def ids_in_flight(self) -> list[str]:
        """Requests of the steps in flight: whom to name when a step fails."""
        return list(dict.fromkeys(request.request_id for _, requests in self._steps for request in requests))

    @property
    def grammar_rows(self) -> list[tuple[int, str]]:
        """(row, request id) of the newest step's rows that sample under a grammar: they need a bitmask."""
        batch, requests = self._steps[-1]
        return [
            (row.row, request.request_id)
            for row, request in zip(batch.rows, requests, strict=True)
            if request.has_grammar and row.sample
        ]

    def add(self, request: Request) -> Finished | None:
        """Accept a request (None), or refuse one that could never run: the reason is returned and is no event."""
        if request.request_id in self._requests or request.request_id in self._finished:
            return _rejected("duplicate_request_id", f"request id {request.request_id!r} is in use")
        if not request.num_prompt_tokens or request.params.max_tokens < 1:
            return _rejected("invalid_request", "a request needs at least one prompt token and max_tokens >= 1")
        if request.num_prompt_tokens >= self.max_num_tokens:
            return _rejected(
                "context_length_exceeded",
                f"the prompt has {request.num_prompt_tokens} tokens; at most {self.max_num_tokens} tokens fit, "
                "prompt and output together",
            )
        request.order = (request.priority, self._num_arrivals)
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._enqueue(request)
        return None

    def finish(self, request_id: str, finished: Finished) -> bool:
        """End a request from outside (abort, error). Idempotent: False, and counted, if the id is not live."""
        request = self._requests.get(request_id)
        if request is None:
            self._unknown_ids += 1
            return False
        self._end(request, finished)
        return True

    def take_finished(self) -> dict[str, Finished]:
        """Terminal events not yet delivered by `update`; each is handed out once."""
        finished, self._finished = self._finished, {}
        return finished

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far is found any more; running requests keep their blocks."""
        self.pool.reset_cache()

    def schedule(self, now: float = 0.0) -> ForwardBatch | None:
        """The next step, or None if there is nothing to compute (now: with steps in flight, `update` first)."""
        budget = self.max_num_batched_tokens
        short = max(1, budget // 4)
        needs = [self._need(request) for request in self._running]
        reserved = sum([need for need in needs if need <= short])
        if needs and max(needs) > short:
            reserved += self._waiting_share(short, (budget - reserved) // 2)
            if not reserved and min(needs) > short:
                budget = max(budget, min(self.max_lone_chunk, self._running[0].num_computed_tokens // 2))
        least = 1  # the first long chunk always gets on
        rows: list[ScheduledRow] = []
        requests: list[Request] = []
        # Oldest first. Preemption takes from the end of the same order, so it never hits a request that
        # this step has already been given to.
        for request, need in zip(self._running, needs, strict=False):
            if need <= short:
                reserved -= need
                row = self._assign(request, budget)
            else:
                row = self._assign(request, max(budget - reserved, least))
                least = 0
            if row is not None:
                rows.append(row)
                requests.append(request)
                budget -= row.num_tokens
                if not budget:
                    break
        new_rows = self._admit(budget, rows, requests, now)
        if not rows:
            return None
        if self.speculative:
            self._drafts.add(rows, requests, self.max_num_batched_tokens - sum([row.num_tokens for row in rows]))
        batch = ForwardBatch(self._num_scheduled_steps, rows, new_rows, self._holdings.take_released_rows())
        self._num_scheduled_steps += 1
        self._steps.append((batch, requests))
        return batch

    def update(self, sampled: SampledTokens, now: float = 0.0) -> StepResult:
        """Process the outcome of the oldest step in flight. Raises ValueError if it is another step's."""
        batch, requests = self._steps[0] if self._steps else (None, [])
        tokens_of: dict[int, list[int]] = {}
        for number, token_id in zip(sampled.rows, sampled.token_ids, strict=True):
            tokens_of.setdefault(number, []).append(token_id)
        if batch is None or sampled.step != batch.step or list(tokens_of) != [r.row for r in batch.rows if r.sample]:
            raise ValueError(f"outcome of step {sampled.step} does not belong to {batch and batch.step}")
        self._steps.popleft()
        running, ended = RequestStatus.RUNNING, RequestStatus.FINISHED
        result = StepResult()
        for row, request in zip(batch.rows, requests, strict=True):
            request.steps_in_flight -= 1
            token_ids = tokens_of.get(row.row, [])
            if row.drafts:
                self._drafts.settle(request, row, len(token_ids) - 1)
            fault = FAULTS.get(token_ids[-1]) if token_ids else None
            prompt_logprobs = sampled.prompt_logprobs.get(row.row)
            if prompt_logprobs is not None and _has_nan(prompt_logprobs):
                fault, token_ids = NAN_LOGITS, []
            if fault is NAN_LOGITS:
                # The latents may be as broken as the logits: no other request may meet them.
                self.pool.forget(request.block_table)
            if request.status is not ended:
                token_ids = request.until_end(token_ids)
                if token_ids:
                    result.append(request, token_ids, sampled.logprobs.get(row.row), now)
                    self._generation_tokens += len(token_ids)
                if fault is not NAN_LOGITS:
                    end = row.start + row.num_tokens - len(row.drafts) + max(len(token_ids) - 1, 0)
                    self._holdings.register(request, end)
                    if row.start < request.num_prompt_tokens:
                        self._prompt_tokens += result.advance(request, row, prompt_logprobs)
                if (finished := request.end_of(token_ids, fault)) is not None:
                    self._nan_logits += finished is NAN_LOGITS
                    self._end(request, finished)
            if request.status is not running:
                self._holdings.give_back(request)
            elif request.drafter is not None:
                self._drafts.make(request)
        self._num_steps += 1
        self._step_tokens = batch.num_tokens
        result.finished = self.take_finished()
        return result

    def abandon(self) -> str | None:
        """Undo the steps in flight, which have failed: all that runs waits to be computed again, in the same order.

        The worker must have forgotten every row; what earlier steps computed is found in the prefix cache. Returns the
        request to blame when memory ran out: the newest one whose prompt was being computed, else the newest.
        """
        suspects = [
            (row.num_tokens - len(row.drafts) > 1, request.order, request.request_id)
            for batch, requests in self._steps
            for row, request in zip(batch.rows, requests, strict=True)
            if request.status is not RequestStatus.FINISHED
        ]
        for _, requests in self._steps:
            for request in requests:
                request.steps_in_flight = 0
        self._steps.clear()
        for request in list(self._running):
            self._preempt(request)
        for request in self._requests.values():
            request.num_tokens = len(request.tokens)  # without what those steps would have sampled
        self._holdings.give_back_all()
        return max(suspects)[2] if suspects else None

    def stats(self, step_seconds: float = 0.0) -> EngineStats:
        """Figures of now. The scheduler has no clock: the caller knows how long its last step took."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_tokens=self._waiting.num_tokens,
            num_blocks=self.pool.num_blocks,
            free_blocks=self.pool.free_count,
            cached_blocks=self.pool.cached_count,
            prefix_queries=self._holdings.prefix_queries,
            prefix_hits=self._holdings.prefix_hits,
            num_preemptions=self._num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_steps=self._num_steps,
            step_tokens=self._step_tokens,
            step_seconds=step_seconds,
            num_drafts=self._drafts.num_drafts,
            draft_tokens=self._drafts.draft_tokens,
            accepted_tokens=self._drafts.accepted_tokens,
            unknown_ids=self._unknown_ids,
            nan_logits=self._nan_logits,
        )

    def _need(self, request: Request) -> int:
        """Tokens that a running request has and are not computed."""
        # The token that reaches the limit is sampled, perhaps still in flight, and ends the request. With drafts in
        # flight it is open which token comes next.
        if (
            request.num_tokens >= request.max_num_tokens
            or (request.drafts and request.steps_in_flight)
            or (request.in_lockstep and request.num_tokens > len(request.tokens))
        ):
            return 0
        return request.num_tokens - request.num_computed_tokens

    def _assign(self, request: Request, budget: int) -> ScheduledRow | None:
        """The one rule: let `num_computed_tokens` catch up with `num_tokens` within the budget.

        None if there is nothing to catch up with, or if there are no blocks for it.
        """
        start = request.num_computed_tokens
        num_tokens = min(self._need(request), budget)
        if num_tokens <= 0:
            return None
        end = start + num_tokens
        new_blocks: list[int] = []
        missing = self._holdings.num_blocks(end) - len(request.block_table)
        if missing > 0:
            blocks = self._make_room(request, missing)
            if blocks is None:
                return None
            new_blocks = blocks
            request.block_table.extend(blocks)
        sample = end == request.num_tokens
        request.num_computed_tokens = end
        request.num_tokens += sample
        request.steps_in_flight += 1
        assert request.row is not None
        return ScheduledRow(request.row, start, num_tokens, new_blocks, sample)

    def _make_room(self, request: Request, count: int) -> list[int] | None:
        """Blocks for a running request, at the cost of newer ones; None if it has to wait, or was the newest itself."""
        while (blocks := self.pool.allocate(count)) is None:
            if self._holdings.num_holders > len(self._running):
                return None  # a request that no longer runs gives its blocks back with a step in flight
            newest = self._running[-1]
            self._preempt(newest)
            if newest is request:
                return None
        return blocks

    def _waiting_share(self, short: int, most: int) -> int:
        """Tokens, up to `most`, that the first waiting requests need, as far as they are short and can be admitted."""
        share = 0
        spare = self._holdings.num_spare_blocks(self._running) - self._watermark
        for request, _ in zip(self._waiting, range(self._holdings.num_free_rows), strict=False):
            if request.row is not None or share >= most:
                break
            hit = self._holdings.find_hit(request)
            spare -= self._holdings.num_new_blocks(request, hit)
            need = request.num_tokens - len(hit) * self.block_size
            if need > short or spare < 0:
                break
            share += need
        return min(share, most)

    def _admit(self, budget: int, rows: list[ScheduledRow], requests: list[Request], now: float) -> list[NewRow]:
        """Bind waiting requests to rows, strictly in order, as far as budget, rows and blocks go."""
        new_rows: list[NewRow] = []
        if not (budget and self._waiting and self._holdings.num_free_rows):
            return new_rows
        spare = self._holdings.num_spare_blocks(self._running)
        while budget and self._waiting and self._holdings.num_free_rows:
            request = self._waiting.first()
            if request.row is not None:
                break  # preempted, and its last step is still in flight
            hit = self._holdings.find_hit(request)
            needed = self._holdings.num_new_blocks(request, hit)
            if spare < needed + (self._watermark if self._running else 0):
                break
            spare -= needed
            self._waiting.serve(request)
            number = self._holdings.bind(request, hit)
            request.status = RequestStatus.RUNNING
            self._running.insert(request)
            if not request.num_preemptions:
                request.scheduled_at = now
            new_rows.append(NewRow(number, request.tokens[:], request.num_prompt_tokens, request.params, hit[:]))
            row = self._assign(request, budget)
            assert row is not None  # the blocks were counted above
            rows.append(row)
            requests.append(request)
            budget -= row.num_tokens
        return new_rows

    def _preempt(self, request: Request) -> None:
        """Back to waiting. Tokens that its steps in flight will sample still count, and still arrive."""
        self._running.remove(request)
        request.num_computed_tokens = 0
        request.drafts = []
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(request)
        self._holdings.give_back(request)

    def _end(self, request: Request, finished: Finished) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]
        self._finished[request.request_id] = finished
        self._holdings.give_back(request)

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._waiting.insert(request)


def _has_nan(logprobs: Logprobs) -> bool:
    """Of a position whose logits are not finite all log-probabilities are NaN."""
    return any(math.isnan(values[0]) for values in logprobs.logprobs)


def _rejected(code: str, message: str) -> Finished:
    return Finished(reason=FinishReason.REJECTED, code=code, message=message)
