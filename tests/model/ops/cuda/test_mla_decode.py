"""Absorbed attention over the paged cache against softmax attention in float64, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.mla_decode import decode_work, lines_of_a_tile, mla_decode, num_items
from tests.model.ops.cuda.common import DEVICE, DTYPES, TOLERANCE, poisoned, randn, relative_error

LAYERS, LAYER = 2, 1
SCALE = 0.11


class Case:
    """Rows of (query tokens, context length) over a cache that is NaN wherever no key of theirs lies."""

    def __init__(
        self,
        heads: int,
        rank: int,
        rope: int,
        rows: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        padding: int = 0,
        fp8: bool = False,
    ) -> None:
        counts = [-(-context // BLOCK_SIZE) for _, context in rows]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(3)).tolist()
        self.rows, self.rank = list(rows), rank
        self.queries = [queries for queries, _ in rows]
        self.contexts = [context for _, context in rows]
        self.tables = torch.full((len(rows), max(counts) + 1), -(1 << 30), dtype=torch.int32, device=DEVICE)
        self.cache = LatentCache(len(order), LAYERS, rank + rope, dtype, DEVICE, fp8_latents=rank if fp8 else 0)
        self.cache.data.view(torch.uint8).fill_(255)  # NaN
        self.keys = [randn(context, rank + rope, seed=9 + i, dtype=dtype) for i, context in enumerate(self.contexts)]
        for row, keys in enumerate(self.keys):
            for page in range(counts[row]):
                block = self.tables[row, page] = order.pop()
                piece = keys[page * BLOCK_SIZE : (page + 1) * BLOCK_SIZE]
                lines = (block * LAYERS + LAYER) * BLOCK_SIZE + torch.arange(len(piece), device=DEVICE)
                self.cache.write(lines, piece[:, :rank], piece[:, rank:])
                piece.copy_(self.cache.read(lines))
        self.tokens = sum(self.queries) + padding
        # As a batched product over heads leaves them, and between the other numbers of a head.
        self.q_latent = randn(heads, self.tokens, rank, seed=1, dtype=dtype).transpose(0, 1) / rank**0.25
        self.q_rope = randn(self.tokens, heads, rope + 8, seed=2, dtype=dtype)[..., 8:]
        self.query_start = torch.tensor([0, *self.queries], device=DEVICE).cumsum(0).int()

    def found(self, split_pages: int, spare_items: int = 0, spare_rows: int = 0) -> Tensor:
        """[n, H, r]; with more rows and items than there are, as a captured step has them."""
        heads = self.q_latent.shape[1]
        block = lines_of_a_tile(heads, max(self.queries), self.q_latent.device)
        items = num_items(self.queries, self.contexts, heads, block, split_pages)
        pad = torch.nn.functional.pad
        work = decode_work(
            torch.cat((self.query_start, self.query_start[-1:].repeat(spare_rows))),
            pad(torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE), (0, spare_rows)),
            pad(self.tables, (0, 0, 0, spare_rows), value=1 << 30),
            tokens=self.tokens,
            items=items + spare_items,
            heads=heads,
            block=block,
            split_pages=split_pages,
        )
        assert int(work.first_item[-1]) == items
        with poisoned():
            return mla_decode(self.q_latent, self.q_rope, self.cache, LAYER, work, SCALE).transpose(0, 1)

    def exact(self) -> Tensor:
        outputs = []
        for row, (queries, context) in enumerate(self.rows):
            keys = self.keys[row].double()
            for query in range(queries):
                token = int(self.query_start[row]) + query
                seen = keys[: context - queries + query + 1]
                q = torch.cat((self.q_latent[token], self.q_rope[token]), dim=1).double()
                outputs.append((q @ seen.T * SCALE).softmax(-1) @ seen[:, : self.rank])
        return torch.stack(outputs)


RAGGED = [(1, 1), (1, 64), (1, 65), (1, 700), (1, 128), (1, 333)]
MIXED = [(1, 200), (5, 5), (9, 130), (1, 1), (70, 70), (2, 129)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rows"), [(16, RAGGED), (3, MIXED), (64, RAGGED[:3]), (128, [(1, 65), (2, 140)])])
def test_mla_decode(heads: int, rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
    case = Case(heads, 32, 16, rows, dtype)
    assert relative_error(case.found(split_pages=2), case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [227 << 10, 99 << 10])
@pytest.mark.parametrize(("heads", "rows"), [(16, RAGGED), (3, MIXED), (64, RAGGED[1:3]), (128, [(1, 65), (2, 140)])])
def test_latents_in_8_bits(
    heads: int, rows: list[tuple[int, int]], memory: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page at a time, or half of one where there is little shared memory; rounded latents are exact."""
    monkeypatch.setattr("model.ops.cuda.mla_decode.shared_memory", lambda _: memory)
    case = Case(heads, 32, 16, rows, dtype, fp8=True)
    assert relative_error(case.found(split_pages=2), case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("fp8", [False, True])
def test_widths_of_the_family(fp8: bool) -> None:
    case = Case(16, 512, 64, [(1, 70), (1, 3)], torch.float16, fp8=fp8)
    assert relative_error(case.found(split_pages=1), case.exact()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("fp8", [False, True])
def test_widths_that_are_no_powers_of_two(fp8: bool) -> None:
    case = Case(5, 40, 24, [(3, 70)], torch.float32, fp8=fp8)
    assert relative_error(case.found(split_pages=1), case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("fp8", [False, True])
def test_padding_gets_zeros_and_changes_nothing(fp8: bool) -> None:
    case = Case(16, 32, 16, RAGGED[:4], torch.float32, fp8=fp8)
    padded = Case(16, 32, 16, RAGGED[:4], torch.float32, padding=3, fp8=fp8)
    padded.q_latent, padded.q_rope = (
        torch.cat((x, torch.full_like(x[:3], torch.nan))) for x in (case.q_latent, case.q_rope)
    )
    found = padded.found(split_pages=2, spare_items=5, spare_rows=3)
    assert found[-3:].eq(0).all()
    assert torch.equal(found[:-3], case.found(split_pages=2))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(fp8: bool) -> None:
    together = Case(16, 32, 16, [*RAGGED, (4, 300)], torch.float16, fp8=fp8)
    alone = Case(16, 32, 16, [*RAGGED, (4, 300)], torch.float16, fp8=fp8)
    alone.queries, alone.contexts, alone.tables = [4], [300], together.tables[-1:]
    alone.query_start = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    alone.q_latent, alone.q_rope, alone.tokens = together.q_latent[-4:], together.q_rope[-4:], 4
    assert torch.equal(alone.found(split_pages=2), together.found(split_pages=2)[-4:])
