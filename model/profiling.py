"""Steps that are run for what they take, before there are requests: all their positions share block 0, and what they
compute means nothing.
"""

from __future__ import annotations

from array import array

from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.latent_cache import BLOCK_SIZE

_EVERYTHING = SamplingParams(max_tokens=1, top_p=0.9, repetition_penalty=1.1, logprobs=20)
"""Whatever of sampling takes memory."""


def prompt_step(num_tokens: int, context: int) -> ForwardBatch:
    """The last `num_tokens` tokens of a prompt of `context`, on row 0 and block 0."""
    new = _new_row(0, context)
    return ForwardBatch(-1, [ScheduledRow(0, context - num_tokens, num_tokens, sample=True)], [new])


def decode_step(num_rows: int) -> ForwardBatch:
    """A token of each of so many rows, on block 0."""
    rows = range(num_rows)
    return ForwardBatch(-1, [ScheduledRow(row, 1, 1, sample=True) for row in rows], [_new_row(row, 2) for row in rows])


def _new_row(row: int, num_tokens: int) -> NewRow:
    blocks = [0] * -(-num_tokens // BLOCK_SIZE)
    return NewRow(row, array("I", bytes(4 * num_tokens)), num_tokens, _EVERYTHING, blocks)
