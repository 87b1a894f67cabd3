"""The operations the network is written against; `model/ops/eager`, `cpu` and `cuda` implement them alike.

T tokens of a step lie ragged in one batch (see `StepInputs`); D hidden_size, H heads, r kv_lora_rank,
dn / dr / dv the head widths, E experts of width I, k experts a token. Weights are [out, in].
Activations have the run dtype (float32, bfloat16 or float16) unless float32 is named; sums over keys,
experts and norms are accumulated in float32 whatever the run dtype is.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import LatentCache
from model.rotary import Rotation


class SwigluWeights(NamedTuple):
    """down(silu(gate x) * up x)."""

    gate: Tensor
    """[I, D]"""
    up: Tensor
    """[I, D]"""
    down: Tensor
    """[D, I]"""


class Routing(NamedTuple):
    experts: Tensor
    """[T, k] int64: the chosen experts of each token, all different."""
    weights: Tensor
    """[T, k] float32: normalised and scaled as the config says."""


class StepAttention(Protocol):
    """Attention of one step: what depends only on the step's rows was prepared when it was made."""

    def __call__(self, layer: int, q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor) -> Tensor:
        """q_nope [T, H, dn], q_rope [T, H, dr] (rotated), w_uk [H, dn, r], w_uv [H, dv, r] -> [T, H, dv].

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

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
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

    def mlp(self, x: Tensor, weights: SwigluWeights) -> Tensor:
        """[T, D] -> [T, D]."""
        ...

    def router(self, x: Tensor, weight: Tensor, correction_bias: Tensor | None, config: DeepseekConfig) -> Routing:
        """x [T, D], weight [E, D] float32, correction_bias [E] float32 (noaux_tc only); all of it in float32."""
        ...

    def moe(
        self, x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor, shared: SwigluWeights | None
    ) -> Tensor:
        """Weighted sum of each token's experts (gate_up_proj [E, 2I, D], gate rows first; down_proj [E, D, I])
        plus the shared experts, which are one MLP, unscaled. [T, D] -> [T, D].
        """
        ...
