"""Weights rounded to 8 and 4 bits, and latents to 8: what that costs the built-in model's answers, that they stay what
they are however they are computed, and what is said where it cannot be done."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.batch import SamplingParams
from model.deepseek import DeepseekForCausalLM, DeepseekMLP
from model.memory import weight_bytes_in
from model.ops.cpu.library import library
from model.ops.interface import LinearWeight, PackedWeight
from model.pool_size import ConfigError
from model.runner import ModelRunner, load_runner
from scheduler.config import BLOCK_SIZE
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint
from tests.model.engine import Engine, Outcome
from tests.model.harness import Driver
from tests.model.test_builtin_quality import BUILTIN, asked, requests
from tools.builtin_model import questions

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not built")

QUESTIONS = asked(list(dict.fromkeys(question.row for question in questions.load())), 3)
EASY = asked(("capitals", "opposites", "name_1_turn", "copy_6", "key_value_5", "code_128"), 3)
# How much the perplexity of the right answers may rise, and how far (as Kullback-Leibler divergence, in nats a token)
# the distributions may be from those of bfloat16: the answers are sure, so that it tells more than the perplexity.
# With the latents' projection in 4 bits too it would be 0.006.
COST = {"int8": (0.002, 0.0003), "int4": (0.02, 0.004)}
FP8_CACHE_COST = (0.002, 0.0003)


def load(model_dir: Path, quantization: str, **options: object) -> ModelRunner:
    options = {"dtype": "bfloat16", "num_blocks": 64, "num_threads": 1, "progress": False} | options
    return load_runner(model_dir, quantization=quantization, **options)  # type: ignore[arg-type]


@torch.inference_mode()
def answers(network: DeepseekForCausalLM, fp8_cache: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, V] at the right answers' tokens, and these [N]."""
    driver = Driver(network, fp8_cache=fp8_cache)
    predicted = [driver.run(one.tokens, len(one.tokens))[one.start - 1 : -1] for one in QUESTIONS]
    return torch.cat(predicted), torch.tensor([token for one in QUESTIONS for token in one.tokens[one.start :]])


def perplexity(logprobs: Tensor, tokens: Tensor) -> float:
    return math.exp(-logprobs[range(len(tokens)), tokens].mean().item())


@dataclass(frozen=True)
class Exact:
    logprobs: Tensor
    tokens: Tensor

    def cost(self, rounded: Tensor) -> tuple[float, float]:
        """Of other log-probabilities [N, V]: how much the perplexity rises, and how far the distributions are."""
        rise = perplexity(rounded, self.tokens) / perplexity(self.logprobs, self.tokens) - 1
        return rise, (self.logprobs.exp() * (self.logprobs - rounded)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def in_bfloat16() -> Exact:
    return Exact(*answers(load(BUILTIN, "none").model))


@needs_kernels
@pytest.mark.parametrize("quantization", COST)
def test_the_built_in_model_loses_little(quantization: str, in_bfloat16: Exact) -> None:
    rise, divergence = in_bfloat16.cost(answers(load(BUILTIN, quantization).model)[0])
    assert rise <= COST[quantization][0]
    assert 1e-6 < divergence <= COST[quantization][1]


def test_the_built_in_model_loses_little_with_latents_in_8_bits(in_bfloat16: Exact) -> None:
    """Plain torch computes, which has in bfloat16 a seventh of this distance from the kernels."""
    network = load(BUILTIN, "none", kv_cache_dtype="fp8").model
    rise, divergence = in_bfloat16.cost(answers(network, fp8_cache=True)[0])
    assert rise <= FP8_CACHE_COST[0]
    assert 1e-6 < divergence <= FP8_CACHE_COST[1]


@needs_kernels
@pytest.mark.parametrize("quantization", COST)
def test_answers_are_the_same_alone_together_in_chunks_and_from_the_prefix_cache(quantization: str) -> None:
    """Greedily; bfloat16 rounds otherwise where a prompt is cut otherwise, which these answers are too sure to show."""

    def engine(budget: int = 1024, prefix_cache: bool = True) -> Engine:
        return Engine(BUILTIN, dtype="bfloat16", quantization=quantization, budget=budget, prefix_cache=prefix_cache)

    lone, crowded = engine(prefix_cache=False), engine()
    alone = Outcome.together([lone.generate([request]) for request in requests()]).tokens
    assert crowded.generate(requests()).tokens == alone
    again = crowded.generate(requests())
    assert again.tokens == alone
    assert sum(again.cached_tokens) >= 10 * BLOCK_SIZE
    assert engine(budget=32).generate(requests()).tokens == alone


@needs_kernels
def test_int8_answers_rightly() -> None:
    engine = Engine(BUILTIN, dtype="bfloat16", quantization="int8")
    prompts = [array("I", one.tokens[: one.start]).tobytes() for one in EASY]
    params = SamplingParams(max_tokens=64, temperature=0.0)
    said = engine.generate(
        [AddRequest(request_id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts)]
    )
    assert said.tokens == [one.tokens[one.start :] for one in EASY]


@needs_kernels
@pytest.mark.parametrize("quantization", COST)
@pytest.mark.parametrize("tied", [False, True])
def test_as_many_bytes_as_were_planned(quantization: str, tied: bool, tmp_path: Path) -> None:
    """Widths are multiples of 64, to which the kernels fill up."""
    widths = {"kv_lora_rank": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "qk_nope_head_dim": 64}
    mlps = {"intermediate_size": 128, "moe_intermediate_size": 64}
    path = make_checkpoint(tmp_path, "v2", dtype=torch.bfloat16, tie_word_embeddings=tied, **widths, **mlps)
    runner = load(path, quantization)
    assert runner.weight_bytes == weight_bytes_in(runner.model.config, "bfloat16", quantization)
    network = runner.model.model
    held = network.embed_tokens.weight.nbytes + network.norm.weight.nbytes
    for layer in network.layers:
        attention = layer.self_attn
        norms = (layer.input_layernorm, attention.kv_a_layernorm, layer.post_attention_layernorm)
        held += sum(norm.weight.nbytes for norm in norms)
        linears = (attention.q_proj, attention.kv_a_proj_with_mqa, attention.o_proj)
        held += packed_bytes(*(linear.packed for linear in linears))
        held += packed_bytes(attention.latent_weights.absorb, attention.latent_weights.value)  # the third is a copy
        if isinstance(layer.mlp, DeepseekMLP):
            mlps = [layer.mlp]
        else:
            mlps = [layer.mlp.experts, layer.mlp.shared_experts]
            held += layer.mlp.gate.weight.nbytes
        held += packed_bytes(*(weight for mlp in mlps if mlp is not None for weight in mlp.packed))
    assert held + packed_bytes(runner.model.head) == runner.weight_bytes


def packed_bytes(*weights: LinearWeight | None) -> int:
    total = 0
    for weight in weights:
        assert isinstance(weight, PackedWeight)
        total += weight.data.nbytes
    return total


def test_what_cannot_be_done_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_checkpoint(tmp_path, "v3", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"^quantization int8 .* multiples of 32, which config.json's q_lora_rank 24"):
        load(odd, "int8")
    with pytest.raises(ConfigError, match=r"^quantization int4 .* not in float32: choose dtype bfloat16$"):
        load(BUILTIN, "int4", dtype="float32")
    monkeypatch.setattr("model.runner.library", lambda: None)
    with pytest.raises(ConfigError, match=r"^quantization int8 .* install a C\+\+ compiler, then run "):
        load(BUILTIN, "int8")
    assert load(BUILTIN, "none").ops in ("onednn", "eager")
