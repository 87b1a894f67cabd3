"""Guesses at the tokens that follow, computed beside a request's newest token: as far as they were right, one step
gives several tokens.

They get what is left of the budget when everybody has had his due, and no block: they end with the request's last one,
so that what was wrong leaves nothing behind but latents that the right tokens overwrite. Until it is known how many
were right the request is not scheduled again.
"""

from __future__ import annotations

from model.batch import ScheduledRow
from scheduler.request import Request, RequestStatus


class Drafts:
    """The drafts of all requests that have a drafter, and what became of them."""

    def __init__(self, block_size: int) -> None:
        self.num_drafts = 0
        """Rows of steps that had any."""
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self._block_size = block_size

    def make(self, request: Request) -> None:
        """Guess what follows, if all tokens before it are known and computed but the newest."""
        assert request.drafter is not None
        if len(request.tokens) == request.num_tokens == request.num_computed_tokens + 1 > request.num_prompt_tokens:
            request.drafts = request.drafter.propose()
        else:
            request.drafts = []
            request.drafter.index()

    def add(self, rows: list[ScheduledRow], requests: list[Request], budget: int) -> None:
        """Let them follow the newest tokens of a step's rows, oldest first, as far as a budget in tokens and the
        requests' blocks go."""
        for row, request in zip(rows, requests, strict=True):
            if row.sample:
                places = len(request.block_table) * self._block_size - request.num_computed_tokens
                # All of them may be accepted, and one token is sampled behind them.
                most = max(0, min(budget, places, request.max_num_tokens - request.num_tokens))
                row.drafts = request.drafts = request.drafts[:most]
                row.num_tokens += len(row.drafts)
                budget -= len(row.drafts)

    def settle(self, request: Request, row: ScheduledRow, num_accepted: int) -> None:
        """An accepted draft is a token of its request, and computed."""
        request.num_tokens += num_accepted
        if request.status is RequestStatus.RUNNING:
            request.num_computed_tokens += num_accepted
        self.num_drafts += 1
        self.draft_tokens += len(row.drafts)
        self.accepted_tokens += num_accepted
        assert request.drafter is not None
        request.drafter.observe(len(row.drafts), num_accepted)
