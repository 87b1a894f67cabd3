"""How the next token of each row is chosen from its logits.

A draw is a function of (logits, parameters, seed, position) of its own row: id i runs for the time E_i / p_i, where
the E_i are exponential random numbers and functions of (seed, position, i), and the first to arrive is chosen, which
happens with probability p_i. There is no generator state, so neither neighbours in the batch nor a preemption change
a request's text. One uniform number and the cumulative distribution would give the same probabilities, but there a
change of the logits in their last bits, which other batch shapes bring about, moves every border between ids: with
100,000 ids and changes of 0.01, as bfloat16 has them, 39 % of the draws change; in the race 0.7 % do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import NONE_LEFT, NOT_FINITE

CANDIDATES = 512
"""Sorting a vocabulary of 100,000 costs ten times what finding its largest few hundred does, and those nearly always
hold all that top_p or min_p keep; where they do not, everything is sorted."""
SLICE_ELEMENTS = 1 << 19
"""Rows are drawn for in slices of this many logits: the float64 copies stay in a CPU's caches, several times faster."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Which ids one row may draw, and what is added to their logits. Empty arrays and None limit nothing."""

    index: int
    """Which of the S rows."""
    bitmask: bytes | None
    """One bit an id, little-endian: 1 where a grammar lets it come next."""
    allowed: NDArray[np.int64]
    """The only ids that can be drawn."""
    banned: NDArray[np.int64]
    biased: NDArray[np.int64]
    bias: NDArray[np.float32]
    """Added to the logits of `biased`; -inf bans."""


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Parameters of the S rows that sample in this step, in columns [S]."""

    temperature: NDArray[np.float64]
    """0 is greedy."""
    top_k: NDArray[np.int64]
    """0 is no limit."""
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Index the chosen token gets in its request."""
    repetition: NDArray[np.float64]
    """Divides positive and multiplies negative logits of every id in prompt and output; 1 is off."""
    presence: NDArray[np.float64]
    """Subtracted from the logits of every id in the output; 0 is off."""
    frequency: NDArray[np.float64]
    """Subtracted as often as the id occurs in the output; 0 is off."""
    row: NDArray[np.int64]
    """The line of `history` with each one's tokens: `num_prompt_tokens` of prompt, then output, up to `position`."""
    num_prompt_tokens: NDArray[np.int64]
    history: torch.Tensor
    """[N, L] int32, on the device of the logits; only penalties read it."""
    limits: list[Limits]
    """Only of rows that have any."""

    @property
    def penalised(self) -> NDArray[np.int64]:
        """Which of the S rows have any penalty."""
        return np.flatnonzero((self.repetition != 1.0) | (self.presence != 0.0) | (self.frequency != 0.0))


def sample(logits: torch.Tensor, inputs: SamplingInputs | None) -> torch.Tensor:
    """One token id for each row of `logits` [S, V] float32 (overwritten), int64 [S]; NOT_FINITE where a row has other
    numbers, NONE_LEFT where its limits exclude every id. None: every row is greedy, with neither limits nor penalties.

    Order: limits (grammar, allowed, banned, bias), then as transformers: penalties, temperature, top_k, top_p, min_p,
    draw. Equal logits: the lowest id first.
    """
    if inputs is None:
        return greedy(logits)
    finite = _are_finite(logits)
    constrain(logits, inputs)
    chosen = argmax(logits)
    drawn = np.flatnonzero(inputs.temperature > 0)
    slice_rows = max(1, SLICE_ELEMENTS // logits.shape[1])
    for first in range(0, drawn.size, slice_rows):
        rows = drawn[first : first + slice_rows]
        chosen[torch.from_numpy(rows).to(logits.device)] = draw(logits, inputs, rows)
    for limits in inputs.limits:
        if logits[limits.index].amax() == -torch.inf:
            chosen[limits.index] = NONE_LEFT
    return torch.where(finite, chosen, NOT_FINITE)


def constrain(logits: torch.Tensor, inputs: SamplingInputs) -> None:
    """Apply limits, then penalties, to `logits` [S, V] in place."""
    for limits in inputs.limits:
        limit(logits[limits.index], limits)
    for index in inputs.penalised.tolist():
        penalise(logits[index], inputs, index)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row [S, V], NOT_FINITE where not all are; int64 [S]."""
    return torch.where(_are_finite(logits), argmax(logits), NOT_FINITE)


def _are_finite(logits: torch.Tensor) -> torch.Tensor:
    """Which rows of [S, V] are finite everywhere; bool [S]."""
    return torch.isfinite(logits.amin(dim=-1)) & torch.isfinite(logits.amax(dim=-1))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row [S, V]; int64 [S]."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's is not: 12 times slower
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def draw(logits: torch.Tensor, inputs: SamplingInputs, rows: NDArray[np.int64]) -> torch.Tensor:
    """Ids [R] for the given R rows of `logits` [S, V], all with a temperature above 0."""
    device = logits.device
    weights = boltzmann(logits[torch.from_numpy(rows).to(device)], inputs.temperature[rows])
    truncate(weights, inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows])
    seed = torch.from_numpy(inputs.seed[rows].view(np.int64)).to(device)
    key = mix64(mix64(seed) ^ torch.from_numpy(inputs.position[rows]).to(device))
    return race(weights, key)


def limit(logits: torch.Tensor, limits: Limits) -> None:
    """Apply one row's limits to its logits [V] in place: what cannot be drawn gets -inf."""
    device = logits.device
    if limits.bitmask is not None:
        packed = np.frombuffer(limits.bitmask, np.uint8)
        bits = np.unpackbits(packed, count=logits.shape[0], bitorder="little").view(np.bool_)
        logits.masked_fill_(torch.from_numpy(~bits).to(device), -torch.inf)
    if limits.allowed.size:
        allowed = torch.from_numpy(limits.allowed).to(device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    if limits.banned.size:
        logits[torch.from_numpy(limits.banned).to(device)] = -torch.inf
    if limits.biased.size:
        logits[torch.from_numpy(limits.biased).to(device)] += torch.from_numpy(limits.bias).to(device)


def penalise(logits: torch.Tensor, inputs: SamplingInputs, index: int) -> None:
    """Apply one row's penalties to its logits [V] in place.

    Counts are taken from the row's tokens each time: a few hundred microseconds at 100,000 tokens or ids, and no
    counts that a preemption could lose.
    """
    tokens = inputs.history[inputs.row[index], : inputs.position[index]].cpu().numpy()
    repetition, presence, frequency = (
        float(column[index]) for column in (inputs.repetition, inputs.presence, inputs.frequency)
    )

    def counted(tokens: NDArray[np.int32]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = np.bincount(tokens, minlength=logits.shape[0])
        ids = np.flatnonzero(counts)
        return torch.from_numpy(ids).to(logits.device), torch.from_numpy(counts[ids]).to(logits.device)

    if repetition != 1.0:
        ids, _ = counted(tokens)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / repetition, seen * repetition)
    if presence or frequency:
        ids, counts = counted(tokens[inputs.num_prompt_tokens[index] :])
        logits[ids] -= presence + frequency * counts.float()


def boltzmann(logits: torch.Tensor, temperature: NDArray[np.float64]) -> torch.Tensor:
    """Unnormalised probabilities [R, V] float64, 1 at each row's mode.

    In float64 because sums over a vocabulary follow; the mode is subtracted first, so no temperature overflows.
    """
    below_mode = (logits - logits.amax(dim=-1, keepdim=True)).double()
    return below_mode.div_(torch.from_numpy(temperature).to(logits.device)[:, None]).exp_()


def truncate(
    weights: torch.Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float64], min_p: NDArray[np.float64]
) -> None:
    """Zero, in place, the weights [R, V] outside top_k, top_p (of what top_k left) and min_p (relative to the mode).

    Each of the three keeps a prefix of the ids in descending order, so the shortest prefix decides. At least one id
    stays: top_p keeps the id whose mass crosses it, as transformers and vLLM.
    """
    vocab_size = weights.shape[1]
    limit = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    restricted = np.flatnonzero((limit < vocab_size) | (top_p < 1.0) | (min_p > 0.0))
    if not restricted.size:
        return
    device = weights.device
    k = torch.from_numpy(limit[restricted]).to(device)[:, None]
    p = torch.from_numpy(top_p[restricted]).to(device)[:, None]
    floor = torch.from_numpy(min_p[restricted]).to(device)[:, None]
    index = torch.from_numpy(restricted).to(device)
    rows = weights if restricted.size == weights.shape[0] else weights[index]
    sizes = limit[restricted]
    width = min(vocab_size, max(CANDIDATES, int(sizes[sizes < vocab_size].max(initial=0)) + 1))
    kept, last = _prefix(rows, rows.topk(width).values, k, p, floor)
    deep = (kept >= width).flatten().nonzero().flatten()
    if width < vocab_size and deep.numel():
        ordered = rows[deep].sort(dim=-1, descending=True).values
        kept[deep], last[deep] = _prefix(rows[deep], ordered, k[deep], p[deep], floor[deep])
    inside = rows >= last
    if not torch.equal(inside.sum(dim=-1, keepdim=True), kept):
        tied = rows == last
        spare = kept - (rows > last).sum(dim=-1, keepdim=True)
        inside &= ~tied | (tied.cumsum(dim=-1) <= spare)
    weights[index] = rows * inside


def _prefix(
    rows: torch.Tensor, ordered: torch.Tensor, k: torch.Tensor, p: torch.Tensor, floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many ids stay [R, 1], counted along the largest weights `ordered` [R, width], and the last one's weight."""
    mass = ordered.cumsum(dim=-1)
    width = ordered.shape[1]
    total = torch.where(k <= width, mass.gather(1, (k - 1).clamp(max=width - 1)), rows.sum(dim=-1, keepdim=True))
    within_p = (mass < p * total).sum(dim=-1, keepdim=True) + 1
    within_p = torch.where(p < 1.0, within_p, width)
    within_floor = (ordered >= floor).sum(dim=-1, keepdim=True)
    kept = torch.minimum(torch.minimum(k, within_p), within_floor).clamp(1, width)
    return kept, ordered.gather(1, kept - 1)


def race(weights: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The id [R] that arrives first in each row of `weights` [R, V] float64; one of weight 0 never does."""
    if weights.count_nonzero() > weights.numel() // 4:
        ids = torch.arange(weights.shape[1], device=weights.device)
        return weights.div_(exponentials(key[:, None], ids)).argmax(dim=-1)
    rows, ids = weights.nonzero(as_tuple=True)
    speeds = torch.zeros_like(weights)
    speeds[rows, ids] = weights[rows, ids] / exponentials(key[rows], ids)
    return speeds.argmax(dim=-1)


def exponentials(key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-ln of output number `ids` of SplitMix64 seeded with `key`, as 53 bits between 0 and 1; int64, broadcast."""
    bits = mix64(key + (ids + 1) * GOLDEN_GAMMA)
    return _shift_(bits, 11).double().add_(0.5).mul_(2.0**-53).log_().neg_()


def mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014; constants of Vigna's splitmix64.c), on the bits of int64: torch multiplies modulo 2^64."""
    x = (x ^ _shift_(x.clone(), 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_(x.clone(), 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_(x.clone(), 31))


def _shift_(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift of int64, in place, as if it were unsigned."""
    return x.bitwise_right_shift_(bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
