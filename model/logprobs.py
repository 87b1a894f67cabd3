"""Raw log-probabilities: of the distribution as the network gives it, before whatever changes it for sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Logprobs

MAX_TOP = 20
"""Most alternatives a token can have."""
SLICE_ROWS = 64
"""Rows of logits that are looked at together: 100,000 ids in float32 and their log-softmax are 50 MiB."""


def logprobs_of(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """For each row of `logits` [R, V] float32: its token, then its `num_top` likeliest ids, with log-probabilities.

    Equal ones: the lowest id first, as the sampler chooses. A row that is not finite gives NaN for its token.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(num_top), MAX_TOP, logits.shape[1])
    top: list[list[tuple[int, float]]] = [[] for _ in token_ids]
    if most:
        # topk leaves open which of equal ones it takes, so that only its last value is of use. The width does not
        # depend on the neighbours' wishes either.
        last = logprobs.topk(most).values[:, -1:]
        rows, ids = (logprobs >= last).nonzero(as_tuple=True)
        values = logprobs[rows, ids].cpu().numpy()
        host_rows, host_ids = rows.cpu().numpy(), ids.cpu().numpy()
        order = np.lexsort((host_ids, -values, host_rows))
        for row, token_id, value in zip(
            host_rows[order].tolist(), host_ids[order].tolist(), values[order].tolist(), strict=True
        ):
            if len(top[row]) < min(num_top[row], most):
                top[row].append((token_id, value))
    return [
        ([token_id, *(i for i, _ in likeliest)], [logprob, *(x for _, x in likeliest)])
        for token_id, logprob, likeliest in zip(token_ids, own, top, strict=True)
    ]


def as_column(entries: Sequence[tuple[list[int], list[float]]]) -> Logprobs:
    return Logprobs([ids for ids, _ in entries], [values for _, values in entries])
