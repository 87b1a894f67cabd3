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
from model.ops.cuda import quantized
from model.ops.cuda.attention import CudaAttention, DeviceRows, captured_attention, plan_attention
from model.ops.cuda.cudnn import Attend
from model.ops.cuda.graphs import SIZES, DecodeGraphs
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
    PackedWeight,
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
    decode_sizes = SIZES
    packing = None

    def __init__(self, quantization: str = "none", attend: Attend | None = None) -> None:
        """`attend`: who computes pieces of long prompts, see `cudnn.chosen`."""
        self.quantization = quantization
        self.prefill_attention = "triton" if attend is None else "cudnn"
        self._attend = attend
        self._bits = quantized.BITS.get(quantization, 16)
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

    def pack(self, weight: Tensor, precise: bool = False) -> LinearWeight:
        return self._packed([weight], 8 if precise else self._bits)

    def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
        return SwigluWeights(self._packed([mlp.gate, mlp.up], self._bits), self._packed([mlp.down], self._bits))

    def pack_experts(self, number: int, experts: Iterable[Mlp]) -> SwigluWeights:
        if self._bits == 16:
            return stacked(number, experts)
        gate_up, down = None, None
        for i, expert in enumerate(experts):
            if gate_up is None or down is None:
                gate_up = quantized.empty(number, self._bits, expert.gate, 2 * len(expert.gate))
                down = quantized.empty(number, self._bits, expert.down)
            quantized.pack_into(gate_up, i, expert.gate)
            quantized.pack_into(gate_up, i, expert.up, len(expert.gate))
            quantized.pack_into(down, i, expert.down)
        assert gate_up is not None
        assert down is not None
        return SwigluWeights(gate_up, down)

    def _packed(self, weights: list[Tensor], bits: int) -> LinearWeight:
        """Matrices below each other as one."""
        if self._bits == 16:
            return weights[0] if len(weights) == 1 else torch.cat(weights)
        packed = quantized.empty(1, bits, weights[0], sum(map(len, weights)))
        first = 0
        for weight in weights:
            quantized.pack_into(packed, 0, weight, first)
            first += len(weight)
        return packed

    def pack_latent(self, w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
        return by_head(w_uk, w_uv)

    def linear(
        self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The residual is added where the product is stored, rounded once."""
        if isinstance(weight, PackedWeight):
            return quantized.linear(x, weight, bias, residual)
        weight = unpacked(weight)
        if residual is None:
            return F.linear(x, weight, bias)
        return torch.addmm(residual if bias is None else residual + bias, x, weight.t())

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        return self.linear(x, weight).float()

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
        return plan_attention(step, cache, config, self._attend)

    def mlp(self, x: Tensor, weights: SwigluWeights, residual: Tensor) -> Tensor:
        return self.linear(silu_mul(self.linear(x, weights.gate_up)), weights.down, residual=residual)

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        num_tokens = None if self._rows is None else self._rows.query_start[-1:]
        return router(x, weight, correction_bias, config, num_tokens)

    def moe(
        self, x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None, residual: Tensor
    ) -> Tensor:
        return moe(x, routing, experts, shared, residual)
