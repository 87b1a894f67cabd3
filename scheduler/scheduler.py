"""Decides what every step computes: the only writer of request state, free of torch, clocks and randomness.
Moments (`now`, in seconds) come from the caller, and nothing is decided by them.

**The one rule.** There is no prefill phase and no decode phase. A request has `num_tokens` (prompt and
output) and `num_computed_tokens`; every step hands out a budget of tokens so that the second catches up
with the first. Decode, chunked prefill, prefix hits and resumed preemptions are the same arithmetic,
and it stands in one place, `Scheduler._assign`. (The rule is vLLM v1's.)

**Drafts.** With `speculative`, guesses at the tokens that follow are computed beside a request's newest token: as far
as they were right, one step gives several tokens. They get what is left of the budget when everybody has had his due,
and no block: they end with the request's last one, so that what was wrong leaves nothing behind but latents that the
right tokens overwrite. Until it is known how many were right the request is not scheduled again.

**Steps in flight.** `num_computed_tokens` advances when a step is scheduled, and a token that a step
will sample counts at once, so the next step can be planned before this one's tokens are known. A request whose next
token is limited by the ones before it, by a grammar or banned sequences, sits such a step out. What a
step refers to, rows and blocks, is given back only after the step was processed by `update`, and a
block enters the prefix index only then.

**Fairness.** Waiting requests of equal priority are admitted in turns, one of each tenant
(`scheduler/waiting_queue.py`). Long prompts are served one after the other, so that a later one can take the earlier
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
from array import array
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from model.batch import ForwardBatch, Logprobs, NewRow, SampledTokens, ScheduledRow
from scheduler.block_hash import chain_hashes, root_hash
from scheduler.block_pool import BlockPool
from scheduler.messages import AddRequest, EngineStats, Finished, FinishReason, Started
from scheduler.ngram import NgramDrafter
from scheduler.request import Request, RequestStatus
from scheduler.request_queue import RequestQueue
from scheduler.waiting_queue import WaitingQueue

_LENGTH = Finished(reason=FinishReason.LENGTH)
_NAN_LOGITS = Finished(
    reason=FinishReason.ERROR, code="nan_logits", message="the model produced logits that are not finite"
)


@dataclass(slots=True)
class StepResult:
    """What a step gave its requests, in the columns of `messages.StepOutput`."""

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    finished: dict[str, Finished] = field(default_factory=dict)
    """Also the terminal events of `finish` since the last take."""
    started: dict[str, Started] = field(default_factory=dict)
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, Logprobs] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """There is anything to tell."""
        return bool(self.request_ids or self.finished or self.prompt_logprobs or self.progress)


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
        self._eos_token_ids = frozenset(eos_token_ids)
        self._prefix_cache = prefix_cache
        self._fingerprint = fingerprint
        self._speculative = speculative
        self._watermark = max(1, pool.num_blocks // 100) if watermark_blocks is None else watermark_blocks

        self._requests: dict[str, Request] = {}
        self._running = RequestQueue()
        self._waiting = WaitingQueue()
        self._holders: list[Request | None] = [None] * max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._released_rows: list[int] = []
        self._steps: deque[tuple[ForwardBatch, list[Request]]] = deque()
        self._finished: dict[str, Finished] = {}

        self._num_arrivals = 0
        self._num_scheduled_steps = 0
        self._waiting_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._num_steps = 0
        self._step_tokens = 0
        self._unknown_ids = 0
        self._nan_logits = 0
        self._num_drafts = 0
        self._draft_tokens = 0
        self._accepted_tokens = 0

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

    def make_request(self, message: AddRequest, now: float = 0.0) -> Request:
        """Unpack a message that arrived at `now` and hash its prompt's blocks (about 1 us a block).

        Reads only what never changes after construction, so any thread may call it. Raises ValueError if
        the prompt is not a whole number of uint32.
        """
        params = message.params
        tokens = array("I", message.prompt)
        root = root_hash(self._fingerprint, message.cache_salt)
        stop_token_ids = frozenset(params.stop_token_ids)
        return Request(
            request_id=message.request_id,
            params=params,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            num_tokens=len(tokens),
            max_num_tokens=min(len(tokens) + params.max_tokens, self.max_num_tokens),
            priority=message.priority,
            tenant=message.tenant,
            stop_token_ids=stop_token_ids if params.ignore_eos else stop_token_ids | self._eos_token_ids,
            root=root,
            block_hashes=chain_hashes(root, tokens, self.block_size) if self._prefix_cache else [],
            has_grammar=message.grammar is not None,
            in_lockstep=message.grammar is not None or any(len(word) > 1 for word in params.bad_words),
            drafter=NgramDrafter(tokens) if self._speculative and message.grammar is None else None,
            progress=message.progress,
            arrived_at=now,
        )

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
        if self._speculative:
            self._add_drafts(rows, requests)
        batch = ForwardBatch(self._num_scheduled_steps, rows, new_rows, self._released_rows)
        self._num_scheduled_steps += 1
        self._released_rows = []
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
        block_size = self.block_size
        result = StepResult()
        for row, request in zip(batch.rows, requests, strict=True):
            request.steps_in_flight -= 1
            token_ids = tokens_of.get(row.row, [])
            if row.drafts:
                self._settle_drafts(request, row, len(token_ids) - 1)
            broken = token_ids[-1:] == [-1]
            prompt_logprobs = sampled.prompt_logprobs.get(row.row)
            if prompt_logprobs is not None and _has_nan(prompt_logprobs):
                broken, token_ids = True, []
            if broken:
                # The latents may be as broken as the logits: no other request may meet them.
                self.pool.forget(request.block_table)
            if request.status is not ended:
                token_ids = _until_end(token_ids, request.stop_token_ids)
                if token_ids:
                    self._append(request, token_ids, sampled.logprobs.get(row.row), result, now)
                if not broken:
                    end = row.start + row.num_tokens - len(row.drafts) + max(len(token_ids) - 1, 0)
                    if end // block_size > request.num_registered_blocks:
                        self._register(request, end // block_size)
                    if row.start < request.num_prompt_tokens:
                        self._advance(request, row, prompt_logprobs, result)
                if (finished := _end_of(request, token_ids, broken)) is not None:
                    self._nan_logits += finished is _NAN_LOGITS
                    self._end(request, finished)
            if request.status is not running:
                self._give_back(request)
            elif request.drafter is not None:
                self._make_drafts(request)
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
        for holder in self._holders:
            if holder is not None:
                self._give_back(holder)
        self._released_rows = []
        return max(suspects)[2] if suspects else None

    def stats(self, step_seconds: float = 0.0) -> EngineStats:
        """Figures of now. The scheduler has no clock: the caller knows how long its last step took."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            num_blocks=self.pool.num_blocks,
            free_blocks=self.pool.free_count,
            cached_blocks=self.pool.cached_count,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            num_preemptions=self._num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_steps=self._num_steps,
            step_tokens=self._step_tokens,
            step_seconds=step_seconds,
            num_drafts=self._num_drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
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
        missing = self._num_blocks(end) - len(request.block_table)
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

    def _add_drafts(self, rows: list[ScheduledRow], requests: list[Request]) -> None:
        """Let drafts follow the newest tokens of a step's rows, oldest first, as far as the budget and blocks go."""
        budget = max(0, self.max_num_batched_tokens - sum([row.num_tokens for row in rows]))
        for row, request in zip(rows, requests, strict=True):
            if row.sample:
                places = len(request.block_table) * self.block_size - request.num_computed_tokens
                # All of them may be accepted, and one token is sampled behind them.
                most = min(budget, places, request.max_num_tokens - request.num_tokens)
                row.drafts = request.drafts = request.drafts[:most]
                row.num_tokens += len(row.drafts)
                budget -= len(row.drafts)

    def _settle_drafts(self, request: Request, row: ScheduledRow, num_accepted: int) -> None:
        """An accepted draft is a token of its request, and computed."""
        request.num_tokens += num_accepted
        if request.status is RequestStatus.RUNNING:
            request.num_computed_tokens += num_accepted
        self._num_drafts += 1
        self._draft_tokens += len(row.drafts)
        self._accepted_tokens += num_accepted
        assert request.drafter is not None
        request.drafter.observe(len(row.drafts), num_accepted)

    def _make_drafts(self, request: Request) -> None:
        """Guess what follows, if all tokens before it are known and computed but the newest."""
        assert request.drafter is not None
        if len(request.tokens) == request.num_tokens == request.num_computed_tokens + 1 > request.num_prompt_tokens:
            request.drafts = request.drafter.propose()
        else:
            request.drafts = []
            request.drafter.index()

    def _make_room(self, request: Request, count: int) -> list[int] | None:
        """Blocks for a running request, at the cost of newer ones; None if it has to wait, or was the newest itself."""
        while (blocks := self.pool.allocate(count)) is None:
            if len(self._free_rows) + len(self._running) < len(self._holders):
                return None  # a request that no longer runs gives its blocks back with a step in flight
            newest = self._running[-1]
            self._preempt(newest)
            if newest is request:
                return None
        return blocks

    def _find_hit(self, request: Request) -> list[int]:
        """Cached blocks that a request not running could start with."""
        # At least one token must be computed to have logits: a hit covers num_tokens - 1 at most. And a prompt token's
        # log-probability comes from computing the token before it.
        limit = request.num_tokens - 1
        if request.params.prompt_logprobs is not None and request.num_prompt_logprobs < request.num_prompt_tokens - 1:
            limit = min(limit, request.num_prompt_logprobs)
        return self.pool.match(request.block_hashes[: limit // self.block_size])

    def _num_new_blocks(self, request: Request, hit: list[int]) -> int:
        """Free blocks that an admission takes."""
        return self._num_blocks(request.num_tokens) - len(hit) + self.pool.count_free(hit)

    def _spare_blocks(self) -> int:
        """Free blocks that no running request needs for the tokens it has.

        One that reached a block's end takes a new block in the next step, and would take it from a request admitted
        now. That one in turn is counted with all its tokens, not its next chunk's, or it would be preempted half-way.
        """
        return self.pool.free_count - sum(self._num_blocks(r.num_tokens) - len(r.block_table) for r in self._running)

    def _waiting_share(self, short: int, most: int) -> int:
        """Tokens, up to `most`, that the first waiting requests need, as far as they are short and can be admitted."""
        share = 0
        spare = self._spare_blocks() - self._watermark
        for request, _ in zip(self._waiting, self._free_rows, strict=False):
            if request.row is not None or share >= most:
                break
            hit = self._find_hit(request)
            spare -= self._num_new_blocks(request, hit)
            need = request.num_tokens - len(hit) * self.block_size
            if need > short or spare < 0:
                break
            share += need
        return min(share, most)

    def _admit(self, budget: int, rows: list[ScheduledRow], requests: list[Request], now: float) -> list[NewRow]:
        """Bind waiting requests to rows, strictly in order, as far as budget, rows and blocks go."""
        new_rows: list[NewRow] = []
        if not (budget and self._waiting and self._free_rows):
            return new_rows
        spare = self._spare_blocks()
        while budget and self._waiting and self._free_rows:
            request = self._waiting.first()
            if request.row is not None:
                break  # preempted, and its last step is still in flight
            hit = self._find_hit(request)
            needed = self._num_new_blocks(request, hit)
            if spare < needed + (self._watermark if self._running else 0):
                break
            spare -= needed
            self._waiting.serve(request)
            self._waiting_tokens -= request.num_prompt_tokens
            self.pool.acquire(hit)
            request.row = self._free_rows.pop()
            self._holders[request.row] = request
            request.status = RequestStatus.RUNNING
            self._running.insert(request)
            request.block_table = hit
            request.num_registered_blocks = len(hit)
            request.num_computed_tokens = len(hit) * self.block_size
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_computed_tokens
                request.scheduled_at = now
                self._prefix_queries += request.num_prompt_tokens
                self._prefix_hits += request.num_cached_tokens
            found = min(request.num_computed_tokens, request.num_prompt_tokens)
            request.num_prompt_tokens_done = max(request.num_prompt_tokens_done, found)
            new_rows.append(NewRow(request.row, request.tokens[:], request.num_prompt_tokens, request.params, hit[:]))
            row = self._assign(request, budget)
            assert row is not None  # the blocks were counted above
            rows.append(row)
            requests.append(request)
            budget -= row.num_tokens
        return new_rows

    def _advance(
        self, request: Request, row: ScheduledRow, prompt_logprobs: Logprobs | None, result: StepResult
    ) -> None:
        """Tell what a step did for a prompt; what a resumed request does again was told and counted before."""
        done = min(row.start + row.num_tokens, request.num_prompt_tokens)
        if done > request.num_prompt_tokens_done:
            self._prompt_tokens += done - request.num_prompt_tokens_done
            request.num_prompt_tokens_done = done
            if request.progress and not row.sample:
                result.progress[request.request_id] = done
        if prompt_logprobs is None:
            return
        known = request.num_prompt_logprobs - row.start
        if known:
            prompt_logprobs = Logprobs(prompt_logprobs.token_ids[known:], prompt_logprobs.logprobs[known:])
        if prompt_logprobs.token_ids:
            request.num_prompt_logprobs += len(prompt_logprobs.token_ids)
            result.prompt_logprobs[request.request_id] = prompt_logprobs

    def _append(
        self, request: Request, token_ids: list[int], logprobs: Logprobs | None, result: StepResult, now: float
    ) -> None:
        """Give sampled tokens, one or more, to their request."""
        if len(request.tokens) == request.num_prompt_tokens:
            result.started[request.request_id] = Started(
                cached_tokens=request.num_cached_tokens or 0,
                queue_seconds=request.scheduled_at - request.arrived_at,
                prefill_seconds=now - request.scheduled_at,
            )
        count = len(token_ids)
        request.tokens.extend(token_ids)
        result.request_ids.append(request.request_id)
        result.token_ids.append(token_ids)
        if logprobs is not None:
            result.logprobs[request.request_id] = Logprobs(logprobs.token_ids[:count], logprobs.logprobs[:count])
        self._generation_tokens += count

    def _register(self, request: Request, num_full_blocks: int) -> None:
        """Offer the blocks that a processed step has filled to the prefix index."""
        if not self._prefix_cache:
            return
        hashes = request.block_hashes
        if len(hashes) < num_full_blocks:
            hashes.extend(chain_hashes(request.root, request.tokens, self.block_size, known=hashes))
        for index in range(request.num_registered_blocks, num_full_blocks):
            self.pool.register(request.block_table[index], hashes[index])
        request.num_registered_blocks = num_full_blocks

    def _preempt(self, request: Request) -> None:
        """Back to waiting. Tokens that its steps in flight will sample still count, and still arrive."""
        self._running.remove(request)
        request.num_computed_tokens = 0
        request.drafts = []
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(request)
        self._give_back(request)

    def _end(self, request: Request, finished: Finished) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
            self._waiting_tokens -= request.num_prompt_tokens
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]
        self._finished[request.request_id] = finished
        self._give_back(request)

    def _give_back(self, request: Request) -> None:
        """Row and blocks of a request that does not run, once no step refers to them."""
        if request.row is None or request.steps_in_flight:
            return
        self.pool.release(request.block_table)
        request.block_table = []
        self._holders[request.row] = None
        self._free_rows.append(request.row)
        self._released_rows.append(request.row)
        request.row = None

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._waiting.insert(request)
        self._waiting_tokens += request.num_prompt_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _until_end(token_ids: list[int], stop_token_ids: frozenset[int]) -> list[int]:
    """Those that count: up to the first that ends the request, and none whose logits were broken."""
    for index, token_id in enumerate(token_ids):
        if token_id == -1:
            return token_ids[:index]
        if token_id in stop_token_ids:
            return token_ids[: index + 1]
    return token_ids


def _end_of(request: Request, new: list[int], broken: bool) -> Finished | None:
    """How a request ends with its newest tokens, if it does."""
    if new and new[-1] in request.stop_token_ids:
        return Finished(reason=FinishReason.STOP, stop_token_id=new[-1])
    if broken:
        return _NAN_LOGITS
    return _LENGTH if len(request.tokens) >= request.max_num_tokens else None


def _has_nan(logprobs: Logprobs) -> bool:
    """Of a position whose logits are not finite all log-probabilities are NaN."""
    return any(math.isnan(values[0]) for values in logprobs.logprobs)


def _rejected(code: str, message: str) -> Finished:
    return Finished(reason=FinishReason.REJECTED, code=code, message=message)
