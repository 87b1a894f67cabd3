"""config.json: published shapes are read as published, what cannot be computed rightly is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from model.config import (
    CheckpointError,
    DeepseekConfig,
    GenerationDefaults,
    expected_tensors,
    load_config,
    load_generation_defaults,
)
from tests.checkpoints import KINDS, make_config, yarn

PUBLISHED_YARN = {"original_max_position_embeddings": 4096}
PUBLISHED_WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V2_LITE = PUBLISHED_WIDTHS | {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "intermediate_size": 10944,
    "rope_scaling": yarn(40, 0.707, 0.707, **PUBLISHED_YARN),
    "max_position_embeddings": 163840,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "q_lora_rank": 1536,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
}
V3 = V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "topk_group": 4,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "rope_scaling": yarn(40, 1.0, 1.0, **PUBLISHED_YARN),
}


def read(path: Path, kind: str = "v2", **overrides: Any) -> DeepseekConfig:
    (path / "config.json").write_text(json.dumps(make_config(kind, **overrides)))
    return load_config(path)


@pytest.mark.parametrize(
    ("kind", "values", "parameters", "active", "cache", "scale"),
    [
        ("v2", V2_LITE, 15_706_484_224, 2.4e9, 31_104, 0.11472139),
        ("v2-grouped", V2, 235_741_434_880, 21e9, 69_120, 0.11472139),
        ("v3", V3, 671_026_419_200, 37e9, 70_272, 0.13523378),
    ],
)
def test_published_models_have_their_published_numbers(
    tmp_path: Path, kind: str, values: dict[str, Any], parameters: int, active: float, cache: int, scale: float
) -> None:
    config = read(tmp_path, kind, **values)
    assert config.num_parameters() == parameters
    assert config.num_active_parameters() == pytest.approx(active, rel=0.025)
    assert config.cache_bytes_per_token(2) == cache
    assert config.softmax_scale == pytest.approx(scale, abs=5e-9)
    assert (config.qk_head_dim, config.latent_dim) == (192, 576)


def test_v2_lite_has_as_many_tensors_as_its_file(tmp_path: Path) -> None:
    tensors = expected_tensors(read(tmp_path, **V2_LITE))
    assert len(tensors) == 5291
    assert tensors["model.layers.0.self_attn.q_proj.weight"] == (3072, 2048)
    assert tensors["model.layers.26.self_attn.kv_b_proj.weight"] == (4096, 512)
    assert tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (2816, 2048)
    assert tensors["model.layers.0.mlp.down_proj.weight"] == (2048, 10944)


@pytest.mark.parametrize(
    ("rope", "scale"),
    [
        ({"rope_scaling": None}, 0.07216878),
        ({"rope_scaling": yarn(32, 1.0, 1.0, beta_fast=1), "rope_theta": 50000}, 0.13086080),
        ({"rope_scaling": yarn(64, 1.0, 1.0), "rope_theta": 50000}, 0.14467963),
        ({"rope_scaling": yarn(40, 1.0, 0.0)}, 0.07216878),
    ],
)
def test_softmax_scale(tmp_path: Path, rope: dict[str, Any], scale: float) -> None:
    assert read(tmp_path, **PUBLISHED_WIDTHS, **rope).softmax_scale == pytest.approx(scale, abs=5e-9)


def test_amplitude_of_the_rotation_is_one_where_the_mscales_agree(tmp_path: Path) -> None:
    amplitudes = {
        mscales: read(tmp_path, rope_scaling=yarn(40, *mscales)).rope.yarn.amplitude  # type: ignore[union-attr]
        for mscales in [(0.707, 0.707), (1.0, 0.5), (1.0, 0.0)]
    }
    assert amplitudes == {
        (0.707, 0.707): 1.0,
        (1.0, 0.5): pytest.approx(1.1557220),
        (1.0, 0.0): pytest.approx(1.3688879),
    }


def test_both_spellings_of_the_rotation_say_the_same(tmp_path: Path) -> None:
    scaling = yarn(40, 0.707, 0.707)
    hub = read(tmp_path, rope_theta=50000, rope_scaling=scaling)
    both = {"rope_theta": 50000, "rope_type": "yarn"} | scaling
    spellings: list[dict[str, Any]] = [
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": both},
        {"rope_theta": 50000, "rope_scaling": {}, "rope_parameters": {**scaling, "type": "yarn"}},
        {"rope_theta": 50000, "rope_scaling": scaling, "rope_parameters": both},
        {"rope_theta": 10000, "rope_scaling": both},
        {"rope_theta": 50000, "rope_scaling": {**scaling, "attention_factor": 1.0, "truncate": True}},
    ]
    for spelling in spellings:
        assert read(tmp_path, **spelling) == hub, spelling
    plain = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}
    assert read(tmp_path, **plain).rope == replace(hub.rope, theta=7000.0, yarn=None)


def test_aliases_and_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, q_lora_rank=0).q_lora_rank is None
    assert read(tmp_path, n_shared_experts=None).n_shared_experts == 0
    assert read(tmp_path, topk_method="gready").topk_method == "greedy"
    assert read(tmp_path, dtype="bfloat16").dtype == read(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(tmp_path, "v3", num_nextn_predict_layers=..., num_mtp_layers=2).num_nextn_predict_layers == 2
    for kind in ("v2", "v3"):
        named = ("topk_method", "scoring_func", "norm_topk_prob", "moe_layer_freq", "rms_norm_eps", "attention_bias")
        named += ("tie_word_embeddings", "hidden_act", "architectures", "num_key_value_heads", "rope_theta")
        assert read(tmp_path, kind, **dict.fromkeys(named, ...)) == read(tmp_path, kind)


def test_layers_are_dense_or_experts_as_the_original_class_has_it(tmp_path: Path) -> None:
    config = read(tmp_path, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe_layer(layer) for layer in range(6)] == [False, False, True, False, True, False]
    dense = read(tmp_path, n_routed_experts=None, first_k_dense_replace=..., num_experts_per_tok=...)
    assert dense.num_moe_layers == 0
    assert not any("experts" in name for name in expected_tensors(dense))


def test_active_parameters_of_a_tied_model_count_the_output_projection(tmp_path: Path) -> None:
    assert read(tmp_path).num_active_parameters() == read(tmp_path, "tied").num_active_parameters()
    assert read(tmp_path).num_parameters() - read(tmp_path, "tied").num_parameters() == 256 * 64


def test_end_tokens_of_both_files_are_merged(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert read(tmp_path, eos_token_id=3).eos_token_ids == (3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.3, "top_p": 0.95}')
    assert read(tmp_path, eos_token_id=[9, 4]).eos_token_ids == (9, 4, 5)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == (5,)
    assert load_generation_defaults(tmp_path) == GenerationDefaults(temperature=0.3, top_p=0.95)
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, eos_token_id=...).eos_token_ids == ()
    assert load_generation_defaults(tmp_path) == GenerationDefaults()


REQUIRED = (
    "model_type vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "n_routed_experts num_experts_per_tok first_k_dense_replace q_lora_rank kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim"
)


@pytest.mark.parametrize("field", [*REQUIRED.split(), "n_group", "topk_group"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}: is missing"):
        read(tmp_path, "v3", **{field: ...})


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("model_type", "v2", {"model_type": "deepseek"}),
    ("model_type", "v2", {"model_type": "deepseek_v32"}),
    ("model_type", "v2", {"model_type": 3}),
    ("architectures", "v2", {"architectures": ["KimiK25ForConditionalGeneration"]}),
    ("architectures", "v2", {"architectures": "DeepseekV2ForCausalLM"}),
    ("language_config", "v2", {"language_config": {"model_type": "deepseek_v2"}}),
    ("index_topk", "v3", {"index_topk": 2048}),
    ("quantization_config.weight_block_size", "v3", {"quantization_config": {"quant_method": "fp8"}}),
    (
        "quantization_config.weight_block_size",
        "v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
    ),
    (
        "quantization_config.fmt",
        "v3",
        {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}},
    ),
    ("quantization_config", "v2", {"quantization_config": {"quant_method": "awq"}}),
    ("use_mla", "v2", {"use_mla": False}),
    ("mlp_bias", "v2", {"mlp_bias": True}),
    ("rope_interleave", "v3", {"rope_interleave": False}),
    ("hidden_act", "v2", {"hidden_act": "gelu"}),
    ("vocab_size", "v2", {"vocab_size": True}),
    ("vocab_size", "v2", {"vocab_size": 256.0}),
    ("vocab_size", "v2", {"vocab_size": "256"}),
    ("vocab_size", "v2", {"vocab_size": 0}),
    ("hidden_size", "v2", {"hidden_size": 10**9}),
    ("num_hidden_layers", "v2", {"num_hidden_layers": 10**6}),
    ("n_routed_experts", "v2", {"n_routed_experts": 60_000}),
    ("num_key_value_heads", "v2", {"num_key_value_heads": 2}),
    ("qk_rope_head_dim", "v2", {"qk_rope_head_dim": 15}),
    ("kv_lora_rank", "v2", {"kv_lora_rank": None}),
    ("rms_norm_eps", "v2", {"rms_norm_eps": 0}),
    ("rms_norm_eps", "v2", {"rms_norm_eps": float("nan")}),
    ("routed_scaling_factor", "v2", {"routed_scaling_factor": float("inf")}),
    ("norm_topk_prob", "v2", {"norm_topk_prob": 1}),
    ("attention_bias", "v2", {"attention_bias": "no"}),
    ("scoring_func", "v2", {"scoring_func": "sigmoid"}),
    ("scoring_func", "v3", {"scoring_func": "softmax"}),
    ("topk_method", "v2", {"topk_method": "noaux_tc"}),
    ("topk_method", "v3", {"topk_method": "greedy"}),
    ("n_group", "v3", {"n_group": 3}),
    ("n_group", "v3", {"n_group": 16, "topk_group": 8}),
    ("n_group", "v3", {"n_group": None}),
    ("topk_group", "v2-grouped", {"topk_group": 5}),
    ("num_experts_per_tok", "v2", {"num_experts_per_tok": 17}),
    ("num_experts_per_tok", "v3", {"num_experts_per_tok": 9}),
    ("first_k_dense_replace", "v2", {"first_k_dense_replace": 4}),
    ("moe_layer_freq", "v2", {"moe_layer_freq": [0, 1, 1]}),
    ("eos_token_id", "v2", {"eos_token_id": 256}),
    ("eos_token_id", "v2", {"eos_token_id": [1, "2"]}),
    ("rope_theta", "v2", {"rope_theta": 1}),
    ("rope_scaling", "v2", {"rope_scaling": [40]}),
    ("rope_scaling", "v2-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
    ("rope_scaling.rope_type", "v2", {"rope_scaling": {"type": "linear", "factor": 4}}),
    ("rope_scaling.factor", "v2", {"rope_scaling": yarn(0.5, 1.0, 1.0)}),
    ("rope_scaling.original_max_position_embeddings", "v2", {"rope_scaling": {"type": "yarn", "factor": 40}}),
    ("rope_scaling.mscale", "v2", {"rope_scaling": yarn(40, 1.0, 1.0) | {"mscale": None}}),
    ("rope_scaling.mscale", "v2", {"rope_scaling": yarn(40, 1.0, 1.0) | {"mscale_all_dim": None}}),
    ("rope_scaling.attention_factor", "v2", {"rope_scaling": yarn(40, 1.0, 1.0, attention_factor=1.4)}),
    ("rope_scaling.truncate", "v2", {"rope_scaling": yarn(40, 1.0, 1.0, truncate=False)}),
    ("rope_scaling.extrapolation_factor", "v2", {"rope_scaling": yarn(40, 1.0, 1.0, extrapolation_factor=2)}),
    ("rope_scaling.partial_rotary_factor", "v2", {"rope_scaling": yarn(40, 1.0, 1.0, partial_rotary_factor=0.5)}),
    ("rope_parameters.mrope_section", "v2", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}),
]


@pytest.mark.parametrize(("field", "kind", "overrides"), REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, field: str, kind: str, overrides: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, kind, **overrides)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.json: {field}: ")
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * ((16 << 20) + 1), "larger than 16 MiB"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{problem}"):
        load_config(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        load_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('{"temperature": -1}', "temperature"),
        ('{"top_p": 1.5}', "top_p"),
        ('{"top_p": 0}', "top_p"),
        ('{"top_k": 1.5}', "top_k"),
        ('{"repetition_penalty": 0}', "repetition_penalty"),
        ('{"do_sample": 1}', "do_sample"),
    ],
)
def test_generation_defaults_out_of_range(tmp_path: Path, content: str, field: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}: must be"):
        load_generation_defaults(tmp_path)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"k2"}))  # transformers has no kimi_k2
def test_what_transformers_writes_is_read_as_what_it_read(tmp_path: Path, kind: str) -> None:
    config = read(tmp_path, kind)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    ignored = {"num_nextn_predict_layers": 0, "dtype": None}
    assert replace(load_config(tmp_path), **ignored) == replace(config, **ignored)
