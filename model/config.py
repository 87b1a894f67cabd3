"""What a checkpoint's `config.json` says, checked: every number the network is built from, and nothing guessed.

Names are those of the papers (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437). Two spellings exist for
several fields, that of DeepSeek's own repositories and that of transformers 5; both are read. What cannot be computed
rightly is refused with one line that names the file and the field. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.json_file import REQUIRED, Fields, read_json_object, shown
from model.json_file import CheckpointError as CheckpointError
from model.rope_config import RopeConfig, read_rope

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
MAX_EXPERTS = 1 << 16
"""Routed experts of all layers together (Kimi-K2, the largest, has 23,040): bounds the names to be checked."""
FP8_SCALE_BYTES = 4
"""Of a token's latent where the cache has it in 8 bits a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig:
    """The network's numbers. Linear weights are [out, in]; H = heads, D = hidden size, E = routed experts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense layers' feed-forward."""
    moe_intermediate_size: int
    """Width of ONE expert."""
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    """0: none. They are one feed-forward of width n_shared_experts * moe_intermediate_size."""
    n_routed_experts: int
    """0: every layer is dense."""
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    """`greedy`, `group_limited_greedy` or `noaux_tc`."""
    scoring_func: str
    """`softmax` or `sigmoid`."""
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    q_lora_rank: int | None
    """None: the query is one full projection, `q_proj`."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    """Of the block norms and the final norm only: the two latent norms use 1e-6 whatever stands here."""
    attention_bias: bool
    """Biases on q_a_proj, kv_a_proj_with_mqa and o_proj."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    num_nextn_predict_layers: int
    """Multi-token-prediction layers appended to the file as layers num_hidden_layers and up: not served."""
    eos_token_ids: tuple[int, ...]
    """Of config.json, then those that generation_config.json adds."""
    bos_token_id: int | None
    dtype: str | None
    """What the file says of itself; advisory, the tensors are trusted."""
    fp8_block: tuple[int, int] | None = None
    """Rows and columns of the blocks that share a scale, where weights may be fp8."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached a token and layer: the normalised latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times m(factor, mscale_all_dim)^2 under YaRN; the same in the absorbed form."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        yarn = self.rope.yarn
        return scale if yarn is None else scale * yarn.magnitude(yarn.mscale_all_dim) ** 2

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in expected_tensors(self).values())

    def num_active_parameters(self) -> int:
        """Parameters multiplied for one token: without the experts it is not routed to, and without the embedding
        table (one row is looked up, nothing is multiplied) unless that is the output projection too."""
        idle_experts = self.num_moe_layers * (self.n_routed_experts - self.num_experts_per_tok)
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.num_parameters() - idle_experts * 3 * self.moe_intermediate_size * self.hidden_size - lookup

    def cache_bytes_per_token(self, itemsize: int, fp8: bool = False) -> int:
        """In numbers of `itemsize` bytes; `fp8`: latents in 8 bits with a scale, keys as otherwise."""
        latent = self.kv_lora_rank + FP8_SCALE_BYTES if fp8 else self.kv_lora_rank * itemsize
        return (latent + self.qk_rope_head_dim * itemsize) * self.num_hidden_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults of generation_config.json; None where the file says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None
    """False asks for greedy decoding."""


def load_config(model_dir: Path) -> DeepseekConfig:
    """Reads config.json (and the eos ids of generation_config.json) of a checkpoint folder.

    Raises CheckpointError, one line naming file and field, for whatever cannot be computed rightly.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such folder")
    file = model_dir / "config.json"
    fields = Fields(file, read_json_object(file))
    _refuse_unsupported(fields)
    model_type = fields.text("model_type")
    is_v3 = model_type != "deepseek_v2"
    vocab_size = fields.integer("vocab_size", 1, 1 << 22)
    num_hidden_layers = fields.integer("num_hidden_layers", 1, 1024)
    num_attention_heads = fields.integer("num_attention_heads", 1, 4096)
    if fields.integer("num_key_value_heads", 1, 4096, num_attention_heads) != num_attention_heads:
        raise fields.fail("num_key_value_heads", f"must equal num_attention_heads, {num_attention_heads}")
    if "q_lora_rank" not in fields.values:
        # The original class has 1536 as default, so absence does not mean "no low-rank query".
        raise fields.fail("q_lora_rank", "is missing (null means a full query projection)")
    qk_rope_head_dim = fields.integer("qk_rope_head_dim", 2, 4096)
    if qk_rope_head_dim % 2:
        raise fields.fail("qk_rope_head_dim", f"must be even, not {qk_rope_head_dim}")
    eos_token_ids = fields.token_ids("eos_token_id", vocab_size)
    generation = _generation_fields(model_dir)
    if generation is not None:
        eos_token_ids += generation.token_ids("eos_token_id", vocab_size)
    return DeepseekConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", 1, 1 << 17),
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        q_lora_rank=fields.integer("q_lora_rank", 0, 1 << 16, None) or None,
        kv_lora_rank=fields.integer("kv_lora_rank", 1, 1 << 16),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1, 4096),
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=fields.integer("v_head_dim", 1, 4096),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1, 1e-6),
        attention_bias=fields.flag("attention_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 24, 4096 if is_v3 else 2048),
        rope=read_rope(fields),
        num_nextn_predict_layers=fields.integer(
            fields.first_of("num_nextn_predict_layers", "num_mtp_layers"), 0, 64, 0
        ),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        dtype=fields.text(fields.first_of("dtype", "torch_dtype"), None),
        fp8_block=_read_fp8_block(fields),
        **_read_moe(fields, num_hidden_layers, is_v3),
    )


def load_generation_defaults(model_dir: Path) -> GenerationDefaults:
    """Sampling defaults of generation_config.json; all None without the file."""
    fields = _generation_fields(model_dir)
    if fields is None:
        return GenerationDefaults()
    return GenerationDefaults(
        temperature=fields.number("temperature", 0.0, 100.0, None),
        top_p=fields.number("top_p", 1e-9, 1.0, None),
        top_k=fields.integer("top_k", 0, 1 << 22, None),
        repetition_penalty=fields.number("repetition_penalty", 1e-3, 100.0, None),
        do_sample=fields.flag("do_sample", None),
    )


def expected_tensors(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the network needs: hub name -> shape, in the order of the network."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        if config.q_lora_rank is None:
            tensors[attention + "q_proj.weight"] = (heads * config.qk_head_dim, hidden)
        else:
            tensors[attention + "q_a_proj.weight"] = (config.q_lora_rank, hidden)
            tensors[attention + "q_a_layernorm.weight"] = (config.q_lora_rank,)
            tensors[attention + "q_b_proj.weight"] = (heads * config.qk_head_dim, config.q_lora_rank)
        tensors[attention + "kv_a_proj_with_mqa.weight"] = (config.latent_dim, hidden)
        tensors[attention + "kv_a_layernorm.weight"] = (config.kv_lora_rank,)
        tensors[attention + "kv_b_proj.weight"] = (
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            config.kv_lora_rank,
        )
        tensors[attention + "o_proj.weight"] = (hidden, heads * config.v_head_dim)
        if config.attention_bias:
            if config.q_lora_rank is not None:
                tensors[attention + "q_a_proj.bias"] = (config.q_lora_rank,)
            tensors[attention + "kv_a_proj_with_mqa.bias"] = (config.latent_dim,)
            tensors[attention + "o_proj.bias"] = (hidden,)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        tensors |= _feed_forward_tensors(config, layer, prefix + "mlp.")
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def _feed_forward_tensors(config: DeepseekConfig, layer: int, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size

    def gated(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}gate_proj.weight": (width, hidden),
            f"{name}up_proj.weight": (width, hidden),
            f"{name}down_proj.weight": (hidden, width),
        }

    if not config.is_moe_layer(layer):
        return gated(prefix, config.intermediate_size)
    tensors: dict[str, tuple[int, ...]] = {prefix + "gate.weight": (config.n_routed_experts, hidden)}
    if config.topk_method == "noaux_tc":
        tensors[prefix + "gate.e_score_correction_bias"] = (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        tensors |= gated(f"{prefix}experts.{expert}.", config.moe_intermediate_size)
    if config.n_shared_experts:
        tensors |= gated(prefix + "shared_experts.", config.n_shared_experts * config.moe_intermediate_size)
    return tensors


def _refuse_unsupported(fields: Fields) -> None:
    values = fields.values
    for name in ("text_config", "language_config", "vision_config"):
        if values.get(name):
            raise fields.fail(name, "multimodal checkpoints are not supported")
    model_type = fields.text("model_type")
    if model_type not in MODEL_TYPES:
        raise fields.fail("model_type", f"{shown(model_type)} is not supported (only {', '.join(MODEL_TYPES)})")
    architectures = values.get("architectures") or [ARCHITECTURES[0]]
    if not isinstance(architectures, list) or architectures[0] not in ARCHITECTURES:
        raise fields.fail("architectures", f"{shown(architectures)} is not one of {', '.join(ARCHITECTURES)}")
    if values.get("index_topk") is not None:
        raise fields.fail("index_topk", "sparse attention (DeepSeek-V3.2) is not supported")
    if not fields.flag("use_mla", True):
        raise fields.fail("use_mla", "only multi-head latent attention is supported")
    if fields.flag("mlp_bias", False):
        raise fields.fail("mlp_bias", "biases in feed-forward layers are not supported")
    if not fields.flag("rope_interleave", True):
        raise fields.fail("rope_interleave", "false (weights in half layout) is not supported")
    if (activation := fields.text("hidden_act", "silu")) != "silu":
        raise fields.fail("hidden_act", f"must be silu, not {shown(activation)}")


def _read_fp8_block(fields: Fields) -> tuple[int, int] | None:
    """`quantization_config` as DeepSeek-V3 and its descendants have it. How they quantise activations is their way to
    be fast; the weights are the same without."""
    values = fields.values.get("quantization_config")
    if values is None:
        return None
    method = values.get("quant_method") if isinstance(values, dict) else values
    if method != "fp8":
        raise fields.fail(
            "quantization_config", f"weights quantised so are not supported (quant_method {shown(method)})"
        )
    quantization = Fields(fields.file, values, "quantization_config.")
    if (fmt := quantization.text("fmt", "e4m3")) != "e4m3":
        raise quantization.fail("fmt", f"{shown(fmt)} is not supported (only e4m3)")
    block = values.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= 1 << 16 for n in block):
        raise quantization.fail("weight_block_size", f"must be rows and columns of a block, not {shown(block)}")
    return block[0], block[1]


def _read_moe(fields: Fields, num_hidden_layers: int, is_v3: bool) -> dict[str, Any]:
    """The router and the experts. DeepSeek-V2 routes by softmax, V3 by sigmoid with a correction bias."""
    scoring_func = fields.text("scoring_func", "sigmoid" if is_v3 else "softmax")
    if scoring_func != ("sigmoid" if is_v3 else "softmax"):
        raise fields.fail("scoring_func", f"{shown(scoring_func)} is not supported with this model_type")
    topk_method = fields.text("topk_method", "noaux_tc" if is_v3 else "greedy")
    if topk_method == "gready":  # the default of DeepSeek's own configuration class
        topk_method = "greedy"
    if topk_method not in (("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")):
        raise fields.fail("topk_method", f"{shown(topk_method)} is not supported with this model_type")
    experts_name = fields.first_of("n_routed_experts", "num_local_experts", "num_experts")
    if experts_name not in fields.values:
        raise fields.fail(experts_name, "is missing (null means a dense model)")
    experts = fields.integer(experts_name, 0, MAX_EXPERTS, 0)
    needed = REQUIRED if experts else 0
    per_token = fields.integer("num_experts_per_tok", 1, MAX_EXPERTS, needed) if experts else 0
    grouped = experts > 0 and topk_method != "greedy"
    n_group = fields.integer("n_group", 1, MAX_EXPERTS) if grouped else 1
    topk_group = fields.integer("topk_group", 1, n_group) if grouped else 1
    if experts:
        if experts * num_hidden_layers > MAX_EXPERTS:
            raise fields.fail(
                experts_name, f"{experts} in {num_hidden_layers} layers are more than {MAX_EXPERTS} experts"
            )
        if experts % n_group:
            raise fields.fail("n_group", f"{n_group} does not divide n_routed_experts, {experts}")
        if is_v3 and experts // n_group < 2:
            raise fields.fail("n_group", f"{n_group} groups of {experts} experts: noaux_tc needs two experts a group")
        if per_token > topk_group * (experts // n_group):
            raise fields.fail(
                "num_experts_per_tok",
                f"{per_token} is more than the {topk_group * (experts // n_group)} experts that can be selected",
            )
    return {
        "moe_intermediate_size": fields.integer("moe_intermediate_size", 1, 1 << 20, needed),
        "n_shared_experts": fields.integer("n_shared_experts", 0, 64, 0),
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "n_group": n_group,
        "topk_group": topk_group,
        "topk_method": topk_method,
        "scoring_func": scoring_func,
        "norm_topk_prob": fields.flag("norm_topk_prob", is_v3),
        "routed_scaling_factor": fields.number("routed_scaling_factor", 1e-6, 1e6, 2.5 if is_v3 else 1.0),
        "first_k_dense_replace": fields.integer("first_k_dense_replace", 0, num_hidden_layers, needed),
        "moe_layer_freq": fields.integer("moe_layer_freq", 1, 1024, 1),
    }


def _generation_fields(model_dir: Path) -> Fields | None:
    file = model_dir / "generation_config.json"
    return Fields(file, read_json_object(file)) if file.exists() else None
