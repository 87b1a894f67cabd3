"""The whole network by the CPU kernels, against itself in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import load_config
from model.deepseek import DeepseekForCausalLM
from model.ops.cpu.library import Format, library
from model.ops.cpu.ops import CpuOps, obstacle
from tests.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.model.harness import Driver, Row, load_model, random_tokens
from tests.model.ops.test_cpu_linear import pack, unpack

KINDS = {
    "v2": {},
    "v2-yarn": {},
    "v2-grouped": {"q_lora_rank": 32},
    "v3": {"q_lora_rank": 32},
    "moonlight": {},
    "dense": {},
    "bias": {"q_lora_rank": 32},
}
CPU = torch.device("cpu")
KERNELS = library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not built")


def by_kernels(path: Path, threads: int = 2, quantization: str = "none") -> DeepseekForCausalLM:
    assert KERNELS is not None
    assert obstacle(load_config(path), torch.bfloat16, CPU) is None
    return load_model(path, torch.bfloat16, CpuOps(KERNELS, threads, quantization))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_no_further_from_float32_than_torch_in_bfloat16(kind: str, tied: bool, tmp_path: Path) -> None:
    """Whole prompts, chunks and single tokens: log-probabilities of 200 tokens over shuffled pages full of NaN."""
    path = make_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied, **KINDS[kind])
    tokens = random_tokens(200, 256)
    exact = Driver(load_model(path)).run(tokens, 200)
    by_torch = Driver(load_model(path, torch.bfloat16)).run(tokens, 200)

    def agreement(logprobs: torch.Tensor) -> float:
        return (logprobs.argmax(-1) == exact.argmax(-1)).float().mean().item()

    model = by_kernels(path)
    for chunk in (200, 20, 1):
        found = Driver(model).run(tokens, chunk)
        assert found.isfinite().all()
        assert (found - exact).abs().mean() < 1.2 * (by_torch - exact).abs().mean(), chunk
        assert agreement(found) > agreement(by_torch) - 0.05, chunk


@pytest.mark.parametrize("kind", ["v2-yarn", "v2-grouped", "v3", "dense"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_are_used_as_what_they_stand_for(kind: str, quantization: str, tmp_path: Path) -> None:
    """Against the same network in float32 with the weights that were packed: what is left is that bfloat16 rounds, and
    that activations become int8. The same bound in whole prompts, chunks and single tokens."""
    path = make_checkpoint(tmp_path / "model", kind, **KINDS[kind])
    tokens = random_tokens(200, 256)
    by_torch = Driver(load_model(path, torch.bfloat16)).run(tokens, 200)
    rounding = (by_torch - Driver(load_model(path)).run(tokens, 200)).abs().mean()
    model = by_kernels(path, quantization=quantization)
    write_tensors(path, {name: as_packed(name, value, quantization) for name, value in read_tensors(path).items()})
    exact = Driver(load_model(path)).run(tokens, 200)
    for chunk in (200, 20, 1):
        found = Driver(model).run(tokens, chunk)
        assert (found - exact).abs().mean() < 2 * rounding, chunk


def as_packed(name: str, weight: Tensor, quantization: str) -> Tensor:
    """What a weight of the checkpoint stands for when it is packed."""
    kept = weight.dim() == 1 or name.endswith(("embed_tokens.weight", "mlp.gate.weight"))
    if kept:
        return weight
    assert KERNELS is not None
    latent = name.endswith(("kv_a_proj_with_mqa.weight", "kv_b_proj.weight"))
    format = Format.INT8 if latent else Format[quantization.upper()]
    return unpack(format, pack(KERNELS, format, weight.bfloat16()), *weight.shape).contiguous()


@pytest.mark.parametrize(
    ("kind", "quantization"), [("v2-yarn", "none"), ("moonlight", "none"), ("v2-yarn", "int8"), ("moonlight", "int4")]
)
def test_a_row_alone_and_among_others_is_equal_to_the_last_bit(kind: str, quantization: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", kind, **KINDS[kind])
    model = by_kernels(path, quantization=quantization)
    lengths = [1, 5, 63, 64, 65, 130, 200, 300]
    prompts = [random_tokens(n + 1, 256, seed=n) for n in lengths]
    driver = Driver(model)
    alone = []
    for prompt in prompts:
        row = Row(prompt)
        parts = [driver.step([(row, len(prompt) - 1)])[0], driver.step([(row, 1)])[0]]
        alone.append(torch.cat(parts))
        driver.release(row)
    rows = [Row(prompt) for prompt in prompts]
    first = driver.step([(row, len(row.tokens) - 1) for row in rows])
    second = driver.step([(row, 1) for row in rows])
    for expected, *parts in zip(alone, first, second, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "v2-yarn")
    tokens = random_tokens(150, 256)
    found = [Driver(by_kernels(path, threads)).run(tokens, 50) for threads in (1, 2, 3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_the_kernels_do_not_run(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path / "model", "v2"))
    odd = load_config(make_checkpoint(tmp_path / "odd", "v3"))
    assert obstacle(config, torch.bfloat16, CPU) is None
    assert "not in float32: choose dtype bfloat16" in str(obstacle(config, torch.float32, CPU))
    assert "not on cuda: choose device cpu" in str(obstacle(config, torch.bfloat16, torch.device("cuda")))
    assert "config.json's q_lora_rank 24 is not" in str(obstacle(odd, torch.bfloat16, CPU))
