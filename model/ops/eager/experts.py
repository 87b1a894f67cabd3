"""Router and mixture of experts in plain torch (DeepSeek-V2, arXiv 2405.04434, 2.2; V3, arXiv 2412.19437, 2.1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.ops.eager.linear import linear
from model.ops.interface import PackedWeight, Routing, SwigluWeights, unpacked


def mlp(x: Tensor, weights: SwigluWeights) -> Tensor:
    gate, up = linear(x, unpacked(weights.gate_up)).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, unpacked(weights.down))


def router(x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
    """The k experts of each token. The correction bias steers the choice only: weights are the unbiased scores."""
    logits = F.linear(x.float(), weight)
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if config.topk_method != "greedy" and config.n_group > 1:
        choice = _within_best_groups(choice, config)
    experts = choice.topk(config.num_experts_per_tok, sorted=False).indices
    weights = scores.gather(1, experts)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * config.routed_scaling_factor)


def _within_best_groups(choice: Tensor, config: DeepseekConfig) -> Tensor:
    """[T, E] with the experts of all but the topk_group best groups at -inf.

    Not at 0, as the first published code had it: biased scores may be negative, and a dropped expert would win.
    """
    groups = choice.view(len(choice), config.n_group, -1)
    if config.topk_method == "noaux_tc":
        group_scores = groups.topk(2, dim=-1).values.sum(-1)
    else:
        group_scores = groups.amax(-1)
    kept = group_scores.topk(config.topk_group, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)


def moe(x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None) -> Tensor:
    """Pairs of token and expert are sorted by expert, so that each expert that is hit runs once, on a contiguous slice.

    A token's experts are summed in the router's order in float32, so that the sum does not depend on its neighbours.
    """
    gate_up, down = experts.gate_up, experts.down
    assert not isinstance(gate_up, PackedWeight)
    assert not isinstance(down, PackedWeight)
    num_tokens, per_token = routing.experts.shape
    chosen, order = routing.experts.flatten().sort()
    pairs = x[order // per_token]
    counts = torch.bincount(chosen, minlength=len(gate_up)).tolist()
    outputs = torch.empty_like(pairs)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        stop = start + count
        gate, up = linear(pairs[start:stop], gate_up[expert]).chunk(2, dim=-1)
        outputs[start:stop] = linear(F.silu(gate) * up, down[expert])
        start = stop
    by_token = torch.empty_like(outputs)
    by_token[order] = outputs
    by_token = by_token.view(num_tokens, per_token, -1)
    routed = (by_token * routing.weights[..., None]).sum(1)
    if shared is not None:
        routed += mlp(x, shared)
    return routed.to(x.dtype)
