"""Checkpoints of published shapes with random weights: `python -m benchmarks.make_checkpoint FOLDER [--shape lite]`.

`lite` is DeepSeek-V2-Lite to the number (15.7 billion parameters, 31 GB in bfloat16); `narrow` has its form, 27 layers
and a latent of 512 + 64, in 1.2 billion parameters; `small` (0.93 billion) and `tiny` (15 million) are other forms.
Shard by shard as the hub has them, at the disk's speed and in little memory: all weights are cut from one piece of
noise.

Weights are scaled so that activations keep their size and routers choose: an answer is nonsense, but neither one token
again and again nor the same experts for all. The tokenizer is the built-in model's with made-up words up to the size of
the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.checkpoint import INDEX_FILE
from model.config import DeepseekConfig, expected_tensors, load_config
from server.settings import BUILTIN_MODEL

SHARD_BYTES = 5_000_000_000
_PIECE = 4 << 20
"""Numbers that are written at once."""
_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "max_position_embeddings": 163_840,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_NARROW: dict[str, Any] = {
    "vocab_size": 32_768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 352,
    "n_routed_experts": 32,
}
_SMALL: dict[str, Any] = _NARROW | {
    "moe_intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
_TINY: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
}
SHAPES = {"lite": _LITE, "narrow": _LITE | _NARROW, "small": _LITE | _SMALL, "tiny": _LITE | _TINY}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="lite")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    args = parser.parse_args()
    overrides = {} if args.layers is None else {"num_hidden_layers": args.layers}
    return make(args.folder, SHAPES[args.shape] | overrides)


def make(folder: Path, values: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a checkpoint with this config.json. 0, or 1 where the disk has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = make_tokenizer(folder, values["vocab_size"])
    (folder / "config.json").write_text(json.dumps(values | ids, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
    config = load_config(folder)
    shapes = expected_tensors(config)
    size = 2 * config.num_parameters()
    if (free := shutil.disk_usage(folder).free) < size + (1 << 30):
        print(f"{folder}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        room -= 2 * math.prod(shape)
        if room < 0 and shards[-1]:
            shards.append({})
            room = shard_bytes - 2 * math.prod(shape)
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    noise = Noise(config)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):06}.safetensors"
        write_shard(folder / name, shard, noise)
        weight_map |= dict.fromkeys(shard, name)
        print(f"{name}: {(folder / name).stat().st_size / 1e9:.1f} GB", flush=True)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    print(f"{config.num_parameters() / 1e9:.2f} billion parameters, {config.num_active_parameters() / 1e9:.2f} a token")
    return 0


def make_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """The built-in one and made-up words of the byte-level alphabet, which no merge makes but which can be read out;
    returns config.json's special ids."""
    shutil.copy(BUILTIN_MODEL / "tokenizer_config.json", folder)
    tokenizer = json.loads((BUILTIN_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab |= {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }  # else they get ids behind the words
    vocab |= {f"Ġ{_word(i)}": i for i in range(len(vocab), vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = load_config(BUILTIN_MODEL)
    assert config.bos_token_id is not None
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids[0]}


def _word(number: int) -> str:
    """Five syllables, another for each number below 100^5."""
    return "".join("bcdfghjklmnprstvwxyz"[s // 5] + "aeiou"[s % 5] for s in (number // 100**i % 100 for i in range(5)))


class Noise:
    """Normal numbers without end, out of a piece whose odd length no row of a weight divides."""

    def __init__(self, config: DeepseekConfig) -> None:
        self._back = 1 / math.sqrt(2 * config.num_hidden_layers)
        generator = torch.Generator().manual_seed(0)
        self._piece = torch.randn(_PIECE * 4 + 1009, generator=generator).bfloat16()
        self._position = 0

    def take(self, count: int) -> Tensor:
        """[count], at most `_PIECE`; another place of the noise every time."""
        if self._position + count > len(self._piece):
            self._position = (self._position * 31 + 7) % 100_003
        taken = self._piece[self._position : self._position + count]
        self._position += count
        return taken

    def deviation(self, name: str, shape: tuple[int, ...]) -> float:
        """Of a weight's numbers: small for what goes back to the residual stream, large for the head and routers."""
        if name.endswith("embed_tokens.weight"):
            return 1
        scale = 4.0 if name == "lm_head.weight" else 2.0 if name.endswith("mlp.gate.weight") else 1.0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale = self._back
        return scale / math.sqrt(shape[-1])


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]], noise: Noise) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            _write_tensor(stream, name, shape, noise)


def _write_tensor(stream: BinaryIO, name: str, shape: tuple[int, ...], noise: Noise) -> None:
    count = math.prod(shape)
    for first in range(0, count, _PIECE):
        numbers = noise.take(min(_PIECE, count - first))
        values = 1 + 0.1 * numbers if len(shape) == 1 else numbers * noise.deviation(name, shape)
        stream.write(values.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    sys.exit(main())
