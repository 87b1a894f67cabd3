"""Requests through the real scheduler and the whole network by the kernels, against the same by the eager twins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from model.batch import SamplingParams
from model.ops.cuda.cudnn import Attend
from model.ops.cuda.ops import CudaOps
from model.ops.eager.ops import EagerOps
from model.runner import _choose_ops
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint
from tests.model.engine import Engine, Outcome
from tests.model.ops.cuda.common import DEVICE, flash_attention, poisoned, randn, small_pieces
from tests.model.ops.cuda.test_graphs import CaptureList
from tests.model.test_ops_eager import CONFIG

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the eager twin runs on the CPU, and so would the kernels")


def test_linear_adds_bias_and_residual() -> None:
    x, weight, bias, residual = randn(3, 8), randn(5, 8, seed=1), randn(5, seed=2), randn(3, 5, seed=3)
    for arguments in ((weight,), (weight, bias), (weight, None, residual), (weight, bias, residual)):
        torch.testing.assert_close(CudaOps().linear(x, *arguments), EagerOps().linear(x, *arguments))


def requests(lengths: list[int]) -> list[AddRequest]:
    """Prompts with one beginning."""
    rng = np.random.default_rng(7)
    beginning = rng.integers(2, 256, size=64)
    made = []
    for i, length in enumerate(lengths):
        prompt = rng.integers(2, 256, size=length)
        prompt[: len(beginning)] = beginning[:length]
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=5)
        made.append(AddRequest(request_id=str(i), prompt=prompt.astype("<u4").tobytes(), params=params))
    return made


def generate(model_dir: Path, budget: int, kv_cache_dtype: str = "auto") -> Outcome:
    """Two rounds: the second one finds its beginnings in the prefix cache."""
    engine = Engine(model_dir, budget=budget, kv_cache_dtype=kv_cache_dtype)
    first = engine.generate(requests([70, 2]), preempt_every=4)
    return Outcome.together([first, engine.generate(requests([73]))])


@pytest.mark.parametrize(
    ("kind", "budget", "kv_cache_dtype", "attend"),
    [
        ("v2-yarn", 24, "auto", None),
        ("v2-yarn", 24, "fp8", None),
        ("v3", 512, "auto", None),
        ("v3", 512, "fp8", None),
        ("v3", 512, "auto", flash_attention),
    ],
)
def test_network(
    kind: str,
    budget: int,
    kv_cache_dtype: str,
    attend: Attend | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of at most 24 tokens, or whole prompts, expanded where they have more than 32 tokens; or those of more
    than 8, in pieces of 8 or 16 tokens with each other or with 16 cached ones."""
    model_dir = make_checkpoint(tmp_path, kind)
    exact = generate(model_dir, budget, kv_cache_dtype)
    ops = CudaOps(attend=attend)
    monkeypatch.setattr("model.runner._choose_ops", lambda *_: ops)
    monkeypatch.setattr("model.ops.cuda.attention.MOST_ABSORBED", 32 if attend is None else 8)
    small_pieces(monkeypatch, 8, 16, 16)
    found = generate(model_dir, budget, kv_cache_dtype)
    assert found.tokens == exact.tokens
    assert found.num_preemptions == exact.num_preemptions
    assert found.cached_tokens == exact.cached_tokens
    assert found.cached_tokens[-1] == 64
    assert budget > 100 or exact.num_preemptions > 0
    for a, b in zip(found.logprobs, exact.logprobs, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3, rtol=0)


def test_a_gpu_gets_the_kernels_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of float32 are too large for the memory of any multiprocessor, and all are for those before Ampere."""
    device = torch.device("cuda")
    monkeypatch.setattr("model.ops.cuda.device.shared_memory", lambda _: 99 << 10)
    assert _choose_ops(CONFIG, torch.bfloat16, device, 1, "none").name == "cuda"
    assert _choose_ops(CONFIG, torch.bfloat16, device, 1, "none").prefill_attention == "triton"
    monkeypatch.setattr("model.ops.cuda.cudnn.chosen", lambda *_: flash_attention)
    assert _choose_ops(CONFIG, torch.bfloat16, device, 1, "none").prefill_attention == "cudnn"
    assert _choose_ops(CONFIG, torch.float32, device, 1, "none").name == "eager"
    monkeypatch.setattr("model.ops.cuda.device.shared_memory", lambda _: 64 << 10)
    assert _choose_ops(CONFIG, torch.bfloat16, device, 1, "none").name == "eager"


@pytest.mark.parametrize(("kv_cache_dtype", "attend"), [("auto", None), ("fp8", None), ("auto", flash_attention)])
def test_no_launch_waits_for_the_device(
    kv_cache_dtype: str, attend: Attend | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, chunks, decoding, log-probabilities: from the rows to the tokens nothing is read until it is collected.

    Rows have a memory of the device's own, as with a GPU. Nothing is computed here, as in `test_graphs`.
    """
    model_dir = make_checkpoint(tmp_path, "v3")
    ops = CudaOps(attend=attend)
    small_pieces(monkeypatch, 8, 16, 16)
    monkeypatch.setattr("model.runner._choose_ops", lambda *_: ops)
    monkeypatch.setattr("model.ops.cuda.attention.MOST_ABSORBED", 32)
    engine = Engine(model_dir, budget=60, kv_cache_dtype=kv_cache_dtype)
    rows = engine.runner._rows
    rows._apart, rows._history = True, torch.zeros_like(rows._history)
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)
    for message in requests([70, 2]):
        params = structs.replace(message.params, prompt_logprobs=2, repetition_penalty=1.1, temperature=1.0)
        request = engine.scheduler.make_request(structs.replace(message, params=params))
        assert engine.scheduler.add(request) is None
    sampled = 0
    for _ in range(4):
        batch = engine.scheduler.schedule()
        assert batch is not None
        with poisoned(), CaptureList(uploads=True):
            launched = engine.runner.launch(batch)
        outcome = launched.collect()
        outcome.token_ids = [7] * len(outcome.rows)
        sampled += len(outcome.rows)
        for column in (*outcome.prompt_logprobs.values(), *outcome.logprobs.values()):
            column.logprobs = [[0.0]] * len(column.token_ids)
        engine.scheduler.update(outcome)
    assert sampled > 4
