"""Drives the network by hand, as a scheduler would: rows, block tables and steps without a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.config import load_config
from model.deepseek import DeepseekForCausalLM
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.eager.ops import EagerOps
from model.ops.interface import LinearWeight, Ops
from tests.checkpoints import read_tensors

NUM_BLOCKS = 160

# Threads of tiny matrices only wait for each other, for milliseconds when the cores are busy.
torch.set_num_threads(1)


class GivenWeights:
    """`model.deepseek.Weights` out of tensors by the hub's names; each may be read once."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.unread, self.dtype = dict(tensors), dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.unread.pop(name).to(dtype or self.dtype, copy=True)

    def packed(self, name: str, pack: Callable[[], Sequence[LinearWeight]]) -> Sequence[LinearWeight]:
        return pack()


def load_model(path: Path, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> DeepseekForCausalLM:
    """The network with a checkpoint's weights, without the streaming loader: in float32 by plain torch, or so."""
    config = load_config(path)
    return DeepseekForCausalLM(config, ops or EagerOps(), GivenWeights(read_tensors(path), dtype))


@dataclass
class Row:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class Driver:
    """A cache full of NaN (whatever is read before it is written shows) and free blocks in random order."""

    def __init__(
        self, model: DeepseekForCausalLM, num_blocks: int = NUM_BLOCKS, seed: int = 0, fp8_cache: bool = False
    ) -> None:
        config = model.config
        self.model = model
        dtype = model.model.norm.weight.dtype
        self.cache = LatentCache(
            num_blocks,
            config.num_hidden_layers,
            config.latent_dim,
            dtype,
            fp8_latents=config.kv_lora_rank if fp8_cache else 0,
        )
        self.cache.data.view(torch.uint8).fill_(255)  # NaN
        generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_blocks, generator=generator).tolist()

    def step(self, work: Sequence[tuple[Row, int]]) -> list[Tensor]:
        """Runs the next `n` tokens of each row, all in one batch; log-probabilities [n, V] of each."""
        inputs = self.inputs(work)
        hidden = self.model(inputs, self.cache)
        assert hidden.shape[0] == inputs.num_tokens
        logprobs = self.model.logits(hidden).log_softmax(-1)
        for row, num_tokens in work:
            row.num_computed += num_tokens
        return list(logprobs.split([n for _, n in work]))

    def inputs(self, work: Sequence[tuple[Row, int]]) -> StepInputs:
        """Of a step of the next `n` tokens of each row, which gets blocks for them; the last ones are sampled."""
        for row, num_tokens in work:
            while len(row.blocks) * BLOCK_SIZE < row.num_computed + num_tokens:
                row.blocks.append(self.free.pop())
        spans = [(row, range(row.num_computed, row.num_computed + n)) for row, n in work]
        query_start = [0]
        for _, span in spans:
            query_start.append(query_start[-1] + len(span))
        tables = torch.full((len(work), max(len(row.blocks) for row, _ in work)), 10**6, dtype=torch.int32)
        for i, (row, _) in enumerate(spans):
            tables[i, : len(row.blocks)] = torch.tensor(row.blocks)
        return StepInputs(
            token_ids=torch.tensor([row.tokens[i] for row, span in spans for i in span]),
            positions=torch.tensor([i for _, span in spans for i in span]),
            slot_mapping=torch.tensor(
                [row.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for row, span in spans for i in span]
            ),
            query_start=query_start,
            context_lens=[span.stop for _, span in spans],
            block_tables=tables,
            sample_index=torch.tensor(query_start[1:]) - 1,
        )

    def run(self, tokens: list[int], chunk: int) -> Tensor:
        """A whole prompt alone, in chunks; log-probabilities of all positions [T, V]."""
        row = Row(tokens)
        parts = [self.step([(row, min(chunk, len(tokens) - start))])[0] for start in range(0, len(tokens), chunk)]
        self.release(row)
        return torch.cat(parts)

    def release(self, row: Row) -> None:
        self.free += row.blocks
        row.blocks = []


def random_tokens(num: int, vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(seed)).tolist()
