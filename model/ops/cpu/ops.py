"""The operations by the compiled kernels, in bfloat16: packed weights, one call an operation, or one a step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from model.batch import NONE_LEFT
from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.large_pages import LargePages
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cpu.library import AttentionShape, Format, Library, RouterShape, in_turn
from model.ops.cpu.replay import Recorder, Replay, StepRows
from model.ops.interface import LatentWeights, LinearWeight, Mlp, Network, PackedWeight, Routing, SwigluWeights
from model.rotary import Rotation
from model.sampler import SamplingInputs, constrain

K_MULTIPLE = 32
"""Of the width of a weight's rows."""
_FORMATS = {"none": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}


def obstacle(config: DeepseekConfig, dtype: torch.dtype, device: torch.device, fp8_cache: bool = False) -> str | None:
    """Why the kernels, if there are any, do not compute this network; None where they do."""
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank or 0,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "num_attention_heads * v_head_dim": config.num_attention_heads * config.v_head_dim,
    }
    odd = [f"{name} {width}" for name, width in widths.items() if width % K_MULTIPLE]
    if device.type != "cpu":
        return f"they run on a CPU, not on {device.type}: choose device cpu"
    if dtype is not torch.bfloat16:
        return f"they compute in bfloat16, not in {str(dtype).removeprefix('torch.')}: choose dtype bfloat16"
    if fp8_cache:
        return "they read latents in bfloat16: choose kv_cache_dtype auto"
    if odd:
        return f"they need widths that are multiples of {K_MULTIPLE}, which config.json's {odd[0]} is not"
    return None


class CpuOps:
    name = "cpu"
    decode_sizes = ()
    prefill_attention = None

    def __init__(self, library: Library, threads: int, quantization: str = "none") -> None:
        self.quantization = quantization
        self._format = _FORMATS[quantization]
        self._library = library
        self._pages = LargePages()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        library.set_threads(threads)

    @property
    def packing(self) -> str:
        return f"{self.quantization} {self._library.digest}"

    @property
    def instruction_set(self) -> str:
        return self._library.isa

    def pack(self, weight: Tensor, precise: bool = False) -> PackedWeight:
        return self._packed(weight[None], Format.INT8 if precise and self._format is Format.INT4 else self._format)

    def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
        return self.pack_experts(1, [mlp])

    def pack_experts(self, number: int, experts: Iterable[Mlp]) -> SwigluWeights:
        gate_up, down = None, None
        for i, expert in enumerate(experts):
            both = in_turn(expert.gate, expert.up)
            if gate_up is None or down is None:
                gate_up = self._empty(number, both, self._format)
                down = self._empty(number, expert.down, self._format)
            self._library.pack(self._format, both, gate_up.data[i])
            self._library.pack(self._format, expert.down, down.data[i])
        assert gate_up is not None
        assert down is not None
        return SwigluWeights(gate_up, down)

    def pack_latent(self, w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
        # 8 bits at least: as with the projection into the latents, an error goes into all that a head sees.
        if self._format is Format.BF16:
            halves = (w_uk.transpose(1, 2), w_uk, w_uv)
            return LatentWeights(*(self._packed(half, Format.BF16) for half in halves))
        absorb = self._empty(len(w_uk), w_uk[0].T, Format.INT8_INPUTS)
        for weight, data in zip(w_uk, absorb.data, strict=True):
            self._library.pack(Format.INT8_INPUTS, weight.contiguous(), data)
        return LatentWeights(absorb, self._packed(w_uk, Format.INT8), self._packed(w_uv, Format.INT8))

    def _packed(self, weights: Tensor, format: Format) -> PackedWeight:
        """[n, out, in] -> one behind the other."""
        packed = self._empty(len(weights), weights[0], format)
        for weight, data in zip(weights, packed.data, strict=True):
            self._library.pack(format, weight.contiguous(), data)
        return packed

    def _empty(self, number: int, weight: Tensor, format: Format) -> PackedWeight:
        """Room for so many weights of this shape."""
        out_features, in_features = weight.shape
        size = self._library.packed_bytes(format, out_features, in_features)
        return PackedWeight(self._pages.empty(number, size), format, out_features, in_features)

    def linear(
        self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        weight = _packed_weight(weight)
        y = self._library.empty((len(x), weight.out_features), dtype=torch.bfloat16)
        self._library.linear(weight.format, x, weight.data, y, bias, residual)
        return y

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        weight = _packed_weight(weight)
        y = self._library.empty((len(x), weight.out_features), dtype=torch.float32)
        self._library.linear(weight.format, x, weight.data, y)
        return y

    def sample(self, logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        best = torch.empty(logits.shape[0], dtype=torch.int64)
        self._library.argmax(logits, best)
        if inputs is None:
            return best
        broken = best < 0
        logits[broken] = -torch.inf  # so that nothing is drawn there
        constrain(logits, inputs)
        drawn = torch.empty_like(best)
        columns = (
            *(inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p),
            *(inputs.seed.view(np.int64), inputs.position),
        )
        temperature, top_k, top_p, min_p, seed, position = map(torch.from_numpy, columns)
        self._library.draw(logits, temperature, top_k, top_p, min_p, seed, position, drawn)
        return torch.where((drawn < 0) & ~broken, NONE_LEFT, drawn)

    def gather(self, table: Tensor, index: Tensor) -> Tensor:
        y = self._library.empty((len(index), table.shape[1]), dtype=torch.bfloat16)
        self._library.gather(table, index, y)
        return y

    def rotation(self, positions: Tensor, frequencies: Tensor, amplitude: float) -> Rotation:
        shape = len(positions), len(frequencies)
        made = Rotation(
            self._library.empty(shape, dtype=torch.float32), self._library.empty(shape, dtype=torch.float32)
        )
        self._library.rotation(positions, frequencies, amplitude, *made)
        return made

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = self._library.empty(x.shape, dtype=torch.bfloat16)
        self._library.rms_norm(x, weight, eps, y)
        return y

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
        """q_rope is turned in place."""
        shape = AttentionShape(
            tokens=len(kv),
            cache=cache.data.data_ptr(),
            layers=cache.num_layers,
            block_size=BLOCK_SIZE,
            heads=q_rope.shape[1],
            rank=norm_weight.shape[0],
            rope=q_rope.shape[2],
        )
        self._library.rope_and_cache(
            shape, layer, kv, norm_weight, eps, rotation.cos, rotation.sin, slot_mapping, q_rope
        )
        return q_rope

    def attention(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> CpuAttention:
        return CpuAttention(self._library, step, cache, config)

    def recorded(self, network: Network, config: DeepseekConfig) -> Network:
        recorder = Recorder()
        library, self._library = self._library, recorder.library
        try:
            recording = recorder.record(network, config)
        finally:
            self._library = library
        return Replay(library, recording, config)

    def mlp(self, x: Tensor, weights: SwigluWeights, residual: Tensor) -> Tensor:
        gate_up, down = _packed_weight(weights.gate_up), _packed_weight(weights.down)
        width = down.in_features
        y = self._library.empty(residual.shape, dtype=torch.bfloat16)
        workspace = self._space(self._library.moe_workspace(len(x), x.shape[1], 0, 0, 0, width))
        self._library.mlp(gate_up.format, x, width, gate_up.data, down.data, residual, y, workspace)
        return y

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        tokens, per_token = len(x), config.num_experts_per_tok
        grouped = config.topk_method != "greedy" and config.n_group > 1
        shape = RouterShape(
            experts=config.n_routed_experts,
            groups=config.n_group if grouped else 1,
            top_groups=config.topk_group if grouped else 1,
            per_token=per_token,
            sigmoid=config.scoring_func == "sigmoid",
            two_best_per_group=config.topk_method == "noaux_tc",
            normalise=config.norm_topk_prob and per_token > 1,
            scaling=config.routed_scaling_factor,
        )
        routing = Routing(
            self._library.empty((tokens, per_token), dtype=torch.int32),
            self._library.empty((tokens, per_token), dtype=torch.float32),
        )
        workspace = self._space(self._library.router_workspace(tokens, config.n_routed_experts))
        self._library.router(shape, x, weight, correction_bias, *routing, workspace)
        return routing

    def moe(
        self, x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None, residual: Tensor
    ) -> Tensor:
        gate_up, down = _packed_weight(experts.gate_up), _packed_weight(experts.down)
        number, width, per_token = len(down.data), down.in_features, routing.experts.shape[1]
        also = None
        if shared is not None:
            shared_gate_up, shared_down = _packed_weight(shared.gate_up), _packed_weight(shared.down)
            also = shared_down.in_features, shared_gate_up.data, shared_down.data
        y = self._library.empty(residual.shape, dtype=torch.bfloat16)
        workspace = self._space(
            self._library.moe_workspace(len(x), x.shape[1], width, number, per_token, 0 if also is None else also[0])
        )
        self._library.moe(
            *(down.format, x, width, number, routing.experts, routing.weights, gate_up.data, down.data),
            *(also, residual, y, workspace),
        )
        return y

    def _space(self, size: int) -> Tensor:
        """Memory of one call; kept, since the next step needs as much."""
        if self._workspace.nbytes < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace


class CpuAttention:
    """`StepAttention`: the rows' shape is made once a step and serves all layers."""

    def __init__(self, library: Library, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> None:
        self._library = library
        self._value_width = config.v_head_dim
        self._rows = StepRows(step, cache, config)
        self._workspace = torch.empty(library.attention_workspace(self._rows.shape), dtype=torch.uint8)

    def __call__(self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights) -> Tensor:
        output = self._library.empty((*q_nope.shape[:2], self._value_width), dtype=torch.bfloat16)
        absorb, expand, value = map(_packed_weight, weights)
        self._library.attention(
            *(value.format, self._rows.shape, layer, q_nope, q_rope),
            *(absorb.data, expand.data, value.data, output, self._workspace),
        )
        return output


def _packed_weight(weight: LinearWeight) -> PackedWeight:
    assert isinstance(weight, PackedWeight)
    return weight
