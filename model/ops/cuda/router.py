"""The choice of experts as one Triton kernel: what is between logits and choice never leaves registers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.config import DeepseekConfig
from model.ops.interface import Routing


def router(
    x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig, num_tokens: Tensor | None = None
) -> Routing:
    """As `Ops.router`. Equal scores: the lowest expert first. Scores that are not numbers choose the first experts.

    num_tokens [1] int32: tokens behind so many are padding, whose experts are -1.
    """
    logits = F.linear(x.float(), weight)
    tokens, experts = logits.shape
    per_token = config.num_experts_per_tok
    chosen = torch.empty((tokens, per_token), dtype=torch.int32, device=x.device)
    weights = torch.empty((tokens, per_token), dtype=torch.float32, device=x.device)
    groups = config.n_group if config.topk_method != "greedy" else 1
    _route[(tokens,)](
        logits,
        logits if correction_bias is None else correction_bias,
        chosen if num_tokens is None else num_tokens,
        chosen,
        weights,
        config.routed_scaling_factor,
        EXPERTS=experts,
        PER_TOKEN=per_token,
        GROUPS=groups,
        KEPT_GROUPS=config.topk_group,
        SIGMOID=config.scoring_func == "sigmoid",
        BIASED=correction_bias is not None,
        PADDED=num_tokens is not None,
        GROUP_BY_TWO=config.topk_method == "noaux_tc",
        NORMALISE=config.norm_topk_prob and per_token > 1,
        BLOCK_GROUPS=triton.next_power_of_2(groups),
        BLOCK_EXPERTS=triton.next_power_of_2(experts // groups),
        BLOCK_CHOSEN=triton.next_power_of_2(per_token),
        num_warps=1 if experts <= 64 else 2,
    )
    return Routing(chosen, weights)


@triton.jit
def _best(choice: tl.tensor, free: tl.tensor, number: tl.tensor) -> tl.tensor:
    """The lowest of the numbers that are free and have the largest choice; all three [G, N]."""
    largest = tl.max(tl.max(tl.where(free, choice, float("-inf")), axis=1), axis=0)
    best = free & (choice == largest)
    return tl.min(tl.min(tl.where(best, number, 1 << 30), axis=1), axis=0)


@triton.jit
def _route(
    logits: tl.tensor,
    bias: tl.tensor,
    num_tokens: tl.tensor,
    chosen: tl.tensor,
    weights: tl.tensor,
    scaling: tl.tensor,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_BY_TWO: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
) -> None:
    """One program a token; experts as [groups, experts of a group]."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)[:, None]
    member = tl.arange(0, BLOCK_EXPERTS)[None, :]
    free = (group < GROUPS) & (member < EXPERTS // GROUPS)
    number = group * (EXPERTS // GROUPS) + member
    score = tl.load(logits + token * EXPERTS + number, mask=free, other=float("-inf"))
    score = tl.where(score == score, score, 0.0)  # a maximum of NaN is another thing on every machine
    if SIGMOID:
        score = tl.sigmoid(score)
    else:
        score = tl.exp(score - tl.max(tl.max(score, axis=1), axis=0))
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    choice = score
    if BIASED:
        choice += tl.load(bias + number, mask=free, other=0.0)
    choice = tl.where(choice == choice, choice, float("-inf"))  # of infinite logits: NaN would choose no expert

    if GROUPS > 1:
        masked = tl.where(free, choice, float("-inf"))
        of_group = tl.max(masked, axis=1)[:, None]
        if GROUP_BY_TWO:
            first = tl.min(tl.where(free & (choice == of_group), number, 1 << 30), axis=1)[:, None]
            of_group += tl.max(tl.where(number == first, float("-inf"), masked), axis=1)[:, None]
        waiting = group < GROUPS
        for _ in tl.static_range(KEPT_GROUPS):
            waiting = waiting & (group != _best(of_group, waiting, group))
        free = free & ((group < GROUPS) & (waiting == 0))

    place = tl.arange(0, BLOCK_CHOSEN)
    found = tl.zeros((BLOCK_CHOSEN,), tl.int32)
    gains = tl.zeros((BLOCK_CHOSEN,), tl.float32)
    for i in tl.static_range(PER_TOKEN):
        best = _best(choice, free, number)
        gain = tl.sum(tl.sum(tl.where(number == best, score, 0.0), axis=1), axis=0)
        found = tl.where(place == i, best, found)
        gains = tl.where(place == i, gain, gains)
        free = free & (number != best)
    if NORMALISE:
        gains = gains / (tl.sum(gains) + 1e-20)
    if PADDED:
        found = tl.where(token < tl.load(num_tokens), found, -1)
    target = token * PER_TOKEN + place
    tl.store(chosen + target, found, mask=place < PER_TOKEN)
    tl.store(weights + target, gains * scaling, mask=place < PER_TOKEN)
