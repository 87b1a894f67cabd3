"""What a CUDA graph of decoding steps would hold: results that padding does not change, nothing the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda import graphs
from model.ops.cuda.graphs import DecodeGraphs
from model.ops.cuda.ops import CudaOps
from model.ops.interface import Network, Routing
from tests.checkpoints import make_checkpoint
from tests.model.harness import load_model
from tests.model.ops.cuda.common import DEVICE, poisoned
from tests.model.test_ops_eager import step_of

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="graphs are captured there, not looked into")

HOST_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "bincount")
"""Operations whose result the host reads."""
HOST_READS = ("item", "tolist", "numpy", "cpu", "__array__")
"""Of a tensor: on a CPU some of them are no operation."""


class CaptureList(TorchDispatchMode):
    """The operations of a region; refuses those that make the host wait and, unless `uploads`, tensors that it makes:
    what reads them cannot be captured."""

    def __init__(self, uploads: bool = False) -> None:
        super().__init__()
        self.names: list[str] = []
        self._refused = HOST_WAITS if uploads else (*HOST_WAITS, "lift_fresh")
        self._uploads = uploads
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> CaptureList:
        for name in HOST_READS:
            self._patch.setattr(torch.Tensor, name, partial(_refuse, name))
        if not self._uploads:
            self._patch.setattr(torch, "from_numpy", partial(_refuse, "from_numpy"))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in self._refused, name
        if name in ("index", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), name
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def _refuse(name: str, *_: object) -> None:
    raise AssertionError(name)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, CudaOps, Any]:
    path = make_checkpoint(tmp_path_factory.mktemp("graphs"), "v3", num_hidden_layers=2, num_nextn_predict_layers=0)
    ops = CudaOps()
    model = load_model(path, ops=ops)
    return model.compute, ops, model.config


def decoding(contexts: list[int], config: Any, fp8: bool = False) -> tuple[StepInputs, LatentCache]:
    step, _ = step_of([(1, context) for context in contexts])
    step = replace(step, token_ids=torch.arange(5, 5 + len(contexts)))
    rank, layers = config.kv_lora_rank, config.num_hidden_layers
    cache = LatentCache(12, layers, config.latent_dim, torch.float32, fp8_latents=rank if fp8 else 0)
    numbers = torch.randn(12 * layers * BLOCK_SIZE, config.latent_dim, generator=torch.Generator().manual_seed(1))
    cache.write(torch.arange(len(numbers)), numbers[:, :rank], numbers[:, rank:])
    return step, cache


@pytest.mark.parametrize("fp8", [False, True])
@torch.inference_mode()
def test_padding_rows_change_nothing_and_write_nothing(
    network: tuple[Network, CudaOps, Any], fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And read no expert's weights."""
    compute, ops, config = network
    step, cache = decoding([70, 1, 200], config, fp8)
    other = decoding([70, 1, 200], config, fp8)[1]
    before, _ = decoding([9, 129, 1, 64], config)
    compute(before, cache)
    hidden, logits = compute(step, cache)
    replayed = ops.recorded(compute, config)
    replayed(before, other)  # leaves its rows in the buffers
    chosen = []

    def watched(*args: Any) -> Routing:
        routing = CudaOps.router(ops, *args)
        chosen.append(routing.experts)
        return routing

    monkeypatch.setattr(ops, "router", watched)
    with poisoned():
        found_hidden, found_logits = replayed(step, other)
    assert chosen
    for experts in chosen:
        assert (experts >= 0).all(dim=1).tolist() == [True, True, True, False]
        assert experts[3].eq(-1).all()
    torch.testing.assert_close(found_hidden, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
    lines = torch.arange(12 * config.num_hidden_layers * BLOCK_SIZE)
    torch.testing.assert_close(other.read(lines), cache.read(lines), rtol=1e-4, atol=1e-4)
    one = replace(step, sample_index=torch.tensor([1]))
    torch.testing.assert_close(replayed(one, other)[1], logits[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(network: tuple[Network, CudaOps, Any], fp8: bool) -> None:
    """To the last bit, in steps of one size, through the whole network; some of them are padding."""
    compute, ops, config = network
    replayed = ops.recorded(compute, config)
    step, cache = decoding([70, 1, 200, 5], config, fp8)
    before, own = cache.data.clone(), cache.data[step.block_tables[0, :2]]
    expected = [found[0].clone() for found in replayed(step, cache)]
    for neighbours in ([130, 64], [9, 9, 9]):
        step, _ = decoding([70, *neighbours], config)
        step.token_ids[1:] += 50
        cache.data.copy_(before)
        cache.data[step.block_tables[0, :2]] = own
        for found, alike in zip(replayed(step, cache), expected, strict=True):
            assert torch.equal(found[0], alike)


@pytest.mark.parametrize("fp8", [False, True])
@torch.inference_mode()
def test_the_host_waits_for_nothing(
    network: tuple[Network, CudaOps, Any], fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched here: kernels are opaque to a graph, and their interpreter would be looked at too."""
    compute, ops, config = network
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)
    step, cache = decoding([70, 1], config, fp8)
    replayed = DecodeGraphs(compute, config, ops.on_device)
    replayed(step, cache)
    with CaptureList() as captured:
        replayed.region(2, cache)
    assert captured.names.count("linear") >= 2 * 3  # it looked at the whole network
    with pytest.raises(AssertionError, match="from_numpy"), CaptureList():
        compute(step, cache)
    for name in HOST_READS:
        with pytest.raises(AssertionError, match=name), CaptureList():
            getattr(step.positions, name)()


def test_steps_that_are_not_replayed(network: tuple[Network, CudaOps, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compute, ops, config = network
    replayed = DecodeGraphs(compute, config, ops.on_device)

    def size_of(rows: list[tuple[int, int]]) -> int | None:
        return replayed.size_of(step_of(rows)[0], torch.device("cpu"))

    assert size_of([(1, 7)] * 5) == 8
    assert size_of([(1, 7), (2, 9)]) is None
    assert size_of([(1, 1)] * 513) is None
    monkeypatch.setattr(graphs, "PARTIAL_BYTES", 0)
    assert size_of([(1, 128)]) == 1
    assert size_of([(1, 129)]) is None
