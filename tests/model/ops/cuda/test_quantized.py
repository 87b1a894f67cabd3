"""Weights in 8 and 4 bits: how far rounding is off, and that kernels compute exactly what the rounded numbers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.ops.cuda import moe as moe_module
from model.ops.cuda import quantized
from model.ops.cuda.ops import CudaOps
from model.ops.eager.ops import EagerOps
from model.ops.interface import Mlp, PackedWeight, Routing, SwigluWeights
from tests.checkpoints import make_checkpoint
from tests.model.ops.cuda.common import DEVICE, DTYPES, TOLERANCE, poisoned, randn, relative_error
from tests.model.ops.cuda.test_moe import routing_of
from tests.model.ops.cuda.test_network import generate

EXPERTS, HIDDEN, WIDTH = 10, 80, 64
COST = {"int8": 0.009, "int4": 0.14}
"""Relative error of rounded normal numbers."""


def packed_weight(weight: object) -> PackedWeight:
    assert isinstance(weight, PackedWeight)
    return weight


def exact(weight: object, dtype: torch.dtype = torch.float32) -> Tensor:
    whole = quantized.dequantized(packed_weight(weight), dtype)
    return whole[0] if len(whole) == 1 else whole


@pytest.mark.parametrize("quantization", COST)
@pytest.mark.parametrize("width", [64, 80, 200])
def test_rounding(quantization: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_ROWS_AT_ONCE", 7)
    weight = randn(20, width) * torch.logspace(-9, 3, 20, device=DEVICE)[:, None]
    weight[3] = 0
    weight[4, 5] = torch.nan
    found = exact(CudaOps(quantization).pack(weight))
    assert found[3].eq(0).all()
    assert found[4, :64].isnan().all()
    for row in (0, 1, 2, *range(5, 20)):
        assert relative_error(found[row], weight[row]) < COST[quantization]
    precise = CudaOps(quantization).pack(weight[:3], precise=True)
    assert relative_error(exact(precise), weight[:3]) < COST["int8"]


def test_what_the_numbers_can_say_is_exact() -> None:
    """-8 to 7, and of the other sign: the range is turned to where the largest is."""
    steps = torch.arange(-8.0, 8.0, device=DEVICE).repeat(4)[None]
    for sign in (1, -1):
        torch.testing.assert_close(exact(CudaOps("int4").pack(sign * 0.25 * steps)), sign * 0.25 * steps)
    whole = torch.arange(-127.0, 127.0, 4, device=DEVICE)[None]
    torch.testing.assert_close(exact(CudaOps("int8").pack(whole)), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", COST)
@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_linear(tokens: int, quantization: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, and by a tensor that is made of the weight."""
    ops = CudaOps(quantization)
    x, weight = randn(tokens, 200, dtype=dtype), ops.pack(randn(70, 200, seed=1) / 14)
    bias, residual = randn(70, seed=2, dtype=dtype), randn(tokens, 70, seed=3, dtype=dtype)
    for most in (256, 10):
        monkeypatch.setattr(quantized, "MOST_FUSED", most)
        for more in ((), (bias,), (None, residual), (bias, residual)):
            with poisoned():
                found = ops.linear(x, weight, *more)
            wide = [None if other is None else other.float() for other in more]
            assert relative_error(found, EagerOps().linear(x.float(), exact(weight), *wide)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", COST)
@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("tokens", [1, 40])
def test_moe(tokens: int, num_shared: int, quantization: str, dtype: torch.dtype) -> None:
    def mlp(width: int, seed: int) -> Mlp:
        rows = [randn(*shape, seed=seed + i) / shape[1] ** 0.5 for i, shape in enumerate(((width, HIDDEN),) * 2)]
        return Mlp(*rows, randn(HIDDEN, width, seed=seed + 2) / width**0.5)

    ops = CudaOps(quantization)
    experts = ops.pack_experts(EXPERTS, (mlp(WIDTH, 10 * i) for i in range(EXPERTS)))
    shared = ops.pack_swiglu(mlp(num_shared * WIDTH, 1000)) if num_shared else None
    routing = routing_of(tokens, 3, hot=tokens > 6, experts=EXPERTS)
    x, residual = randn(tokens, HIDDEN, seed=7, dtype=dtype), randn(tokens, HIDDEN, seed=8, dtype=dtype)
    expected = EagerOps().moe(
        x.float(),
        Routing(routing.experts.long(), routing.weights),
        SwigluWeights(exact(experts.gate_up), exact(experts.down)),
        None if shared is None else SwigluWeights(exact(shared.gate_up), exact(shared.down)),
        residual.float(),
    )
    with poisoned():
        found = moe_module.moe(x, routing, experts, shared, residual)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE == "cuda", reason="compares with the eager network on a CPU")
def test_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real scheduler, against plain torch with the rounded weights."""
    model_dir = make_checkpoint(tmp_path, "v3", moe_intermediate_size=64)

    class Rounded(EagerOps):
        """Every weight as 8 bits make it."""

        def _round(self, weight: Tensor) -> Tensor:
            return exact(CudaOps("int8").pack(weight))

        def pack(self, weight: Tensor, precise: bool = False) -> Tensor:
            return self._round(weight)

        def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
            return super().pack_swiglu(Mlp(*map(self._round, mlp)))

        def pack_experts(self, number: int, experts: object) -> SwigluWeights:
            return super().pack_experts(number, (Mlp(*map(self._round, mlp)) for mlp in experts))  # type: ignore[attr-defined]

    def tokens(ops: Callable[..., object]) -> tuple[list[list[int]], list[object]]:
        monkeypatch.setattr("model.runner._choose_ops", lambda *_: ops())
        outcome = generate(model_dir, 24)
        return outcome.tokens, [column.logprobs for column in outcome.logprobs]

    expected, exact_logprobs = tokens(Rounded)
    found, logprobs = tokens(lambda: CudaOps("int8"))
    assert found == expected
    for a, b in zip(logprobs, exact_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-3, rtol=0)
