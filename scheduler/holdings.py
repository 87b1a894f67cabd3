"""What requests hold: a row of the worker and blocks of the pool, bound at admission and given back together.

Both are given back only when the last step that refers to them was processed, which can be a step after the request
has stopped running. A block enters the prefix index only when the step that filled it was processed.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.block_hash import chain_hashes
from scheduler.block_pool import BlockPool
from scheduler.request import Request


class Holdings:
    def __init__(self, pool: BlockPool, block_size: int, num_rows: int, prefix_cache: bool) -> None:
        """`block_size`: tokens a block. Without `prefix_cache` no block is ever found again."""
        self._pool = pool
        self._block_size = block_size
        self._prefix_cache = prefix_cache
        self._holders: list[Request | None] = [None] * num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._released_rows: list[int] = []
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix index, each request's once."""
        self.prefix_hits = 0
        """Those found there."""

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_holders(self) -> int:
        """Requests that hold a row, those included that run no more."""
        return len(self._holders) - len(self._free_rows)

    def num_blocks(self, num_tokens: int) -> int:
        """How many so many tokens fill or begin."""
        return -(-num_tokens // self._block_size)

    def find_hit(self, request: Request) -> list[int]:
        """Cached blocks that a request not running could start with."""
        # At least one token must be computed to have logits: a hit covers num_tokens - 1 at most. And a prompt token's
        # log-probability comes from computing the token before it.
        limit = request.num_tokens - 1
        if request.params.prompt_logprobs is not None and request.num_prompt_logprobs < request.num_prompt_tokens - 1:
            limit = min(limit, request.num_prompt_logprobs)
        return self._pool.match(request.block_hashes[: limit // self._block_size])

    def num_new_blocks(self, request: Request, hit: list[int]) -> int:
        """Free blocks that an admission takes."""
        return self.num_blocks(request.num_tokens) - len(hit) + self._pool.count_free(hit)

    def num_spare_blocks(self, running: Iterable[Request]) -> int:
        """Free blocks that no running request needs for the tokens it has.

        One that reached a block's end takes a new block in the next step, and would take it from a request admitted
        now. That one in turn is counted with all its tokens, not its next chunk's, or it would be preempted half-way.
        """
        return self._pool.free_count - sum(self.num_blocks(r.num_tokens) - len(r.block_table) for r in running)

    def bind(self, request: Request, hit: list[int]) -> int:
        """A free row, of which there must be one, and the blocks of a hit, whose tokens are computed. The row."""
        self._pool.acquire(hit)
        row = request.row = self._free_rows.pop()
        self._holders[row] = request
        request.block_table = hit
        request.num_registered_blocks = len(hit)
        found = request.num_computed_tokens = len(hit) * self._block_size
        request.num_prompt_tokens_done = max(request.num_prompt_tokens_done, min(found, request.num_prompt_tokens))
        if request.num_cached_tokens is None:
            request.num_cached_tokens = found
            self.prefix_queries += request.num_prompt_tokens
            self.prefix_hits += found
        return row

    def register(self, request: Request, num_tokens: int) -> None:
        """Offer what processed steps have filled, so many tokens in all, to the prefix index."""
        num_full_blocks = num_tokens // self._block_size
        if num_full_blocks <= request.num_registered_blocks or not self._prefix_cache:
            return
        hashes = request.block_hashes
        if len(hashes) < num_full_blocks:
            hashes.extend(chain_hashes(request.root, request.tokens, self._block_size, known=hashes))
        for index in range(request.num_registered_blocks, num_full_blocks):
            self._pool.register(request.block_table[index], hashes[index])
        request.num_registered_blocks = num_full_blocks

    def give_back(self, request: Request) -> None:
        """Row and blocks of a request that does not run, unless a step refers to them."""
        if request.row is None or request.steps_in_flight:
            return
        self._pool.release(request.block_table)
        request.block_table = []
        self._holders[request.row] = None
        self._free_rows.append(request.row)
        self._released_rows.append(request.row)
        request.row = None

    def give_back_all(self) -> None:
        """As nothing runs and no step is in flight, and the worker has forgotten all rows."""
        for holder in self._holders:
            if holder is not None:
                self.give_back(holder)
        self._released_rows = []

    def take_released_rows(self) -> list[int]:
        """Those given back since the last take: the worker hears of each once."""
        released, self._released_rows = self._released_rows, []
        return released
