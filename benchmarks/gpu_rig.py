"""What the groups of `benchmarks.gpu_suite` measure with: a shape on a device, random weights and caches, clocks."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.make_checkpoint import Noise
from model.config import DeepseekConfig, expected_tensors, load_config
from model.deepseek import DeepseekForCausalLM
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cuda.cudnn import chosen
from model.ops.cuda.ops import CudaOps
from model.ops.interface import LinearWeight, Ops

L2_BYTES = 256 << 20
"""Every kernel is timed on more memory than this, in turn."""
TOY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def clocked(call: Callable[[], object], times: int) -> float:
    """Seconds of one of so many calls, the GPU's work included."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


class Limits(NamedTuple):
    bytes: float
    """A second, as a copy reads and writes them."""
    operations: float
    """A second, of a large product in the run dtype."""

    def seconds(self, size: float, operations: float) -> float:
        return max(size / self.bytes, operations / self.operations)


@dataclass(frozen=True)
class Suite:
    config: DeepseekConfig
    device: torch.device
    dtype: torch.dtype
    out: Path
    toy: bool

    def report(self, group: str, case: str, **figures: Any) -> None:
        line = {"group": group, "case": case} | figures
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = [
            f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        print(f"{group:8} {case:34} {', '.join(shown)}", flush=True)

    def limits(self) -> Limits:
        """What `facts` measured."""
        lines = [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]
        found = {line["case"]: line for line in lines if line["group"] == "facts"}
        return Limits(found["copy"]["GB/s"] * 1e9, found["product"]["TFLOP/s"] * 1e12)

    def seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
        """Of one call, median: as a CUDA graph of all of them replays on a GPU, called one by one elsewhere."""
        for call in calls[:2]:
            call()
        if self.device.type != "cuda":
            return clocked(calls[0], 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return statistics.median(clocked(graph.replay, 1) for _ in range(rounds)) / len(calls)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, scale)


class RandomWeights:
    """`model.deepseek.Weights` made where they are used; equal for equal seeds, whatever the dtype."""

    def __init__(self, suite: Suite, dtype: torch.dtype, seed: int = 0) -> None:
        self._suite, self._dtype = suite, dtype
        self._shapes, self._noise = expected_tensors(suite.config), Noise(suite.config)
        self._generator = torch.Generator(suite.device).manual_seed(seed)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=self._suite.dtype, device=self._suite.device)
        tensor.normal_(0, 1, generator=self._generator)
        tensor = 1 + 0.1 * tensor if len(shape) == 1 else tensor.mul_(self._noise.deviation(name, shape))
        return tensor.to(dtype or self._dtype)

    def packed(self, name: str, pack: Callable[[], Sequence[LinearWeight]]) -> Sequence[LinearWeight]:
        return pack()


def random_model(suite: Suite, ops: Ops, dtype: torch.dtype) -> DeepseekForCausalLM:
    return DeepseekForCausalLM(suite.config, ops, RandomWeights(suite, dtype))


def step_inputs(suite: Suite, queries: int, contexts: Sequence[int], num_blocks: int) -> StepInputs:
    """Rows of so many new tokens each, at the ends of their contexts, in blocks of no order."""
    counts = [-(-context // BLOCK_SIZE) for context in contexts]
    assert sum(counts) <= num_blocks
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))[: sum(counts)]
    tables = torch.zeros((len(contexts), max(counts)), dtype=torch.int32)
    for table, of_row in zip(tables, torch.split(blocks, counts), strict=True):
        table[: len(of_row)] = of_row
    positions = torch.cat([torch.arange(context - queries, context) for context in contexts])
    row = torch.arange(len(contexts)).repeat_interleave(queries)
    slots = tables[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    token_ids = torch.randint(suite.config.vocab_size, (len(row),), generator=torch.Generator().manual_seed(2))
    return StepInputs(
        token_ids=token_ids.to(suite.device),
        positions=positions.to(suite.device),
        slot_mapping=slots.to(suite.device),
        query_start=list(range(0, len(row) + 1, queries)),
        context_lens=list(contexts),
        block_tables=tables.to(suite.device),
        sample_index=(torch.arange(1, len(contexts) + 1) * queries - 1).to(suite.device),
    )


def new_cache(
    suite: Suite, num_blocks: int, layers: int, dtype: torch.dtype | None = None, fp8: bool = False
) -> LatentCache:
    rank = suite.config.kv_lora_rank
    shape = num_blocks, layers, suite.config.latent_dim
    cache = LatentCache(*shape, dtype or suite.dtype, suite.device, fp8_latents=rank if fp8 else 0)
    generator = torch.Generator(suite.device).manual_seed(3)
    if not fp8:
        cache.data.normal_(generator=generator)
        return cache
    for layer in range(layers):
        latents, scales, keys = cache.planes(layer, rank)
        assert scales is not None
        latents.random_(0, 0x78, generator=generator)  # up to 256
        scales.fill_(2.0**-7)
        keys.normal_(generator=generator)
    return cache


def daemon_ops(suite: Suite, quantization: str = "none") -> CudaOps:
    """As the daemon makes them on this device."""
    return CudaOps(quantization, chosen(suite.config, suite.dtype, suite.device))


def read_config(values: dict[str, Any]) -> DeepseekConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values | {"bos_token_id": 0, "eos_token_id": 1}))
        return load_config(Path(folder))
