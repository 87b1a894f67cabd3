"""Weight loading: every layout and type gives the same network, in memory of the network's size."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, DeepseekConfig, expected_tensors, load_config
from model.deepseek import DeepseekForCausalLM
from model.ops.eager.ops import EagerOps
from model.weights import load_weights
from tests.checkpoints import KINDS, make_checkpoint, random_weights, read_tensors, stack_experts, write_tensors


def allocate(config: DeepseekConfig, dtype: torch.dtype = torch.float32) -> DeepseekForCausalLM:
    """The network filled with NaN: what is not loaded shows."""
    model = DeepseekForCausalLM(config, EagerOps(), dtype)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model


def load(path: Path, dtype: torch.dtype = torch.float32, progress: bool = False) -> dict[str, Tensor]:
    config = load_config(path)
    model = allocate(config, dtype)
    load_weights(model, open_checkpoint(path, config), dtype, torch.device("cpu"), progress)
    return dict(model.named_parameters())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def wanted(path: Path) -> dict[str, Tensor]:
    """The maker's float32 weights in the network's layout."""
    config = load_config(path)
    weights = random_weights(config)
    return stack_experts({name: weights[name] for name in expected_tensors(config)}, config)


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


def test_types_differ_within_a_file_and_the_router_stays_float32(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v3", dtype=torch.bfloat16, router_dtype=torch.float32)
    expected = {
        name: tensor if name.endswith((".mlp.gate.weight", ".e_score_correction_bias")) else tensor.bfloat16()
        for name, tensor in wanted(path).items()
    }
    assert_equal(load(path, torch.bfloat16), expected)
    assert_equal(
        load(path, torch.float16),
        {name: tensor.half() if tensor.dtype is torch.bfloat16 else tensor for name, tensor in expected.items()},
    )


def test_pieces_join_where_a_tensor_is_larger_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.weights._PIECE_BYTES", 4096 + 8)
    path = make_checkpoint(tmp_path, "v2")
    assert_equal(load(path), wanted(path))


@pytest.mark.parametrize(
    "name", ["model.layers.1.input_layernorm.weight", "model.layers.2.mlp.gate.e_score_correction_bias"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_norm_weights_and_biases_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    path = make_checkpoint(tmp_path, "v3")
    tensors = read_tensors(path)
    tensors[name][3] = value
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {re.escape(name)}: .* not finite"):
        load(path)


def test_a_file_that_shrinks_after_it_was_checked_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    config = load_config(path)
    checkpoint = open_checkpoint(path, config)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has shrunk"):
        load_weights(allocate(config), checkpoint, torch.float32, torch.device("cpu"), False)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        load_weights(allocate(config), checkpoint, torch.float32, torch.device("cpu"), False)


def test_a_network_and_a_checkpoint_that_differ_are_a_programming_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    config = load_config(path)
    checkpoint = open_checkpoint(path, config)
    larger = allocate(config)
    larger.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match=r"not filled exactly once: extra"):
        load_weights(larger, checkpoint, torch.float32, torch.device("cpu"), False)
    smaller = allocate(config)
    del smaller.model.norm.weight
    with pytest.raises(RuntimeError, match=r"no parameter for tensor model\.norm\.weight"):
        load_weights(smaller, checkpoint, torch.float32, torch.device("cpu"), False)


def test_float16_is_warned_about_for_v2_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(make_checkpoint(tmp_path / "v3", "v3"), torch.float16)
    load(make_checkpoint(tmp_path / "v2", "v2"), torch.bfloat16)
    assert not caplog.records
    load(tmp_path / "v2", torch.float16)
    assert "float16 overflows" in caplog.text


def test_the_progress_bar_counts_all_bytes_and_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(tmp_path, "v2")
    load(path)
    assert capsys.readouterr().err == ""
    load(path, progress=True)
    assert "100%" in capsys.readouterr().err


MEASURE = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.checkpoint import open_checkpoint
from model.config import load_config
from model.weights import load_weights
from tests.model.test_weights import allocate

def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

path = Path(sys.argv[1])
config = load_config(path)
model = allocate(config, torch.bfloat16)
before = peak()
load_weights(model, open_checkpoint(path, config), torch.bfloat16, torch.device("cpu"), False)
print(before, peak(), sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.parametrize("layout", ["hub", "stacked"])
def test_peak_memory_is_the_network_and_at_most_a_tenth_more(tmp_path: Path, layout: str) -> None:
    """A float32 checkpoint of 370 MB becomes a network of 185 MB: the file must never be resident as a whole."""
    path = make_checkpoint(
        tmp_path,
        "v2",
        layout=layout,
        shards=2,
        vocab_size=32_000,
        hidden_size=512,
        moe_intermediate_size=512,
        n_routed_experts=36,
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(path)
    before, after, size = map(int, result.stdout.split())
    assert size > 150_000_000
    # The network itself is resident before: it was filled with NaN.
    assert after - before <= 0.1 * size, (before, after, size)
