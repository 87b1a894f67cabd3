"""The ledger of the latent pool: which blocks are in use, what the free ones still hold, who goes next.

The pool knows ids, reference counts, content hashes and the order of reuse; it knows no requests and
no tensors. Every operation costs O(1) a block: a 131,072-token prefix is 2,048 blocks, found, taken
and given back in well under a millisecond.

A block without references is free. A free block keeps its hash, and can be taken back by `match` and
`acquire`, until `allocate` hands it out again. Blocks that hold nothing worth keeping go first, then
the least recently released ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class InvariantError(AssertionError):
    """The bookkeeping contradicts itself: a bug, named by the message."""


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` >= 1 blocks with ids 0 .. num_blocks - 1, all free and empty."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        # Free blocks: those without a hash (a stack, id 0 on top at first) and those with one, oldest
        # release first. A plain dict would not do: taking its first key again and again is O(n).
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free_count(self) -> int:
        """Blocks without references, with cached contents or not."""
        return len(self._blank) + len(self._cached)

    @property
    def cached_count(self) -> int:
        """Blocks in the prefix index, in use or free."""
        return len(self._index)

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, that is how many `acquire` would take from `free_count`."""
        refs = self._refs
        return sum([not refs[block] for block in blocks])

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Ids of the longest indexed run at the start of `hashes`. Takes no references."""
        blocks = []
        find = self._index.get
        for name in hashes:
            block = find(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of the matched `blocks`."""
        refs, cached = self._refs, self._cached
        for block in blocks:
            if not refs[block]:
                del cached[block]  # KeyError: not a block that `match` can have returned
            refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and no contents, or None (and no change) if too few are free."""
        if count > self.free_count:
            return None
        blank, cached = self._blank, self._cached
        blocks = []
        for _ in range(count):
            if blank:
                block = blank.pop()
            else:
                block, _ = cached.popitem(last=False)
                self._forget(block)
            blocks.append(block)
            self._refs[block] = 1
        return blocks

    def register(self, block: int, content_hash: bytes) -> None:
        """Index a referenced block whose contents are computed and final.

        If another block already has the hash this one stays unindexed: block tables are append-only, so
        duplicates are not merged, and the later copy is the first to be reused.
        """
        if not self._refs[block] or self._hashes[block] is not None:
            raise InvariantError(f"block {block} is free or has a hash already")
        if self._index.setdefault(content_hash, block) == block:
            self._hashes[block] = content_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Take referenced blocks out of the index: their contents cannot be trusted."""
        for block in blocks:
            if not self._refs[block]:
                raise InvariantError(f"block {block} is free")
            self._forget(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a block table, in reverse: tails are reused before heads.

        A head is shared by more prefixes than its tail, and a tail without its head is never matched.
        """
        refs, hashes, blank, cached = self._refs, self._hashes, self._blank, self._cached
        for block in reversed(blocks):
            left = refs[block] = refs[block] - 1
            if left:
                if left < 0:
                    raise InvariantError(f"block {block} released more often than taken")
            elif hashes[block] is None:
                blank.append(block)
            else:
                cached[block] = None

    def reset_cache(self) -> None:
        """Empty the prefix index. Blocks in use stay in use."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._index.clear()
        self._hashes = [None] * self.num_blocks

    def check(self) -> None:
        """Verify every invariant, O(num_blocks). Raises InvariantError."""
        free = self._blank + list(self._cached)
        if len(set(free)) != len(free):
            raise InvariantError("a block is in the free order twice")
        if sorted(free) != [block for block, refs in enumerate(self._refs) if refs == 0]:
            raise InvariantError("the free order and the blocks without references differ")
        if min(self._refs) < 0:
            raise InvariantError("a reference count is negative")
        if any(self._hashes[block] is not None for block in self._blank):
            raise InvariantError("a block with a hash is among the blank ones")
        if any(self._hashes[block] is None for block in self._cached):
            raise InvariantError("a block without a hash is among the cached ones")
        if self._index != {name: block for block, name in enumerate(self._hashes) if name is not None}:
            raise InvariantError("the prefix index and the blocks' hashes differ")
        if len(self._index) != sum(name is not None for name in self._hashes):
            raise InvariantError("two blocks have the same hash")

    def _forget(self, block: int) -> None:
        name = self._hashes[block]
        if name is not None:
            self._hashes[block] = None
            del self._index[name]
