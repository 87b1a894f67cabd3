"""The operations the network is written against; `model/ops/eager`, `cpu` and `cuda` implement them alike.

T tokens of a step lie ragged in one batch (see `StepInputs`); D hidden_size, H heads, r kv_lora_rank,
dn / dr / dv the head widths, E experts of width I, k experts a token. Weights are [out, in].
Activations have the run dtype (float32, bfloat16 or float16) unless float32 is named; sums over keys,
experts and norms are accumulated in float32 whatever the run dtype is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import LatentCache
from model.rotary import Rotation
from model.sampler import SamplingInputs


class PackedWeight(NamedTuple):
    """A weight as the kernels of one implementation read it; nobody else looks inside."""

    data: Tensor
    """[bytes] uint8"""
    format: int
    out_features: int
    in_features: int


LinearWeight = Tensor | PackedWeight | tuple[Tensor, ...]
"""[out, in], or several of them one behind the other: what `Ops.pack` made of a checkpoint's tensor."""


def unpacked(weight: LinearWeight) -> Tensor:
    """A weight that `pack` has left a tensor."""
    assert isinstance(weight, Tensor)
    return weight


class Mlp(NamedTuple):
    """down(silu(gate x) * up x), as a checkpoint has it."""

    gate: Tensor
    """[I, D]"""
    up: Tensor
    """[I, D]"""
    down: Tensor
    """[D, I]"""


class SwigluWeights(NamedTuple):
    """One MLP or E experts, as an implementation has them."""

    gate_up: LinearWeight
    """[2I, D], gate rows first; experts [E, 2I, D]"""
    down: LinearWeight
    """[D, I]; experts [E, D, I]"""


def stacked(number: int, experts: Iterable[Mlp]) -> SwigluWeights:
    """Experts that stay tensors, copied one by one: gate_up [E, 2I, D] and down [E, D, I]."""
    gate_up, down = None, None
    for i, expert in enumerate(experts):
        if gate_up is None or down is None:
            width, hidden = expert.gate.shape
            gate_up = expert.gate.new_empty(number, 2 * width, hidden)
            down = expert.down.new_empty(number, hidden, width)
        torch.cat((expert.gate, expert.up), out=gate_up[i])
        down[i] = expert.down
    assert gate_up is not None
    assert down is not None
    return SwigluWeights(gate_up, down)


class LatentWeights(NamedTuple):
    """kv_b_proj by head: W_UK rebuilds keys from latents, W_UV values (DeepSeek-V2, 2.1.2)."""

    absorb: LinearWeight
    """[H, r, dn]: W_UK transposed; carries queries into the latent space."""
    expand: LinearWeight
    """[H, dn, r]: W_UK"""
    value: LinearWeight
    """[H, dv, r]: W_UV"""


def by_head(w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
    """Weights that stay tensors: copies, since a batched product over heads would copy strided views in every step."""
    expand = w_uk.contiguous()
    return LatentWeights(expand.transpose(1, 2), expand, w_uv.contiguous())


Network = Callable[[StepInputs, LatentCache], tuple[Tensor, Tensor]]
"""`DeepseekForCausalLM.compute`: final hidden states [T, D] of a step's tokens and logits [S, vocab_size] float32."""


class Routing(NamedTuple):
    experts: Tensor
    """[T, k] integers: the chosen experts of each token, all different."""
    weights: Tensor
    """[T, k] float32: normalised and scaled as the config says."""


class StepAttention(Protocol):
    """Attention of one step: what depends only on the step's rows was prepared when it was made."""

    def __call__(self, layer: int, q_nope: Tensor, q_rope: Tensor, weights: LatentWeights) -> Tensor:
        """q_nope [T, H, dn], q_rope [T, H, dr] (rotated) -> [T, H, dv].

        Every token sees the tokens of its row at its own position and before, all read from the latent
        cache (`rope_and_cache` of this layer ran before). How is the implementation's choice, row by row:
        `mla_attention`, absorbed (DeepSeek-V2, 2.1.2: queries are carried into the latent space, nothing is
        expanded; the only form for decoding), or `mla_prefill`, expanded (keys and values are rebuilt from
        latents; fewer operations for long chunks).
        """
        ...


class Ops(Protocol):
    @property
    def name(self) -> str:
        """`eager`, `cpu` or `cuda`."""
        ...

    @property
    def quantization(self) -> str:
        """What `pack`, `pack_swiglu` and `pack_experts` round weights to: `none`, `int8` or `int4`."""
        ...

    @property
    def prefill_attention(self) -> str | None:
        """Who computes the attention of long prompts, `cudnn` or `triton`; None where nobody had to choose."""
        ...

    @property
    def packing(self) -> str | None:
        """What decides the bytes of packed weights besides the weights; None where packing leaves them tensors."""
        ...

    @property
    def decode_sizes(self) -> Sequence[int]:
        """Numbers of rows whose decoding steps `recorded` keeps ready, each from its first time on."""
        ...

    def pack(self, weight: Tensor, precise: bool = False) -> LinearWeight:
        """[out, in] as `linear` wants it; perhaps the same tensor. The caller drops its own. A `precise` one is rounded
        to no fewer than 8 bits."""
        ...

    def pack_swiglu(self, mlp: Mlp) -> SwigluWeights:
        """As `mlp`, and `moe` for its shared experts, want it; likewise."""
        ...

    def pack_experts(self, number: int, experts: Iterable[Mlp]) -> SwigluWeights:
        """`number` experts as `moe` wants them, taken one by one."""
        ...

    def pack_latent(self, w_uk: Tensor, w_uv: Tensor) -> LatentWeights:
        """w_uk [H, dn, r] and w_uv [H, dv, r] as `attention` wants them, likewise, perhaps in 8 bits; strided views are
        welcome."""
        ...

    def recorded(self, network: Network, config: DeepseekConfig) -> Network:
        """The same function of steps of any size; it runs the network here, once at most, to see its operations, and
        then does them without it. What it returns may be overwritten by its next call."""
        ...

    def linear(
        self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [T, in] -> [T, out], on top of residual [T, out]."""
        ...

    def logits(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """x [S, in] -> [S, out] float32."""
        ...

    def sample(self, logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        """See `model.sampler.sample`."""
        ...

    def gather(self, table: Tensor, index: Tensor) -> Tensor:
        """table [N, D], index [M] int64 -> [M, D]"""
        ...

    def rotation(self, positions: Tensor, frequencies: Tensor, amplitude: float) -> Rotation:
        """See `model.rotary.rotation`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32."""
        ...

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
        """Writes the step's latents: kv [T, r + dr] is split in latent and shared key, the latent is normed
        (norm_weight [r]), the key rotated, both go to `slot_mapping` of the layer. Returns q_rope [T, H, dr]
        rotated. Pairs are interleaved, (x[2i], x[2i + 1]), in and out.
        """
        ...

    def attention(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> StepAttention:
        """Prepares what all layers' attention of this step share; called once a step."""
        ...

    def mlp(self, x: Tensor, weights: SwigluWeights, residual: Tensor) -> Tensor:
        """[T, D] -> [T, D], on top of residual [T, D]."""
        ...

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        """x [T, D], weight [E, D] float32, correction_bias [E] float32 (noaux_tc only); all of it in float32."""
        ...

    def moe(
        self, x: Tensor, routing: Routing, experts: SwigluWeights, shared: SwigluWeights | None, residual: Tensor
    ) -> Tensor:
        """Weighted sum of each token's experts plus the shared experts, which are one MLP, unscaled, on top of
        residual [T, D]. [T, D] -> [T, D].
        """
        ...
