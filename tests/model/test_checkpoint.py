"""Checkpoint reading: every layout is found; crafted, torn and foreign files are refused by file and tensor."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import INDEX_FILE, Checkpoint, open_checkpoint
from model.config import CheckpointError, load_config
from tests.checkpoints import make_checkpoint, random_weights, read_tensors, write_tensors

FILE = "model.safetensors"


def check(path: Path) -> Checkpoint:
    return open_checkpoint(path, load_config(path))


@pytest.mark.parametrize("layout", ["hub", "stacked"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found_where_it_lies(tmp_path: Path, layout: str, shards: int) -> None:
    path = make_checkpoint(tmp_path, "v3", layout=layout, shards=shards, dtype=torch.bfloat16)
    checkpoint = check(path)
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in random_weights(load_config(path)).items()
        if not name.startswith("model.layers.3.")
    }
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            assert stream.read(info.nbytes) == tensor.view(-1).view(torch.uint8).numpy().tobytes()
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.file_dtype == "bfloat16"
    assert len(checkpoint.by_file()) == shards


def test_a_folder_without_an_index_is_read_whole(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2", shards=2)
    with_index = check(path)
    (path / INDEX_FILE).unlink()
    assert check(path).tensors == with_index.tensors


def test_files_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "snapshot", "v2")
    (tmp_path / "blobs").mkdir()
    (path / FILE).rename(tmp_path / "blobs" / "0a1b")
    (path / FILE).symlink_to("../blobs/0a1b")
    assert len(check(path).tensors) == 131


def test_only_the_known_leftovers_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_checkpoint(tmp_path, "tied", num_nextn_predict_layers=1)
    tensors = read_tensors(path)
    assert "model.layers.3.eh_proj.weight" in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(path, tensors)
    assert len(check(path).tensors) == 130
    assert not caplog.records
    tensors["lm_head.weight"] += 1
    write_tensors(path, tensors)
    check(path)
    assert "lm_head.weight differs from the embedding" in caplog.text


def test_the_fingerprint_tells_fine_tunes_apart(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", "v2")
    original = check(path).fingerprint
    assert len(bytes.fromhex(original)) == 32
    assert check(make_checkpoint(tmp_path / "b", "v2")).fingerprint == original
    assert check(make_checkpoint(tmp_path / "c", "v2", seed=1)).fingerprint != original
    assert check(make_checkpoint(tmp_path / "d", "v2", dtype=torch.bfloat16)).fingerprint != original
    assert check(make_checkpoint(tmp_path / "e", "v2", rope_theta=20000)).fingerprint != original
    weights = random_weights(load_config(path))
    weights["model.layers.2.mlp.experts.15.down_proj.weight"][-1, -1] += 1
    write_tensors(path, weights)
    assert check(path).fingerprint != original


Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.9.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def having(**new: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key.replace("__", "."): value for key, value in new.items()}


WRONG_TENSORS: list[tuple[str, str, Callable[[Tensors], Tensors], str]] = [
    ("missing", "v2", without(Q_PROJ), f"missing tensor {Q_PROJ}"),
    ("missing expert", "v2", without(EXPERT), f"missing tensor {EXPERT}"),
    ("missing bias", "v3", without(BIAS), f"missing tensor {BIAS}"),
    ("missing head", "v2", without("lm_head.weight"), "missing tensor lm_head.weight"),
    ("bias of V3 in V2", "v2", having(**{BIAS: torch.zeros(16)}), f"{FILE}: unknown tensor {BIAS}"),
    ("unknown", "v2", having(visual__weight=torch.zeros(1)), f"{FILE}: unknown tensor visual.weight"),
    ("layer past the MTP layers", "v3", having(model__layers__4__x=torch.zeros(1)), "unknown tensor model.layers.4.x"),
    ("shape", "v2", having(**{GATE: torch.zeros(16, 63)}), f"{FILE}: tensor {GATE}: shape [16, 63], but config.json"),
    ("transposed", "v2", having(**{GATE: torch.zeros(64, 16)}), f"{FILE}: tensor {GATE}: shape [64, 16], but"),
    ("scalar", "v2", having(**{GATE: torch.zeros(())}), f"{FILE}: tensor {GATE}: shape [], but"),
    ("int8", "v2", having(**{GATE: torch.zeros(16, 64, dtype=torch.int8)}), f"tensor {GATE}: dtype I8: must be F32"),
    ("float64", "v2", having(**{GATE: torch.zeros(16, 64).double()}), f"tensor {GATE}: dtype F64: must be F32"),
    ("fp8", "v2", having(**{Q_PROJ: torch.zeros(192, 64).to(torch.float8_e4m3fn)}), "config.json has no quantization"),
    ("fp8 scales", "v2", having(**{Q_PROJ + "_scale_inv": torch.zeros(2, 1)}), f"unknown tensor {Q_PROJ}_scale_inv"),
    ("GPTQ", "v2", having(model__layers__0__self_attn__o_proj__qweight=torch.zeros(1)), "GPTQ or AWQ quantised"),
]


@pytest.mark.parametrize(("kind", "change", "problem"), [case[1:] for case in WRONG_TENSORS])
def test_a_wrong_set_of_tensors_is_named(
    tmp_path: Path, kind: str, change: Callable[[Tensors], Tensors], problem: str
) -> None:
    path = make_checkpoint(tmp_path, kind)
    write_tensors(path, change(read_tensors(path)))
    with pytest.raises(CheckpointError) as caught:
        check(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_a_stacked_file_must_be_stacked_in_every_layer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2", layout="stacked")
    tensors = read_tensors(path)
    del tensors["model.layers.2.mlp.experts.gate_up_proj"]
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.2\.mlp\.experts\.gate_up_proj"):
        check(path)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CRAFTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated, or not a safetensors file"),
    "seven bytes": (b"\0" * 7, "truncated, or not a safetensors file"),
    "header longer than the file": (struct.pack("<Q", 1 << 20) + b"{}", "truncated, or not a safetensors file"),
    "header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "truncated, or not a safetensors file"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 90, "truncated, or not a safetensors file"),
    "Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "Git-LFS pointer"),
    "header is not JSON": (struct.pack("<Q", 4) + b"{,,}", "malformed safetensors header"),
    "header is a list": (header([]), "malformed safetensors header"),  # type: ignore[arg-type]
    "header of brackets": (struct.pack("<Q", 200_000) + b"[" * 200_000, "malformed safetensors header"),
    "header is not UTF-8": (struct.pack("<Q", 7) + b'{"\xff":1}', "malformed safetensors header"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "malformed safetensors header"),
    "shape of booleans": (header({"a": entry("F32", [True], 0, 4)}, b"1234"), "malformed safetensors header"),
    "shape of floats": (header({"a": entry("F32", [1.5], 0, 4)}, b"1234"), "malformed safetensors header"),
    "negative shape": (header({"a": entry("F32", [-1, -1], 0, 4)}, b"1234"), "tensor a: impossible shape"),
    "huge shape": (header({"a": entry("F32", [1 << 62] * 8, 0, 4)}, b"1234"), "tensor a: shape [46116860"),
    "many dimensions": (header({"a": entry("F32", [1] * 100_000, 0, 4)}, b"1234"), "tensor a: impossible shape"),
    "shape and bytes disagree": (header({"a": entry("F32", [2], 0, 4)}, b"1234"), "does not fill its 4 bytes"),
    "reversed offsets": (header({"a": entry("F32", [1], 4, 0)}, b"1234"), "does not fill its -4 bytes"),
    "negative offset": (header({"a": entry("F32", [1], -4, 0)}, b"1234"), "tensor a: overlaps"),
    "unknown dtype": (header({"a": entry("F4", [1], 0, 4)}, b"1234"), "tensor a: unknown dtype F4"),
    "past the end": (header({"a": entry("F32", [2], 0, 8)}, b"1234"), "tensor a: the file is truncated"),
    "overlap": (header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456"), "tensor b: overlaps"),
    "gap": (header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"1" * 12), "tensor b: overlaps"),
    "trailing bytes": (header({"a": entry("F32", [1], 0, 4)}, b"12345"), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize(("content", "problem"), CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = make_checkpoint(tmp_path, "v2")
    (path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        check(path)
    message = str(caught.value)
    assert message.startswith(f"{path / FILE}: ")
    assert problem in message
    assert "\n" not in message


def test_a_truncated_download_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2", shards=2)
    shard = path / "model-00002-of-000002.safetensors"
    content = shard.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        shard.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model-00002-of-000002\.safetensors: .*truncated"):
            check(path)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "..", "weights.bin", "", 7, None],
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: object) -> None:
    path = make_checkpoint(tmp_path / "m", "v2", shards=2)
    make_checkpoint(tmp_path / "other", "v2")
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"][Q_PROJ] = name
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"index\.json: weight_map: {Q_PROJ}: not a plain name"):
        check(path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2", shards=2)
    first, second = sorted(path.glob("*.safetensors"))
    index = json.loads((path / INDEX_FILE).read_text())
    name = next(name for name, file in index["weight_map"].items() if file == first.name)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"] | {name: second.name}}))
    with pytest.raises(CheckpointError, match=rf"{second.name}: tensor {name} is missing"):
        check(path)
    (path / INDEX_FILE).write_text(json.dumps(index))
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name}: no such file, but {INDEX_FILE}"):
        check(path)
    (path / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: must map"):
        check(path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    (path / "copy.safetensors").write_bytes((path / FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* is in copy\.safetensors too"):
        check(path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pytorch_model.bin", "pickled weights are never loaded"),
        ("model.pt", "pickled weights are never loaded"),
        ("consolidated.00.pth", "pickled weights are never loaded"),
        ("model0-mp8.safetensors", "converted for DeepSeek's own inference code"),
        ("README.md", r"no \.safetensors files"),
    ],
)
def test_other_forms_of_weights_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    path = make_checkpoint(tmp_path, "v2")
    (path / FILE).rename(path / name)
    with pytest.raises(CheckpointError, match=problem):
        check(path)


def test_code_and_pickles_beside_the_weights_are_named_and_never_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "modeling_deepseek.DeepseekModel"}
    path = make_checkpoint(tmp_path / "m", "v2", auto_map=auto_map)
    canary = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("configuration_deepseek.py", "modeling_deepseek.py", "sitecustomize.py"):
        (path / name).write_text(canary)
    (path / "training_args.bin").write_bytes(f"c__builtin__\nexec\n(V{canary}\ntR.".encode())
    assert len(check(path).tensors) == 131
    assert not (tmp_path / "ran").exists()
    assert [record.message for record in caplog.records] == [
        f"{path}: code and pickles are never run or opened: "
        "configuration_deepseek.py, modeling_deepseek.py, sitecustomize.py, training_args.bin"
    ]


def test_a_directory_or_pipe_named_like_a_shard_does_not_hang(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a file"):
        check(path)


def test_a_header_bomb_is_refused_quickly_in_little_memory_and_no_torch_is_loaded(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    bomb = b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % i for i in range(550_000)) + b"}"
    (path / FILE).write_bytes(struct.pack("<Q", len(bomb)) + bomb)
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from model.checkpoint import open_checkpoint\n"
        "from model.config import CheckpointError, load_config\n"
        "path = Path(sys.argv[1])\n"
        "try: open_checkpoint(path, load_config(path))\n"
        "except CheckpointError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=5)
    message, peak = result.stdout.splitlines()
    assert "more than 262144 tensors" in message
    assert int(peak) < 300_000
