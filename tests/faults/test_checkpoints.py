"""F11, F12: the daemon over checkpoints that are crafted, torn or lie. No weight of them is ever held in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import open_checkpoint
from model.config import load_config
from server.settings import BUILTIN_MODEL
from tests.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.faults.conftest import Measured
from tests.model.test_checkpoint import CRAFTED, FILE, WRONG_TENSORS

GATE = "model.layers.1.mlp.gate.weight"


WATCHED = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process starts the daemon: peak memory counts from the fork on."""


def refusal(path: Path) -> tuple[str, float, int]:
    """The one line with which `latentd serve` refuses a checkpoint, the CPU seconds it took, its peak memory in KiB."""
    command = [sys.executable, "-m", "server", "serve", str(path), "--port", "0", "--device", "cpu"]
    result = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("latentd: ")
    seconds, memory = result.stdout.split()
    return line, float(seconds), int(memory)


def test_f12_crafted_and_lying_files(tmp_path: Path, measured: Measured) -> None:
    slowest, largest, count = 0.0, 0, 0
    for number, (content, problem) in enumerate(CRAFTED.values()):
        path = make_checkpoint(tmp_path / str(number), "v2")
        (path / FILE).write_bytes(content)
        line, seconds, memory = refusal(path)
        assert f"{FILE}: " in line
        assert problem in line
        slowest, largest, count = max(slowest, seconds), max(largest, memory), count + 1
    for number, (_, kind, change, problem) in enumerate(WRONG_TENSORS):
        path = make_checkpoint(tmp_path / f"tensors{number}", kind)
        write_tensors(path, change(read_tensors(path)))
        line, seconds, memory = refusal(path)
        assert problem in line
        slowest, largest, count = max(slowest, seconds), max(largest, memory), count + 1
    assert slowest < 5
    assert largest < 300_000
    measured("F12", f"{count} files refused, the slowest after {slowest:.1f} s of CPU, {largest // 1024} MiB at most")


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_f12_torn_downloads(tmp_path: Path, damage: str) -> None:
    path = make_checkpoint(tmp_path / "m", "v2", shards=2)
    shard = path / "model-00002-of-000002.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing":
        shard.unlink()
    else:
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"][GATE] = "../../../etc/model.safetensors"
        index.write_text(json.dumps(content))
    line, seconds, memory = refusal(path)
    assert (GATE if damage == "index" else shard.name) in line
    assert seconds < 5
    assert memory < 300_000


BOMBS = {"hidden_size": 10**9, "num_hidden_layers": 10**6, "n_routed_experts": 10**8, "vocab_size": 10**12}


@pytest.mark.parametrize("name", BOMBS)
def test_f12_shape_bombs(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path / "m", "v2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {name: BOMBS[name]}))
    line, seconds, memory = refusal(path)
    assert "config.json" in line
    assert name in line
    assert seconds < 5
    assert memory < 300_000


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_f11_one_weight_that_is_not_finite(tmp_path: Path, measured: Measured, name: str, value: float) -> None:
    path = tmp_path / "m"
    shutil.copytree(BUILTIN_MODEL, path)
    tensor = open_checkpoint(path, load_config(path)).tensors[name]
    assert tensor.dtype == "BF16"
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + 10)
        file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    line, seconds, _ = refusal(path)
    assert f"{tensor.file.name}: tensor {name}: has values that are not finite" in line
    measured("F11", f"{value} in {name}: refused after {seconds:.1f} s of CPU")
