"""Memory in pages of 2 MB, where the system has them: in pages of 4 KB, weights are read up to a third slower and
latents a tenth.

A page is large only if all of it is asked for before any of it is written, so weights smaller than one lie together.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64
"""Bytes: a line of the cache."""


class LargePages:
    """Not for several threads at once. What was handed out keeps its memory for itself."""

    def __init__(self) -> None:
        self._rests: list[Tensor] = []
        """What is left of each chunk: a page that one weight has begun is filled up by a later one."""

    def empty(self, *shape: int) -> Tensor:
        """uint8, zeros."""
        size = math.prod(shape)
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        place = next((i for i, rest in enumerate(self._rests) if len(rest) >= taken), len(self._rests))
        if place == len(self._rests):
            self._rests.append(_chunk(max(taken, _CHUNK_BYTES)))  # memory that is never written costs nothing
        rest = self._rests[place]
        self._rests[place] = rest[taken:]
        return rest[:size].view(shape)


def _chunk(size: int) -> Tensor:
    """Whole pages of at least so many bytes."""
    size = -(-size // PAGE_BYTES) * PAGE_BYTES
    memory = mmap.mmap(-1, size + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE_BYTES :][:size]
