"""Raw log-probabilities: of the distribution as the network gives it, before whatever changes it for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Logprobs

MAX_TOP = 20
"""Most alternatives a token can have."""
SLICE_ROWS = 64
"""Rows of logits that are looked at together: 100,000 ids in float32 and their log-softmax are 50 MiB."""


class Scores(NamedTuple):
    """Of R tokens, wherever the logits were."""

    own: Tensor
    """[R] float32: log-probability of the token itself; NaN where its row is not finite."""
    ids: Tensor
    """[R, k] int64: the likeliest, in falling order; of equal ones the lowest id first, as the sampler chooses."""
    values: Tensor
    """[R, k] float32: their log-probabilities."""


def score(logits: Tensor, token_ids: Tensor, most: int) -> Scores:
    """For each row of `logits` [R, V] float32 its token (int64 [R]; below 0 is any) and at least `most` likeliest ids.

    Nothing here waits for the device.
    """
    # A constant width: what neighbours ask must not change what a row gets.
    width = min(MAX_TOP if most else 0, logits.shape[1])
    parts = zip(torch.split(logits, SLICE_ROWS), torch.split(token_ids.clamp(min=0), SLICE_ROWS), strict=True)
    return together([_score(part, chosen, width) for part, chosen in parts])


def _score(logits: Tensor, token_ids: Tensor, width: int) -> Scores:
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])[:, 0]
    # topk leaves open which of equal numbers it takes. Of these keys no two are equal: a number's place among all of
    # float32, then its id from behind.
    bits = (logprobs + 0.0).view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (order.long() << 32) | (0xFFFFFFFF - torch.arange(logits.shape[1], device=logits.device))
    likeliest = keys.topk(width).indices
    return Scores(own, likeliest, logprobs.gather(1, likeliest))


def together(parts: Sequence[Scores]) -> Scores:
    """One below the other."""
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def entries_of(scores: Scores, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Logprobs]:
    """Of each row by itself, on the host: its token, then its `num_top` likeliest ids, with log-probabilities."""
    return [
        Logprobs([[token_id, *ids[:count]]], [[own, *values[:count]]])
        for token_id, own, ids, values, count in zip(
            token_ids, scores.own.tolist(), scores.ids.tolist(), scores.values.tolist(), num_top, strict=True
        )
    ]


def column_of(scores: Scores, token_ids: Sequence[int], num_top: int) -> Logprobs:
    """Of consecutive tokens together, on the host."""
    column = Logprobs([], [])
    for entry in entries_of(scores, token_ids, [num_top] * len(token_ids)):
        column.extend(entry)
    return column
