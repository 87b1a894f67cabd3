"""What must hold of a scheduler and its pool between any two calls."""

from __future__ import annotations

from collections import Counter

from scheduler.block_pool import InvariantError
from scheduler.request import RequestStatus
from scheduler.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Verify every invariant of scheduler and pool, O(requests + blocks). Raises InvariantError."""
    scheduler.pool.check()
    holdings = scheduler._holdings
    held = [request for request in holdings._holders if request is not None]
    references = Counter(block for request in held for block in request.block_table)
    in_flight = Counter(request for _, requests in scheduler._steps for request in requests)
    pending = Counter(
        request
        for batch, requests in scheduler._steps
        for row, request in zip(batch.rows, requests, strict=True)
        if row.sample
    )
    claims = {
        "references and block tables": all(
            scheduler.pool.ref_count(block) == references[block] for block in range(scheduler.pool.num_blocks)
        ),
        "rows": sorted(holdings._free_rows + [r.row for r in held if r.row is not None])
        == list(range(len(holdings._holders)))
        and all(r.row is not None and holdings._holders[r.row] is r for r in held),
        "live requests": {*scheduler._running, *scheduler._waiting} == set(scheduler._requests.values()),
        "order": list(scheduler._running) == sorted(scheduler._running, key=lambda r: r.order),
        "waiting tokens": scheduler._waiting.num_tokens == sum(r.num_prompt_tokens for r in scheduler._waiting),
        "terminal events": not scheduler._finished.keys() & scheduler._requests.keys(),
    }
    for request in {*held, *scheduler._requests.values(), *in_flight}:
        status = request.status
        claims[f"{request.request_id}: row and blocks"] = (request.row is None) <= (not request.block_table) and (
            (request.row is not None) == (status is RequestStatus.RUNNING or request.steps_in_flight > 0)
        )
        claims[f"{request.request_id}: steps in flight"] = request.steps_in_flight == in_flight[request]
        claims[f"{request.request_id}: hashes"] = len(request.block_hashes) * scheduler.block_size <= len(
            request.tokens
        )
        if status is not RequestStatus.FINISHED:
            claims[f"{request.request_id}: tokens"] = (
                request.num_tokens == len(request.tokens) + pending[request] <= request.max_num_tokens
            )
        if status is RequestStatus.RUNNING:
            claims[f"{request.request_id}: computed tokens"] = (
                request in scheduler._running
                and 0 < request.num_computed_tokens < request.num_tokens
                and len(request.block_table) == holdings.num_blocks(request.num_computed_tokens)
            )
        claims[f"{request.request_id}: drafts"] = not request.drafts or (
            status is not RequestStatus.WAITING
            and request.steps_in_flight <= 1
            and (request.num_tokens + len(request.drafts) <= request.max_num_tokens or not request.steps_in_flight)
        )
    broken = [name for name, holds in claims.items() if not holds]
    if broken:
        raise InvariantError(f"scheduler: {'; '.join(broken)}")
