"""Windows of whole documents: what a training step reads.

A document sees only itself, as when it is served, so every document starts at its own begin token and none is cut.
Documents are drawn from several mixes by their share of the tokens and packed so that next to nothing is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POOL = 512
"""Documents among which the next one is chosen: enough that one nearly always fills a window's end."""
TARGET_HEADROOM = 1.15
"""Targets a batch has room for, over the mean: the few beyond are left out, at random."""


class Batch(NamedTuple):
    """Shapes never change within a phase, as `torch.compile` wants it; spare targets have weight 0."""

    token_ids: Tensor
    """[B, T] int64"""
    documents: Tensor
    """[B, T] int32: the number of each token's document within its window"""
    positions: Tensor
    """[P] int64: the places in the flattened batch that predict something which is trained"""
    targets: Tensor
    """[P] int64: the tokens after them"""
    weights: Tensor
    """[P] float32"""


@dataclass(frozen=True)
class Mix:
    """One stream of documents: `tokens` (uint16) and `weights` (uint8, tenths of a loss weight as a target)."""

    tokens: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    starts: NDArray[np.int64]
    """[documents + 1]: where each begins, and the end of the last"""

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def target_share(self) -> float:
        return float(np.count_nonzero(self.weights) / len(self.weights))


def load_mix(data: Path, name: str, bos: int) -> Mix:
    tokens = np.load(data / f"{name}.tokens.npy", mmap_mode="r")
    weights = np.load(data / f"{name}.weights.npy", mmap_mode="r")
    return Mix(tokens, weights, np.append(np.flatnonzero(tokens == bos), len(tokens)))


class Windows:
    """An endless supply of batches for one of several processes, which never get the same document."""

    def __init__(
        self,
        mixes: Mapping[str, Mix],
        shares: Mapping[str, float],
        shape: tuple[int, int],
        *,
        rank: int,
        processes: int,
        seed: int,
    ) -> None:
        """Documents longer than the window are passed over. `shape` is [windows a batch, tokens a window]."""
        self.shape, self.rank, self.processes, self.random = shape, rank, processes, np.random.default_rng(seed)
        self.mixes = {name: mixes[name] for name in shares}
        self.shares = dict(shares)
        self.drawn = dict.fromkeys(shares, 0.0)
        self.queues: dict[str, list[int]] = {name: [] for name in shares}
        self.pool: list[tuple[int, str, int]] = []
        share = sum(self.mixes[name].target_share * part for name, part in shares.items()) / sum(shares.values())
        self.num_targets = -(-int(share * TARGET_HEADROOM * shape[0] * shape[1]) // 64) * 64

    def next_batch(self) -> Batch:
        windows, length = self.shape
        token_ids = np.zeros((windows, length), np.int64)
        weights = np.zeros((windows, length + 1), np.uint8)
        documents = np.zeros((windows, length), np.int32)
        for window in range(windows):
            start = 0
            for number, (size, name, document) in enumerate(self._next_window(length), 1):
                mix, stop = self.mixes[name], start + size
                source = slice(mix.starts[document], mix.starts[document] + size)
                token_ids[window, start:stop] = mix.tokens[source]
                weights[window, start:stop] = mix.weights[source]
                documents[window, start:stop] = number
                start = stop
        # Position t predicts token t + 1; a begin token is never a target, so none reaches into the next document.
        aimed = np.flatnonzero(weights[:, 1:])
        if len(aimed) > self.num_targets:
            aimed = np.sort(self.random.choice(aimed, self.num_targets, replace=False))
        positions = np.zeros(self.num_targets, np.int64)
        positions[: len(aimed)] = aimed
        target_weights = np.zeros(self.num_targets, np.float32)
        target_weights[: len(aimed)] = weights[:, 1:].reshape(-1)[aimed] / np.float32(10)
        following = np.roll(token_ids.reshape(-1), -1)[positions]
        return Batch(*map(torch.from_numpy, (token_ids, documents, positions, following, target_weights)))

    def _next_window(self, length: int) -> list[tuple[int, str, int]]:
        """Any documents at first, then the longest that still fits."""
        chosen: list[tuple[int, str, int]] = []
        room = length
        while True:
            while len(self.pool) < POOL:
                bisect.insort(self.pool, self._next_document())
            fitting = bisect.bisect_right(self.pool, room, key=lambda document: document[0])
            if not fitting:
                return chosen
            taken = self.pool.pop(int(self.random.integers(fitting)) if room > length // 4 else fitting - 1)
            chosen.append(taken)
            room -= taken[0]

    def _next_document(self) -> tuple[int, str, int]:
        """(length, mix, number) from the mix that is furthest behind its share of the tokens."""
        name = min(self.shares, key=lambda name: self.drawn[name] / self.shares[name])
        if not self.queues[name]:
            self.queues[name] = self._shuffled(self.mixes[name].lengths)
        document = self.queues[name].pop()
        size = int(self.mixes[name].starts[document + 1] - self.mixes[name].starts[document])
        self.drawn[name] += size
        return size, name, document

    def _shuffled(self, lengths: NDArray[np.int64]) -> list[int]:
        own = np.flatnonzero(lengths <= self.shape[1])
        own = own[own % self.processes == self.rank]
        if not len(own):
            raise ValueError(f"no document fits a window of {self.shape[1]} tokens")
        order: list[int] = self.random.permutation(own).tolist()
        return order
