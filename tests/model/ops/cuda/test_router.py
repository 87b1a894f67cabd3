"""The router against its eager twin: sets of experts, and each expert's weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import DeepseekConfig
from model.ops.cuda.router import router
from model.ops.eager.ops import EagerOps
from model.ops.interface import Routing
from tests.model.ops.cuda.common import DEVICE, poisoned, randn
from tests.model.test_ops_eager import CONFIG

V2_LITE = replace(CONFIG, n_routed_experts=64, num_experts_per_tok=6)
V2 = replace(
    CONFIG,
    topk_method="group_limited_greedy",
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    num_experts_per_tok=6,
    routed_scaling_factor=16.0,
)
V3 = replace(
    CONFIG,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_routed_experts=256,
    n_group=8,
    topk_group=4,
    num_experts_per_tok=8,
)
K2 = replace(V3, n_routed_experts=384, n_group=1, topk_group=1)
ONE = replace(V3, n_routed_experts=12, n_group=1, topk_group=1, num_experts_per_tok=1)
CONFIGS = {"V2-Lite": V2_LITE, "V2": V2, "V3": V3, "K2": K2, "one expert": ONE, "odd": CONFIG}


def weights_by_expert(routing: Routing, experts: int) -> torch.Tensor:
    """[T, E], -1 where an expert is not chosen."""
    table = torch.full((len(routing.experts), experts), -1.0, device=DEVICE)
    return table.scatter(1, routing.experts.long(), routing.weights)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_router(config: DeepseekConfig) -> None:
    x = randn(5, config.hidden_size, seed=1)
    weight = randn(config.n_routed_experts, config.hidden_size, seed=2) * 0.3
    bias = None
    if config.topk_method == "noaux_tc":
        bias = randn(config.n_routed_experts, seed=3) * 0.2 - 1.0  # below zero: a dropped expert must not win
    with poisoned():
        found = router(x, weight, bias, config)
    exact = EagerOps().router(x, weight, bias, config)
    assert found.experts.shape == exact.experts.shape
    experts = config.n_routed_experts
    torch.testing.assert_close(weights_by_expert(found, experts), weights_by_expert(exact, experts))


@pytest.mark.parametrize("config", [V2_LITE, V3], ids=["V2-Lite", "V3"])
def test_equal_scores_and_no_scores_choose_the_first_experts(config: DeepseekConfig) -> None:
    x = torch.zeros(2, config.hidden_size, device=DEVICE)
    x[1] = torch.nan
    weight = randn(config.n_routed_experts, config.hidden_size, seed=2)
    with poisoned():
        found = router(x, weight, None, config).experts
    assert found.tolist() == [list(range(config.num_experts_per_tok))] * 2


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("config", [V2_LITE, V3], ids=["V2-Lite", "V3"])
def test_infinite_scores_choose_experts_that_there_are(config: DeepseekConfig) -> None:
    x = torch.zeros(1, config.hidden_size, device=DEVICE)
    x[0, 0] = torch.inf
    weight = randn(config.n_routed_experts, config.hidden_size, seed=2)
    with poisoned():
        found = router(x, weight, None, config).experts[0].tolist()
    assert len(set(found)) == config.num_experts_per_tok
    assert set(found) <= set(range(config.n_routed_experts))
