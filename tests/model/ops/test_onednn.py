"""Weights in oneDNN's layout, for CPUs without the compiled kernels: the network computes what it computes without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.ops.eager.linear import can_lay_out
from model.ops.eager.ops import EagerOps
from model.ops.interface import SwigluWeights
from model.runner import load_runner
from server.settings import BUILTIN_MODEL
from tests.checkpoints import make_checkpoint
from tests.model.harness import Driver, load_model, random_tokens

needs_onednn = pytest.mark.skipif(
    not can_lay_out(torch.bfloat16, torch.device("cpu")), reason="oneDNN has no bfloat16 on this processor"
)


@needs_onednn
@pytest.mark.parametrize("kind", ["v2", "v3"])
@torch.inference_mode()
def test_the_network_is_the_same_whatever_its_weights_layout(tmp_path: Path, kind: str) -> None:
    path = make_checkpoint(tmp_path, kind)
    plain, laid_out = (load_model(path, torch.bfloat16, ops) for ops in (EagerOps(), EagerOps(onednn=True)))
    experts = laid_out.model.layers[-1].mlp.experts.packed  # type: ignore[union-attr]
    assert isinstance(experts, SwigluWeights)
    assert all(weight.is_mkldnn for weight in experts.gate_up)  # type: ignore[union-attr]
    tokens = random_tokens(70, plain.config.vocab_size)
    exact = Driver(load_model(path)).run(tokens, 33)
    error = (Driver(plain).run(tokens, 33) - exact).abs().mean()
    assert 0 < (Driver(laid_out).run(tokens, 33) - exact).abs().mean() < 1.1 * error


@needs_onednn
def test_it_is_what_a_cpu_without_kernels_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.runner.library", lambda: None)
    options = {"num_blocks": 8, "num_threads": 1, "progress": False}
    assert load_runner(BUILTIN_MODEL, dtype="bfloat16", **options).ops == "onednn"  # type: ignore[arg-type]
    assert load_runner(BUILTIN_MODEL, dtype="float32", **options).ops == "eager"  # type: ignore[arg-type]
