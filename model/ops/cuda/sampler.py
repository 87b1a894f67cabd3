"""`model.sampler.sample` without the host waiting: limits and penalties are scattered, a Triton program a row chooses.

The choice is that of the twin, by the same race of exponential numbers. What top_k and top_p keep is not found by
sorting: the ids are ordered by how far below the largest logit theirs is, a float32 whose 32 bits are settled two at a
time, each time by one look at the row. The mass of top_p is summed from float32 exponentials: at its border an id may
be kept or not where the twin's float64 decides otherwise, if the two lie within a few 1e-7 of each other.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.batch import NONE_LEFT, NOT_FINITE
from model.sampler import Limits, SamplingInputs
from model.transfer import to_device

LOG2_E = tl.constexpr(1.4426950408889634)
_PENALISED_ROWS = 32
"""That are looked at together: counts of 100,000 ids take 12 MB each time."""
NO_NUMBERS = tl.constexpr(NOT_FINITE)
NO_TOKEN_LEFT = tl.constexpr(NONE_LEFT)
_FLOATS = ("temperature", "top_p", "min_p")


def sample(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    """As `model.sampler.sample`: logits [S, V] float32 (overwritten) -> int64 [S]."""
    device = logits.device
    num_rows, vocab_size = logits.shape
    finite = torch.isfinite(logits).all(dim=-1)
    if inputs.limits:
        _limit(logits, inputs.limits)
    penalised = inputs.penalised
    for first in range(0, penalised.size, _PENALISED_ROWS):
        _penalise(logits, inputs, penalised[first : first + _PENALISED_ROWS])
    floats = to_device(np.stack([getattr(inputs, name) for name in _FLOATS]), device)
    integers = to_device(np.stack([inputs.top_k, inputs.seed.view(np.int64), inputs.position]), device)
    chosen = torch.empty(num_rows, dtype=torch.int64, device=device)
    _choose[(num_rows,)](
        logits,
        finite,
        floats,
        integers,
        chosen,
        num_rows,
        VOCAB=vocab_size,
        BLOCK=min(4096, triton.next_power_of_2(vocab_size)),
        num_warps=16,
    )
    return chosen


def _limit(logits: Tensor, limits: list[Limits]) -> None:
    """What cannot be drawn gets -inf, in the twin's order: grammar, allowed, banned, bias."""
    device, vocab_size = logits.device, logits.shape[1]
    flat = logits.view(-1)
    masked = [(each.index, each.bitmask) for each in limits if each.bitmask is not None]
    if masked:
        width = -(-vocab_size // 8)
        bits = np.stack([np.frombuffer(mask, np.uint8, count=width) for _, mask in masked])
        rows = to_device(np.array([index for index, _ in masked], np.int64), device)
        block = min(4096, triton.next_power_of_2(vocab_size))
        _mask[(len(masked), triton.cdiv(vocab_size, block))](
            logits, to_device(bits, device), rows, VOCAB=vocab_size, WIDTH=width, BLOCK=block, num_warps=4
        )
    exclusive = [each for each in limits if each.allowed.size]
    if exclusive:
        allowed = to_device(np.concatenate([each.allowed + each.index * vocab_size for each in exclusive]), device)
        kept = flat.index_select(0, allowed)
        logits.index_fill_(0, to_device(np.array([each.index for each in exclusive], np.int64), device), -torch.inf)
        flat.index_copy_(0, allowed, kept)
    banned = np.concatenate([each.banned + each.index * vocab_size for each in limits])
    if banned.size:
        flat.index_fill_(0, to_device(banned, device), -torch.inf)
    biased = np.concatenate([each.biased + each.index * vocab_size for each in limits])
    if biased.size:
        at = to_device(biased, device)
        bias = to_device(np.concatenate([each.bias for each in limits]), device)
        flat.index_copy_(0, at, flat.index_select(0, at) + bias)


def _penalise(logits: Tensor, inputs: SamplingInputs, penalised: NDArray[np.int64]) -> None:
    """Rows `penalised` of the S, with counts taken from their tokens on the device."""
    device = logits.device
    lengths = inputs.position[penalised]
    lines, rows, ends, begins = to_device(
        np.stack([inputs.row[penalised], penalised, lengths, inputs.num_prompt_tokens[penalised]]), device
    )
    columns = np.stack([inputs.repetition[penalised], inputs.presence[penalised], inputs.frequency[penalised]])
    repetition, presence, frequency = to_device(columns.astype(np.float32)[..., None], device)
    tokens = inputs.history[:, : int(lengths.max())].index_select(0, lines)
    place = torch.arange(tokens.shape[1], device=device)
    own = place < ends[:, None]
    tokens = torch.where(own, tokens, 0).long()
    counts = torch.zeros((2, len(penalised), logits.shape[1]), dtype=torch.int32, device=device)
    counts[0].scatter_add_(1, tokens, own.int())
    counts[1].scatter_add_(1, tokens, (own & (place >= begins[:, None])).int())
    found = logits.index_select(0, rows)
    found = torch.where(counts[0] > 0, torch.where(found > 0, found / repetition, found * repetition), found)
    found = torch.where(counts[1] > 0, found - (presence + frequency * counts[1].float()), found)
    logits.index_copy_(0, rows, found)


@triton.jit
def _mask(
    logits: tl.tensor,
    bits: tl.tensor,
    rows: tl.tensor,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """bits [m, WIDTH] uint8, little-endian: 1 where an id may come next in the m rows."""
    row = tl.load(rows + tl.program_id(0))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    byte = tl.load(bits + tl.program_id(0).to(tl.int64) * WIDTH + token // 8, mask=inside, other=255)
    forbidden = ((byte >> (token % 8).to(tl.uint8)) & 1) == 0
    tl.store(logits + row * VOCAB + token, float("-inf"), mask=inside & forbidden)


@triton.jit
def _mix64(x: tl.tensor) -> tl.tensor:
    """The finaliser of SplitMix64 on the bits of int64; right shifts bring in zeros."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _below(source: tl.tensor, peak: tl.tensor, token: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """How far below the peak logits are, float32 and never -0; of ids that there are not: infinitely."""
    return tl.abs(peak - tl.load(source + token, mask=token < VOCAB, other=float("-inf")))


@triton.jit
def _share(below: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """exp(-below * rate) as float64, but computed in float32: an instruction of the chip."""
    return tl.exp2(tl.maximum(below * -(rate * LOG2_E), -1000.0).to(tl.float32)).to(tl.float64)


@triton.jit
def _settle(
    source: tl.tensor,
    peak: tl.tensor,
    target: tl.tensor,
    rate: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    MASS: tl.constexpr,
) -> tl.tensor:
    """The last key below which ids come to less than `target`, and to how much: in number or, with MASS, in weight."""
    found = tl.full((), 0, tl.uint32)
    before = tl.full((), 0.0, tl.float64)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        first = tl.zeros((BLOCK,), tl.float64)
        second = tl.zeros((BLOCK,), tl.float64)
        third = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            below = _below(source, peak, token, VOCAB)
            key = below.to(tl.uint32, bitcast=True)
            if MASS:
                share = _share(below, rate)
            else:
                share = (token < VOCAB).to(tl.float64)
            first += tl.where(key < found + unit, share, 0.0)
            second += tl.where(key < found + unit * 2, share, 0.0)
            third += tl.where(key < found + unit * 3, share, 0.0)
        one, two, three = tl.sum(first), tl.sum(second), tl.sum(third)
        if three < target:
            found += unit * 3
            before = three
        elif two < target:
            found += unit * 2
            before = two
        elif one < target:
            found += unit
            before = one
        unit >>= 2
    return found, before


@triton.jit(do_not_specialize=["num_rows"])
def _choose(
    logits: tl.tensor,
    finite: tl.tensor,
    floats: tl.tensor,
    integers: tl.tensor,
    chosen: tl.tensor,
    num_rows: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """floats [3, S] float64: temperature, top_p, min_p; integers [3, S] int64: top_k, seed, position."""
    row = tl.program_id(0)
    source = logits + row.to(tl.int64) * VOCAB
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.full((BLOCK,), VOCAB, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(source + token, mask=token < VOCAB, other=float("-inf"))
        better = logit > best
        best = tl.where(better, logit, best)
        winner = tl.where(better, token, winner)
    peak = tl.max(best, axis=0)
    result = tl.min(tl.where(best == peak, winner, VOCAB), axis=0)
    temperature = tl.load(floats + row)
    drawable = (tl.load(finite + row) != 0) & (peak > float("-inf"))
    if drawable & (temperature > 0.0):
        rate = tl.minimum(1.0 / temperature, 1e300)
        top_p = tl.load(floats + num_rows + row)
        min_p = tl.load(floats + 2 * num_rows + row)
        top_k = tl.load(integers + row)
        # Ids with smaller keys are kept, and of those with this one the first `spare`.
        last = tl.full((), 0xFFFFFFFF, tl.uint32)
        spare = tl.full((), VOCAB, tl.int64)
        if (top_k > 0) & (top_k < VOCAB):
            last, fewer = _settle(source, peak, top_k.to(tl.float64), rate, VOCAB, BLOCK, False)
            spare = top_k - fewer.to(tl.int64)
        if top_p < 1.0:
            sums = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, VOCAB, BLOCK):
                below = _below(source, peak, start + tl.arange(0, BLOCK), VOCAB)
                share = _share(below, rate)
                sums += tl.where(below.to(tl.uint32, bitcast=True) < last, share, 0.0)
            total = tl.sum(sums, axis=0)
            if last < 0x7F800000:  # else there is no mass at it
                total += spare * _share(last.to(tl.float32, bitcast=True), rate)
            cut, mass = _settle(source, peak, top_p * total, rate, VOCAB, BLOCK, True)
            if cut <= last:
                each = _share(cut.to(tl.float32, bitcast=True), rate)
                crossing = tl.maximum(tl.ceil((top_p * total - mass) / each), 1.0)
                within = tl.minimum(crossing, VOCAB * 1.0).to(tl.int64)
                spare = tl.where(cut == last, tl.minimum(spare, within), within)
                last = cut
        seed = tl.load(integers + num_rows + row)
        stream = _mix64(_mix64(seed) ^ tl.load(integers + 2 * num_rows + row))
        fastest = tl.full((BLOCK,), -1.0, tl.float64)
        equal = tl.full((), 0, tl.int64)
        for start in range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            below = _below(source, peak, token, VOCAB)
            key = below.to(tl.uint32, bitcast=True)
            tied = (key == last).to(tl.int32)
            order = equal + tl.cumsum(tied, axis=0)
            equal += tl.sum(tied, axis=0)
            weight = tl.exp(below.to(tl.float64) * -rate)
            kept = ((key < last) | ((tied > 0) & (order <= spare))) & (weight >= min_p) & (token < VOCAB)
            bits = _mix64(stream + (token + 1).to(tl.int64) * -7046029254386353131)
            uniform = (((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16
            speed = tl.where(kept, weight / -tl.log(uniform), -1.0)
            better = speed > fastest
            fastest = tl.where(better, speed, fastest)
            winner = tl.where(better, token, winner)
        result = tl.min(tl.where(fastest == tl.max(fastest, axis=0), winner, VOCAB), axis=0)
    result = tl.where(peak > float("-inf"), result, NO_TOKEN_LEFT)
    tl.store(chosen + row, tl.where(tl.load(finite + row) != 0, result, NO_NUMBERS).to(tl.int64))
