"""Checkpoints in DeepSeek-V3's fp8 blocks are the network of the weights that they mean, and wrong ones are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, load_config
from model.ops.cpu.library import library
from model.runner import load_runner
from tests.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.model.harness import Driver, random_tokens

# The last block of nearly every matrix is cut, and 32 divides what the CPU kernels want it to.
WIDTHS = {"hidden_size": 160, "intermediate_size": 288, "moe_intermediate_size": 96, "q_lora_rank": 32}
KEPT = ("embed_tokens", "lm_head", "mlp.gate.", "shared_head.head", "eh_proj")
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
SCALE = KV_A + "_scale_inv"
Tensors = dict[str, Tensor]


def in_blocks(weight: Tensor, block: tuple[int, int], powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """e4m3 numbers, the largest of each block at its end, and the scales."""
    rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = weight[rows == i][:, columns == j].abs().max() / 448
    if powers_of_two:
        scale = scale.log2().ceil().exp2()
    return (weight / scale[rows[:, None], columns]).to(torch.float8_e4m3fn), scale


def make_fp8(
    path: Path,
    block: tuple[int, int] = (128, 128),
    e8m0: bool = False,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    **overrides: object,
) -> Path:
    """In two shards: nearly every weight has its scales in the other one. Beside it, in `path`/meant, what is meant."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    make_checkpoint(path, "v3", **WIDTHS, **({"quantization_config": config} | overrides))  # type: ignore[arg-type]
    make_checkpoint(path / "meant", "v3", **WIDTHS)  # type: ignore[arg-type]
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in read_tensors(path).items():
        meant[name] = stored[name] = weight
        if weight.dim() == 2 and not any(part in name for part in KEPT):
            stored[name], scale = in_blocks(weight, block, e8m0)
            stored[name + "_scale_inv"] = scale.to(torch.float8_e8m0fnu) if e8m0 else scale
            row = torch.arange(weight.shape[0])[:, None].expand_as(weight) // block[0]
            column = torch.arange(weight.shape[1]).expand_as(weight) // block[1]
            meant[name] = stored[name].float() * scale[row, column]
    (path / "model.safetensors").unlink()
    write_tensors(path, change(stored), shards=2)
    write_tensors(path / "meant", meant)
    return path


@torch.inference_mode()
def logprobs(path: Path, dtype: str, quantization: str = "none") -> Tensor:
    runner = load_runner(
        path, dtype=dtype, quantization=quantization, num_blocks=8, num_threads=1, progress=False, max_num_seqs=1
    )
    return Driver(runner.model, num_blocks=8).run(random_tokens(100, 256), 100)


@pytest.mark.parametrize(("block", "e8m0"), [((128, 128), False), ((128, 128), True), ((48, 32), False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_is_that_of_the_weights_meant(
    tmp_path: Path, block: tuple[int, int], e8m0: bool, dtype: str
) -> None:
    path = make_fp8(tmp_path, block, e8m0)
    found = logprobs(path, dtype)
    assert found.isfinite().all()
    assert torch.equal(found, logprobs(path / "meant", dtype))


@pytest.mark.skipif(library() is None, reason="the kernels are not built")
def test_it_can_be_rounded_again(tmp_path: Path) -> None:
    path = make_fp8(tmp_path)
    found = logprobs(path, "bfloat16", "int8")
    assert torch.equal(found, logprobs(path / "meant", "bfloat16", "int8"))
    assert not torch.equal(found, logprobs(path, "bfloat16"))


def test_what_is_said_of_it(tmp_path: Path) -> None:
    path = make_fp8(tmp_path)
    checkpoint = open_checkpoint(path, load_config(path))
    assert checkpoint.tensors[KV_A].scale is not None
    assert checkpoint.file_dtype == "float8_e4m3fn"
    assert load_runner(path, num_blocks=8, num_threads=1, progress=False).dtype == "bfloat16"


def without_scale(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != SCALE}


WRONG: list[tuple[Callable[[Tensors], Tensors], dict[str, object], str]] = [
    (without_scale, {}, rf"safetensors: tensor {KV_A}: dtype F8_E4M3, but tensor {SCALE} is missing"),
    (lambda tensors: tensors | {SCALE: torch.ones(2, 2)}, {}, rf"tensor {SCALE}: F32 \[2, 2\], but .* \[1, 2\], a"),
    (lambda tensors: tensors | {SCALE: torch.ones(1, 2).half()}, {}, rf"tensor {SCALE}: F16 \[1, 2\], but it must"),
    (lambda tensors: tensors, {"quantization_config": ...}, r"dtype F8_E4M3, but config.json has no quantization_"),
    (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(160).to(torch.float8_e4m3fn)},
        {},
        "tensor model.norm.weight: dtype F8_E4M3: only matrices",
    ),
]


@pytest.mark.parametrize(
    ("change", "overrides", "problem"), WRONG, ids=["no scale", "shape", "dtype", "no blocks", "no matrix"]
)
def test_what_is_wrong_is_named(
    tmp_path: Path, change: Callable[[Tensors], Tensors], overrides: dict[str, object], problem: str
) -> None:
    path = make_fp8(tmp_path, change=change, **overrides)
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path, load_config(path))


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    path = make_fp8(tmp_path, change=lambda tensors: tensors | {SCALE: torch.tensor([[1.0, torch.inf]])})
    file = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][SCALE]
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}: tensor {SCALE}: has values that are not finite"):
        load_runner(path, num_blocks=8, num_threads=1, progress=False)
