"""Decoding steps as CUDA graphs: the host launches the network once for each size, and one graph a step after that.

A step of n rows runs as the next larger size; the rows it does not have are padding, which attends to nothing, is
routed to no expert and writes nothing to the cache. Other steps (prompts, drafts) run as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.attention import DeviceRows
from model.ops.cuda.mla_decode import lines_of_a_tile, num_items, pages_of_a_split
from model.ops.interface import Network

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PARTIAL_BYTES = 256 << 20
"""Of what attention leaves of contexts that are cut; steps that would leave more are not captured."""


class _Buffers:
    """What a graph reads, at the largest size; smaller ones use the beginning."""

    def __init__(self, max_blocks: int, device: torch.device) -> None:
        rows = SIZES[-1]
        self.token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slot_mapping = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.query_start = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((rows, max_blocks), dtype=torch.int32, device=device)
        self.count = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.every_row = torch.arange(rows, device=device)

    def fill(self, inputs: StepInputs, size: int) -> None:
        rows = inputs.num_rows
        self.token_ids[:rows].copy_(inputs.token_ids)
        self.positions[:rows].copy_(inputs.positions)
        self.slot_mapping[:rows].copy_(inputs.slot_mapping)
        self.slot_mapping[rows:size].fill_(-1)
        torch.clamp(self.count, max=rows, out=self.query_start)
        self.context_lens[:rows].copy_(inputs.positions + 1)
        self.context_lens[rows:size].fill_(0)
        width = min(inputs.block_tables.shape[1], self.block_tables.shape[1])
        self.block_tables[:rows, :width].copy_(inputs.block_tables[:, :width])


class DecodeGraphs:
    """A `Network` that replays, on the cache of its first call; what it returns is overwritten by the next one."""

    def __init__(
        self,
        network: Network,
        config: DeepseekConfig,
        on_device: Callable[[DeviceRows], AbstractContextManager[None]],
    ) -> None:
        """Within `on_device(rows)` the network runs without asking the host for lengths."""
        self._network, self._config, self._on_device = network, config, on_device
        self._buffers: _Buffers | None = None
        self._replays: dict[int, Callable[[], tuple[Tensor, Tensor]]] = {}
        self._pool: Any = None

    def __call__(self, inputs: StepInputs, cache: LatentCache) -> tuple[Tensor, Tensor]:
        size = self.size_of(inputs, cache.data.device)
        if size is None:
            return self._network(inputs, cache)
        if self._buffers is None:
            longest = -(-self._config.max_position_embeddings // BLOCK_SIZE)
            self._buffers = _Buffers(min(cache.num_blocks, longest), cache.data.device)
        self._buffers.fill(inputs, size)
        if size not in self._replays:
            self._replays[size] = self._capture(size, cache)
        hidden, logits = self._replays[size]()
        rows = inputs.num_rows
        return hidden[:rows], logits[:rows] if len(inputs.sample_index) == rows else logits[inputs.sample_index]

    def size_of(self, inputs: StepInputs, device: torch.device) -> int | None:
        """The size that a step is replayed at; None where it is not."""
        rows = inputs.num_rows
        if inputs.num_tokens != rows or rows > SIZES[-1]:
            return None
        size = next(size for size in SIZES if size >= rows)
        heads, split_pages = self._config.num_attention_heads, pages_of_a_split(size)
        items = num_items([1] * rows, inputs.context_lens, heads, lines_of_a_tile(heads, 1, device), split_pages)
        return size if items <= self._most_items(size, device) else None

    def _most_items(self, size: int, device: torch.device) -> int:
        """Room for one split of every row whatever it takes, and for more within PARTIAL_BYTES."""
        heads = self._config.num_attention_heads
        block = lines_of_a_tile(heads, 1, device)
        tiles = -(-heads // block)
        splits = -(-self._config.max_position_embeddings // (pages_of_a_split(size) * BLOCK_SIZE))
        room = PARTIAL_BYTES // (block * self._config.kv_lora_rank * 4)
        return size * tiles * max(1, min(splits, room // (size * tiles)))

    def region(self, size: int, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """What is captured: launches only, on the buffers."""
        buffers = self._buffers
        assert buffers is not None
        rows = DeviceRows(
            buffers.query_start[: size + 1],
            buffers.context_lens[:size],
            buffers.block_tables[:size],
            self._most_items(size, cache.data.device),
        )
        inputs = StepInputs(
            token_ids=buffers.token_ids[:size],
            positions=buffers.positions[:size],
            slot_mapping=buffers.slot_mapping[:size],
            query_start=list(range(size + 1)),
            context_lens=[],  # the device's count
            block_tables=rows.block_tables,
            sample_index=buffers.every_row[:size],
        )
        with self._on_device(rows):
            return self._network(inputs, cache)

    def _capture(self, size: int, cache: LatentCache) -> Callable[[], tuple[Tensor, Tensor]]:
        if cache.data.device.type != "cuda":  # the interpreter of the kernels' tests: launched anew each time
            return lambda: self.region(size, cache)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.region(size, cache)  # compiles the kernels: not possible while capturing
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self.region(size, cache)
        self._pool = self._pool or graph.pool()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay
