"""The attention kernels against softmax attention in float32, on what bf16 holds of the inputs."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.latent_cache import BLOCK_SIZE
from model.ops.cpu.library import AttentionShape, Format, Library, library
from tests.model.ops.test_cpu_linear import unpack

LAYERS, LAYER = 2, 1


class Widths(NamedTuple):
    heads: int
    rank: int
    rope: int
    nope: int
    value: int


NARROW = Widths(3, 24, 8, 16, 8)
ODD = Widths(5, 136, 24, 72, 40)
SMALL = Widths(16, 256, 32, 64, 64)
V2_LITE = Widths(16, 512, 64, 128, 128)
ODD_GROUPS = Widths(5, 160, 24, 96, 40)
MANY_HEADS = Widths(128, 64, 16, 32, 16)

Row = tuple[int, int]
"""Query tokens, context length."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Case:
    """Rows over a cache of two layers that holds NaN wherever no key of theirs lies."""

    def __init__(
        self,
        widths: Widths,
        rows: tuple[Row, ...],
        num_blocks: int | None = None,
        format: Format = Format.BF16,
    ) -> None:
        """num_blocks: blocks that rows share, so that the cache of long contexts is small; else each has its own."""
        heads, rank, rope, nope, value = widths
        self.widths, self.rows, self.format = widths, rows, format
        used = [-(-context // BLOCK_SIZE) for _, context in rows]
        generator = torch.Generator().manual_seed(9)
        if num_blocks is None:
            num_blocks = sum(used) + 3
            order = torch.randperm(num_blocks, generator=generator)[: sum(used)]
        else:
            order = torch.randint(num_blocks, (sum(used),), generator=generator)
        self.tables = torch.full((len(rows), max(used) + 1), -(1 << 30), dtype=torch.int32)
        self.cache = torch.full((num_blocks, LAYERS, BLOCK_SIZE, rank + rope), torch.nan, dtype=torch.bfloat16)
        latents = randn(num_blocks, BLOCK_SIZE, rank + rope, seed=1)
        for row, blocks in enumerate(torch.split(order, used)):
            self.tables[row, : len(blocks)] = blocks
            whole, rest = divmod(rows[row][1], BLOCK_SIZE)
            self.cache[blocks[:whole], LAYER] = latents[blocks[:whole]]
            if rest:
                self.cache[blocks[whole], LAYER, :rest] = latents[blocks[whole], :rest]
        # As the query projection leaves them: both parts of a head beside each other, other numbers behind them.
        self.queries = randn(sum(queries for queries, _ in rows), heads, nope + rope + 8, seed=2) * 1.5
        self.w_uk = (randn(heads, nope, rank, seed=3) * rank**-0.5).bfloat16()
        self.w_uv = (randn(heads, value, rank, seed=4) * rank**-0.5).bfloat16()
        self.scale = (nope + rope) ** -0.5
        self.starts = [sum(queries for queries, _ in rows[:row]) for row in range(len(rows) + 1)]

    def alone(self, row: int) -> Case:
        """The same row, over the same cache."""
        single = Case.__new__(Case)
        single.__dict__.update(self.__dict__)
        single.rows, single.tables = self.rows[row : row + 1], self.tables[row : row + 1]
        single.queries = self.queries[self.starts[row] : self.starts[row + 1]]
        return single

    def found(self, kernels: Library) -> Tensor:
        """[T, H, dv], with a workspace that is NaN whatever it is read as."""
        heads, rank, rope, nope, value = self.widths
        counts, contexts = zip(*self.rows, strict=True)
        query_start = torch.tensor([0, *counts]).cumsum(0).int()
        context_lens = torch.tensor(contexts, dtype=torch.int32)
        q_nope, q_rope = self.queries[..., :nope], self.queries[..., nope : nope + rope]
        shape = AttentionShape(
            *(len(counts), sum(counts), query_start.data_ptr(), context_lens.data_ptr(), self.tables.data_ptr()),
            *(self.tables.shape[1], self.cache.data_ptr(), LAYERS, BLOCK_SIZE, heads, rank, rope, nope, value),
            self.scale,
        )
        size = kernels.attention_workspace(shape)
        workspace = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
        output = torch.full((sum(counts), heads, value), torch.nan, dtype=torch.bfloat16)
        absorbing = Format.BF16 if self.format is Format.BF16 else Format.INT8_INPUTS
        absorb = packed(kernels, absorbing, self.w_uk.transpose(1, 2))
        expand, w_uv = packed(kernels, self.format, self.w_uk), packed(kernels, self.format, self.w_uv)
        # A workspace may begin anywhere.
        kernels.attention(self.format, shape, LAYER, q_nope, q_rope, absorb, expand, w_uv, output, workspace[4:])
        assert (workspace[size + 4 :] == 0xFF).all()
        return output

    def expected(self, row: int, tokens: Tensor) -> Tensor:
        """[tokens, H, dv] of some tokens of a row."""
        _, rank, rope, nope, _ = self.widths
        w_uk, w_uv = (meant(self.format, weight) for weight in (self.w_uk, self.w_uv))
        queries, context = self.rows[row]
        pages = self.cache[self.tables[row, : -(-context // BLOCK_SIZE)].long(), LAYER]
        latents, shared = torch.split(pages.flatten(0, 1)[:context].float(), [rank, rope], dim=1)
        mine = self.queries[self.starts[row] + tokens].float()
        scores = torch.einsum("qhd,hdr->qhr", mine[..., :nope], w_uk) @ latents.T
        scores += mine[..., nope : nope + rope] @ shared.T
        hidden = torch.arange(context) > (context - queries + tokens)[:, None]
        weights = (scores * self.scale).masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
        return torch.einsum("qhr,hdr->qhd", weights @ latents, w_uv)


@cache
def case(
    widths: Widths, rows: tuple[Row, ...], num_blocks: int | None = None, format: Format = Format.BF16
) -> tuple[Case, list[tuple[Tensor, Tensor]]]:
    """A case, and what some tokens of each row should have: which of the step they are, and [tokens, H, dv]."""
    made = Case(widths, rows, num_blocks, format)
    chosen = [torch.linspace(0, queries - 1, min(queries, 16)).round().long() for queries, _ in rows]
    return made, [(made.starts[row] + tokens, made.expected(row, tokens)) for row, tokens in enumerate(chosen)]


def packed(kernels: Library, format: Format, weight: Tensor) -> Tensor:
    """[H, N, K], each head by itself."""
    data = torch.empty(len(weight), kernels.packed_bytes(format, *weight.shape[1:]), dtype=torch.uint8)
    for head, target in zip(weight, data, strict=True):
        kernels.pack(format, head.T.contiguous() if format is Format.INT8_INPUTS else head.contiguous(), target)
    return data


def meant(format: Format, weight: Tensor) -> Tensor:
    """[H, N, K] float32: what packed weights stand for."""
    kernels = library()
    assert kernels is not None
    heads = zip(packed(kernels, format, weight), weight, strict=True)
    return torch.stack([unpack(format, data, *head.shape) for data, head in heads])


BOUNDS = {Format.BF16: 0.006, Format.INT8: 0.015}
"""bf16 rounds queries or keys, probabilities, sums and results to 2^-9. Weights in int8 want what they are multiplied
with in 8 bits, a scale for 64: half a percent, of keys and of values or of queries and of sums."""


def check(
    kernels: Library, widths: Widths, *rows: Row, num_blocks: int | None = None, format: Format = Format.BF16
) -> None:
    made, rows_expected = case(widths, rows, num_blocks, format)
    found = made.found(kernels)
    assert found.isfinite().all()
    for tokens, expected in rows_expected:
        error = (found[tokens].float() - expected).norm() / expected.norm()
        assert error < BOUNDS[format]


STEPS: dict[str, tuple[Row, ...]] = {
    "decode": ((1, 65), (1, 64), (1, 63), (1, 1), (1, 1000), (1, 2), (1, 512), (1, 513)),
    "prompts": ((2, 2), (64, 64), (150, 150), (65, 65)),
    "short chunks on prefixes": ((2, 300), (7, 1100), (3, 70)),
    "long chunks on prefixes": ((200, 330), (333, 900)),
    "mixed": ((1, 64), (70, 70), (1, 129), (5, 600), (1, 128), (180, 250), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("widths", [NARROW, ODD, SMALL], ids=["narrow", "odd", "small"])
def test_attention(kernels: Library, widths: Widths, rows: tuple[Row, ...]) -> None:
    check(kernels, widths, *rows)


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_weights_in_8_bits(kernels: Library, rows: tuple[Row, ...]) -> None:
    check(kernels, ODD_GROUPS, *rows, format=Format.INT8)


@pytest.mark.parametrize("format", BOUNDS)
def test_real_widths(kernels: Library, format: Format) -> None:
    check(kernels, V2_LITE, (1, 200), (1, 1), (130, 130), (6, 120), format=format)


def test_many_heads(kernels: Library) -> None:
    """More than 64 make several groups of a token's heads; all these rows do not fit in the workspace at once."""
    check(kernels, MANY_HEADS, *((1, 1 + i) for i in range(66)), (3, 200), (40, 40))


def test_a_long_prompt_takes_several_turns_of_heads(kernels: Library) -> None:
    if kernels.isa == "portable":
        pytest.skip("nothing that depends on the instruction set, and slow")
    check(kernels, Widths(34, 64, 8, 16, 8), (2000, 2000))


def test_a_long_context_has_longer_splits(kernels: Library) -> None:
    check(kernels, NARROW, (1, 131_072), (1, 32_768), (1, 32_769), (20, 50_001), num_blocks=12)


@pytest.mark.parametrize(("widths", "format"), [(NARROW, Format.BF16), (ODD_GROUPS, Format.INT8)])
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(
    kernels: Library, widths: Widths, format: Format
) -> None:
    rows = tuple(STEPS["mixed"][i % 8] for i in range(4)) + tuple((1, 40 * i + 1) for i in range(28))
    batch, _ = case(widths, rows, format=format)
    together = batch.found(kernels)
    kernels.set_threads(1)
    assert torch.equal(together, batch.found(kernels))
    for row in range(len(rows)):
        assert torch.equal(together[batch.starts[row] : batch.starts[row + 1]], batch.alone(row).found(kernels))


def test_a_short_chunk_is_as_many_decoding_steps(kernels: Library) -> None:
    """Bit by bit: what speculation verifies is what decoding would have computed."""
    for widths, context, num_blocks, format in (
        (SMALL, 1029, None, Format.BF16),
        (SMALL, 200, None, Format.INT8),
        (NARROW, 10, None, Format.BF16),
        (NARROW, 32_771, 12, Format.BF16),
    ):
        chunk = Case(widths, ((9, context),), num_blocks, format)
        steps = chunk.alone(0)
        steps.rows = tuple((1, context - 8 + i) for i in range(9))
        steps.tables = chunk.tables.repeat(9, 1)
        steps.starts = list(range(10))
        assert torch.equal(chunk.found(kernels), steps.found(kernels)), context


@pytest.mark.parametrize(("widths", "format"), [(NARROW, Format.BF16), (ODD_GROUPS, Format.INT8)])
@pytest.mark.parametrize("rows", [((1, 700),), ((150, 150),)], ids=["absorbed", "expanded"])
def test_what_is_not_a_number_stays_in_its_row(
    kernels: Library, rows: tuple[Row, ...], widths: Widths, format: Format
) -> None:
    """A broken query or latent shows in its own row, and in no other."""
    clean, _ = case(widths, (*rows, (1, 90)), format=format)
    broken = clean.alone(0)
    broken.rows, broken.tables, broken.queries = clean.rows, clean.tables, clean.queries.clone()
    broken.queries[0, 1, 0] = torch.nan
    found, expected = broken.found(kernels), clean.found(kernels)
    assert found[0, 1].isnan().all()
    found[0, 1] = expected[0, 1]
    assert torch.equal(found, expected)
