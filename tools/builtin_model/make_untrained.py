"""Makes the untrained built-in checkpoint: `python -m tools.builtin_model.make_untrained --out model/builtin`.

A DeepSeek-V2-shaped checkpoint in the ordinary hub layout: a byte-level BPE tokenizer trained on the
standard library of the Python that runs this, and seeded random weights. The weights depend on the
seed alone; the tokenizer depends on the Python release (3.11.7 made the committed one).
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 3072
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS)
# As in the family's own files, these are added tokens that are not "special": text decoding keeps them.
ADDED_TOKENS = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
FIRST_ADDED_ID = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ADDED_TOKENS)

# DeepSeek-V2.5's format: no newlines, no spaces, role marks that are single tokens; tool calls and results as on
# its model card: after tool results the model goes on directly, without another <｜Assistant｜>.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages if message['role'] == 'system' -%}
{{- ('' if loop.first else '\\n\\n') + message['content'] -}}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- if loop.previtem is not defined or loop.previtem['role'] != 'tool' -%}
{{- '<｜Assistant｜>' -}}
{%- endif -%}
{{- message['content'] or '' -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '' if loop.first else '\\n' -}}
{{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] -}}
{{- '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁outputs▁begin｜>' if loop.previtem is not defined or loop.previtem['role'] != 'tool' else '\\n' -}}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{{- '<｜tool▁outputs▁end｜>' if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' else '' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and (not messages or messages[-1]['role'] != 'tool') -%}
{{- '<｜Assistant｜>' -}}
{%- endif -%}
"""


def training_text() -> Iterator[str]:
    """The standard library's modules and the language reference in `pydoc_data` (PSF-2.0)."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in [*sorted(library.glob("*.py")), library / "LICENSE.txt"]:
        yield path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # One digit a token, with the space before a number inside its first digit; then words, punctuation, spaces.
            pre_tokenizers.Split(
                Regex(
                    r" ?\p{N}|[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}]+"
                    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST_ADDED_ID,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ADDED_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def make_config(tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "latentd_untrained": True,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    """Normal matrices of std 1/sqrt(fan-in), so that activations keep their scale through every layer.

    The outputs of attention and MLP are smaller by sqrt(2 * layers), as before a training run; the head is
    3 times larger, which spreads the logits enough that greedy choices do not hang on rounding.
    """
    hidden, layers, heads, nope, rope, v, latent = 128, 4, 4, 32, 32, 32, 64
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))
        weights[f"{name}.weight"] = values.to(torch.bfloat16)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, hidden)
        matrix(f"{name}.up_proj", width, hidden)
        matrix(f"{name}.down_proj", hidden, width, gain=residual)

    residual = 1 / math.sqrt(2 * layers)
    matrix("model.embed_tokens", VOCAB_SIZE, hidden, gain=math.sqrt(hidden))
    for index in range(layers):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm", hidden)
        matrix(f"{layer}.self_attn.q_proj", heads * (nope + rope), hidden)
        matrix(f"{layer}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        norm(f"{layer}.self_attn.kv_a_layernorm", latent)
        matrix(f"{layer}.self_attn.kv_b_proj", heads * (nope + v), latent)
        matrix(f"{layer}.self_attn.o_proj", hidden, heads * v, gain=residual)
        norm(f"{layer}.post_attention_layernorm", hidden)
        if index == 0:
            mlp(f"{layer}.mlp", 192)
            continue
        matrix(f"{layer}.mlp.gate", 8, hidden)
        for expert in range(8):
            mlp(f"{layer}.mlp.experts.{expert}", 32)
        mlp(f"{layer}.mlp.shared_experts", 32)
    norm("model.norm", hidden)
    matrix("lm_head", VOCAB_SIZE, hidden, gain=3.0)
    return weights


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=7, help="seed of the weights")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "do_sample": True,
            "temperature": 0.3,
            "top_p": 0.95,
            "max_new_tokens": 256,
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    save_file(make_weights(arguments.seed), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
