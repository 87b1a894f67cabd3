"""Weight loading: every layout and type gives the same network, in memory of the network's size."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, expected_tensors, load_config
from model.ops.cpu.library import library
from model.weights import CheckpointWeights
from tests.checkpoints import KINDS, make_checkpoint, random_weights, read_tensors, write_tensors


def load(path: Path, dtype: torch.dtype = torch.float32, progress: bool = False) -> dict[str, Tensor]:
    """What is read by each name."""
    checkpoint = open_checkpoint(path, load_config(path))
    with CheckpointWeights(checkpoint, dtype, torch.device("cpu"), progress) as weights:
        return {name: weights.read(name) for name in checkpoint.tensors}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def wanted(path: Path) -> dict[str, Tensor]:
    """The maker's float32 weights."""
    config = load_config(path)
    weights = random_weights(config)
    return {name: weights[name] for name in expected_tensors(config)}


@pytest.mark.parametrize("layout", ["hub", "stacked"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_bit_for_bit(tmp_path: Path, kind: str, layout: str) -> None:
    path = make_checkpoint(tmp_path, kind, layout=layout, shards=2)
    assert_equal(load(path), wanted(path))


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("kind", ["v2-yarn", "moonlight"])
def test_what_transformers_saves_is_loaded_as_what_it_loaded(tmp_path: Path, kind: str, original_format: bool) -> None:
    path = make_checkpoint(tmp_path / "made", kind, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_format)
    names = read_tensors(tmp_path / "saved").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) is not original_format
    assert_equal(load(tmp_path / "saved", torch.bfloat16), load(path, torch.bfloat16))


def test_types_differ_within_a_file_and_a_tensor_has_the_type_that_is_asked_for(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v3", dtype=torch.bfloat16, router_dtype=torch.float32)
    assert_equal(load(path, torch.bfloat16), {name: tensor.bfloat16() for name, tensor in wanted(path).items()})
    checkpoint = open_checkpoint(path, load_config(path))
    with CheckpointWeights(checkpoint, torch.bfloat16, torch.device("cpu"), False) as weights:
        name = "model.layers.1.mlp.gate.weight"
        assert torch.equal(weights.read(name, torch.float32), wanted(path)[name])


def test_pieces_join_where_a_tensor_is_larger_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.weights._PIECE_BYTES", 4096 + 8)  # not a whole number of rows
    path = make_checkpoint(tmp_path, "v2")
    assert_equal(load(path), wanted(path))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.7.down_proj.weight",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_weight_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    path = make_checkpoint(tmp_path, "v3")
    tensors = read_tensors(path)
    tensors[name].view(-1)[3] = value
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {re.escape(name)}: .* not finite"):
        load(path)


def test_a_file_that_shrinks_after_it_was_checked_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    checkpoint = open_checkpoint(path, load_config(path))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100_000])
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.end).name
    with (
        CheckpointWeights(checkpoint, torch.float32, torch.device("cpu"), False) as weights,
        pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*: the file has shrunk"),
    ):
        weights.read(last)
    file.unlink()
    with (
        CheckpointWeights(checkpoint, torch.float32, torch.device("cpu"), False) as weights,
        pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"),
    ):
        weights.read(last)


def test_float16_is_warned_about_for_v2_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(make_checkpoint(tmp_path / "v3", "v3"), torch.float16)
    load(make_checkpoint(tmp_path / "v2", "v2"), torch.bfloat16)
    assert not caplog.records
    load(tmp_path / "v2", torch.float16)
    assert "float16 overflows" in caplog.text


def test_a_terminal_gets_a_bar_of_all_bytes_and_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path, "v2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(path)
    assert capsys.readouterr().err == ""
    load(path, progress=True)
    assert "100%" in capsys.readouterr().err


def test_without_a_terminal_a_line_is_logged_every_tenth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(make_checkpoint(tmp_path, "v2"), progress=True)
    lines = [record.message for record in caplog.records if "Loading weights to cpu" in record.message]
    assert 5 <= len(lines) <= 10
    assert lines[-1] == "Loading weights to cpu: 100 %"


MEASURE = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.checkpoint import open_checkpoint
from model.config import load_config
from model.deepseek import DeepseekForCausalLM
from model.ops.cpu.library import library
from model.ops.cpu.ops import CpuOps
from model.ops.eager.ops import EagerOps
from model.weights import CheckpointWeights

def memory(name):  # not ru_maxrss, which a child inherits from the process that started it
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

path, kernels = Path(sys.argv[1]), sys.argv[2] == "cpu"
config = load_config(path)
ops = CpuOps(library(), 1) if kernels else EagerOps()
checkpoint = open_checkpoint(path, config)
for name in list(checkpoint.tensors)[-40:]:  # whatever code is needed is resident then
    with CheckpointWeights(checkpoint, torch.bfloat16, torch.device("cpu"), False) as weights:
        weights.packed(name, lambda: [ops.pack(weights.read(name))] if len(checkpoint.tensors[name].shape) == 2 else [])
del weights
Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
before = memory("VmRSS")
with CheckpointWeights(checkpoint, torch.bfloat16, torch.device("cpu"), False) as weights:
    model = DeepseekForCausalLM(config, ops, weights)
print(before, memory("VmHWM"), 2 * config.num_parameters())
"""


@pytest.mark.parametrize(("layout", "ops"), [("hub", "cpu"), ("hub", "eager"), ("stacked", "cpu")])
def test_peak_memory_is_the_network_and_at_most_a_tenth_more(tmp_path: Path, layout: str, ops: str) -> None:
    """A float32 checkpoint of 370 MB becomes a network of 185 MB: the file must never be resident as a whole, nor may
    a layer's experts in both forms."""
    if ops == "cpu" and library() is None:
        pytest.skip("the kernels are not built")
    path = make_checkpoint(
        tmp_path,
        "v2",
        layout=layout,
        shards=2,
        vocab_size=3200,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=512,
        n_routed_experts=56,
        v_head_dim=32,
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # else glibc keeps up to 32 MB of what was freed, by chance
    command = [sys.executable, "-c", MEASURE, str(path), ops]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(path)
    before, peak, size = map(int, result.stdout.split())
    assert size > 150_000_000
    assert peak - before <= 1.1 * size, (before, peak, size)
