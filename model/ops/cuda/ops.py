"""The operations by Triton kernels and cuBLAS, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import LatentCache
from model.ops.cuda.attention import CudaAttention, DeviceRows, captured_attention, plan_attention
from model.ops.cuda.graphs import DecodeGraphs
from model.ops.cuda.moe import moe, silu_mul
from model.ops.cuda.norm import rms_norm
from model.ops.cuda.rope import rope_and_cache
from model.ops.cuda.router import router
from model.ops.cuda.sampler import sample
from model.ops.interface import (
    LatentWeights,
    LinearWeight,
    Mlp,
    Network,
    Routing,
    SwigluWeights,
    by_head,
    stacked,
    unpacked,
)
from model.rotary import Rotation, rotation
from model.sampler import SamplingInputs, greedy


class CudaOps:
    name = "cuda"
    quantization = "none"
    packing = None

    def __init__(self) -> None:
        self._rows: DeviceRows | None = None

    @contextmanager
    def on_device(self, rows: DeviceRows) -> Iterator[None]:
        """Within it, steps are of these rows, whatever the host says of them: nothing waits for the device."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def recorded(self, network: Network, config: DeepseekConfig) -> DecodeGraphs:
        """As `Ops.recorded`: a CUDA graph for each size of decoding steps."""
        return DecodeGraphs(network, config, self.on_device)

    def pack(self, weight: Tensor, precise: bool = False) -> Tensor:
        return weight

    def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
        return SwigluWeights(torch.cat((mlp.gate, mlp.up)), mlp.down)

    def pack_experts(self, number: int, experts: Iterable[Mlp]) -> SwigluWeights:
        return stacked(number, experts)

    def pack_latent(self, w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
        return by_head(w_uk, w_uv)

    def linear(
        self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The residual is added where the product is stored, rounded once."""
        weight = unpacked(weight)
        if residual is None:
            return F.linear(x, weight, bias)
        return torch.addmm(residual if bias is None else residual + bias, x, weight.t())

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        return F.linear(x, unpacked(weight)).float()

    def sample(self, logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        return greedy(logits) if inputs is None else sample(logits, inputs)

    def gather(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    def rotation(self, positions: Tensor, frequencies: Tensor, amplitude: float) -> Rotation:
        return rotation(positions, frequencies, amplitude)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def rope_and_cache(
        self,
        q_rope: Tensor,
        kv: Tensor,
        norm_weight: Tensor,
        eps: float,
        rotation: Rotation,
        slot_mapping: Tensor,
        cache: LatentCache,
        layer: int,
    ) -> Tensor:
        """q_rope is turned in place; a slot of -1 is padding."""
        return rope_and_cache(q_rope, kv, norm_weight, eps, rotation, slot_mapping, cache, layer)

    def attention(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> CudaAttention:
        if self._rows is not None:
            return captured_attention(self._rows, cache, config)
        return plan_attention(step, cache, config)

    def mlp(self, x: Tensor, weights: SwigluWeights, residual: Tensor) -> Tensor:
        return self.linear(silu_mul(F.linear(x, unpacked(weights.gate_up))), weights.down, residual=residual)

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        num_tokens = None if self._rows is None else self._rows.query_start[-1:]
        return router(x, weight, correction_bias, config, num_tokens)

    def moe(
        self, x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None, residual: Tensor
    ) -> Tensor:
        return moe(x, routing, experts, shared, residual)
