"""Tiny random checkpoints for tests: hub files as the family publishes them, with weights that show errors.

Default-initialised tiny models hide wrong scales, swapped halves and wrong routing: everything is near uniform there.
These have spread-out routers, projections of about 1.6 / sqrt(fan_in), embeddings of 0.8, norm weights that are not
one, correction biases below zero and head widths that differ, so logits are of size 2.5 and every mistake moves them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import DeepseekConfig, expected_tensors, load_config

_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_V3: dict[str, Any] = _V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "num_nextn_predict_layers": 1,
}


def yarn(factor: float, mscale: float, mscale_all_dim: float, **overrides: Any) -> dict[str, Any]:
    """A `rope_scaling` of the hub; the original length is short so that test prompts go past it."""
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    } | overrides


_YARN_V2_LITE = {"rope_scaling": yarn(40, 0.707, 0.707), "max_position_embeddings": 5120}
_YARN_V3 = {"rope_scaling": yarn(40, 1.0, 1.0), "max_position_embeddings": 5120}
_K2_ROPE = {"rope_theta": 50000, "rope_scaling": yarn(32, 1.0, 1.0, beta_fast=1), "max_position_embeddings": 4096}
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}

KINDS: dict[str, dict[str, Any]] = {
    "v2": _V2,
    "v2-yarn": _V2 | _YARN_V2_LITE,
    "v2-grouped": _V2
    | _YARN_V3
    | {
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "v3": _V3 | _YARN_V3,
    "moonlight": _V3
    | _NO_GROUPS
    | {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "k2": _V3 | _NO_GROUPS | _K2_ROPE | {"model_type": "kimi_k2", "routed_scaling_factor": 2.827},
    "dense": _V2 | {"first_k_dense_replace": 3},
    "bias": _V2 | {"attention_bias": True, "q_lora_rank": 24},
    "tied": _V2 | {"tie_word_embeddings": True},
    "amp": _V2 | _YARN_V2_LITE | {"rope_scaling": yarn(40, 1.0, 0.5)},
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_config(kind: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of a kind; an override of `...` removes the key."""
    return {name: value for name, value in (KINDS[kind] | overrides).items() if value is not ...}


def make_checkpoint(
    path: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    router_dtype: torch.dtype | None = None,
    layout: str = "hub",
    shards: int = 1,
    seed: int = 0,
    tokenizer: Path | None = None,
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint of one of `KINDS` into `path` (made if needed) and returns `path`.

    The weights depend on seed and config only: the same in each dtype (rounded), layout and number of shards.
    `layout` is `hub` (a triple of tensors an expert) or `stacked` (as transformers 5 can write it). With several
    shards consecutive tensors lie in different files. `tokenizer` is a folder whose tokenizer files are copied; the
    vocabulary then covers it with a few unused rows, as in the published models, unless `vocab_size` is overridden.
    `generation` is added to generation_config.json; other keywords override keys of config.json (`...` removes one).
    """
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        overrides = _copy_tokenizer(tokenizer, path) | overrides
    values = make_config(kind, **overrides)
    values.setdefault("torch_dtype", str(dtype).removeprefix("torch."))
    (path / "config.json").write_text(json.dumps(values, indent=2))
    ids = {name: values[name] for name in ("bos_token_id", "eos_token_id") if name in values}
    (path / "generation_config.json").write_text(json.dumps(ids | (generation or {}), indent=2))
    config = load_config(path)
    tensors = random_weights(config, seed)
    for name, tensor in tensors.items():
        if name.endswith(".mlp.gate.weight"):
            tensors[name] = tensor.to(router_dtype or dtype)
        elif not name.endswith(".e_score_correction_bias"):  # float32 in every published file
            tensors[name] = tensor.to(dtype)
    write_tensors(path, stack_experts(tensors, config) if layout == "stacked" else tensors, shards)
    return path


def random_weights(config: DeepseekConfig, seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights in hub names, with the tensors of the multi-token-prediction layers that the config announces."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(config) | _mtp_tensors(config)
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def stack_experts(tensors: dict[str, Tensor], config: DeepseekConfig) -> dict[str, Tensor]:
    """The layout transformers 5 holds in memory: gate_up_proj [E, 2I, D] (gate rows first) and down_proj [E, D, I]."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix + "0.gate_proj.weight" not in tensors:
            continue
        experts = range(config.n_routed_experts)
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{expert}.{name}_proj.weight"] for expert in experts])
            for name in ("gate", "up", "down")
        )
        stacked |= {prefix + "gate_up_proj": torch.cat((gate, up), dim=1), prefix + "down_proj": down}
    return stacked


def write_tensors(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One `model.safetensors`, or shards and an index, named as DeepSeek-V2-Lite's: five digits, then six."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:06}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file, metadata)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder as they are in its files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise.mul_(0.2).sub_(1.0)
    if len(shape) == 1:
        return noise.mul_(0.1) if name.endswith(".bias") else noise.mul_(0.2).add_(1.0)
    if name.endswith("embed_tokens.weight"):
        return noise.mul_(0.8)
    scale = 2.0 if name.endswith("mlp.gate.weight") else 2.4 if name == "lm_head.weight" else 1.6
    return noise.mul_(scale / math.sqrt(shape[-1]))


def _mtp_tensors(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of DeepSeek-V3's multi-token-prediction layers: a decoder layer and its own projections."""
    last = f"model.layers.{config.num_hidden_layers - 1}."
    hidden, vocab = config.hidden_size, config.vocab_size
    extra = {
        "embed_tokens.weight": (vocab, hidden),
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocab, hidden),
    }
    layer = {name[len(last) :]: shape for name, shape in expected_tensors(config).items() if name.startswith(last)}
    return {
        f"model.layers.{config.num_hidden_layers + j}.{name}": shape
        for j in range(config.num_nextn_predict_layers)
        for name, shape in (layer | extra).items()
    }


def _copy_tokenizer(source: Path, path: Path) -> dict[str, Any]:
    """Copies the tokenizer's files; returns what config.json has to say about it."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, path / name)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    overrides: dict[str, Any] = {"vocab_size": max(ids.values()) + 1 + 8}
    names = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token"):
        token = names.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            overrides[f"{name}_id"] = ids[token]
    return overrides
