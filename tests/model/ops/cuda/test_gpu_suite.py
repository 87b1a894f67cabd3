"""The benchmark of a GPU runs without one, so that it is whole when there is one; and what it holds figures against."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import gpu_peers, gpu_suite
from benchmarks.gpu_kernels import expanded
from benchmarks.gpu_network import roofline
from benchmarks.gpu_peers import ATTENTION, EXPERTS
from benchmarks.gpu_rig import TOY, Limits, Suite, read_config
from benchmarks.gpu_suite import GROUPS
from benchmarks.make_checkpoint import SHAPES
from tests.model.ops.cuda.common import flash_attention, small_pieces

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it is what is run there")


@on_a_cpu
@pytest.mark.timeout(900)  # eleven processes, each with torch
def test_every_group_runs_at_toy_sizes(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--toy"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["group"] for line in lines} == GROUPS.keys() - {"tests"}
    errors = [line["relative_error"] for line in lines if "relative_error" in line]
    assert len(errors) > 8
    assert max(errors) < 1e-4
    assert all(line["ms"] > 0 for line in lines if line["group"] == "step")
    for group in ("model", "kernels", "step", "engine"):
        assert any("fp8" in line["case"] for line in lines if line["group"] == group)
    outcomes = {line["case"]: line["outcome"] for line in lines if "outcome" in line}
    assert outcomes["expanded by cuDNN"] == "not chosen on this device"
    absent = {name: "not installed" for name in (*ATTENTION, *EXPERTS) if find_spec(name) is None}
    assert outcomes.items() >= absent.items()
    assert not any(outcome.startswith("failed") for outcome in outcomes.values())


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """After `facts`."""
    facts = ({"group": "facts", "case": "copy", "GB/s": 1.0}, {"group": "facts", "case": "product", "TFLOP/s": 1.0})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in facts))
    config = read_config(SHAPES["lite"] | TOY)
    return Suite(config, torch.device("cpu"), torch.float32, tmp_path, toy=True)


def reported(suite: Suite) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (suite.out / "results.jsonl").read_text().splitlines())
    return {line["case"]: line for line in lines if line["group"] != "facts"}


@on_a_cpu
def test_long_prompts_in_pieces_stand_beside_the_own_kernel(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 32, 64, 32)
    expanded(suite, flash_attention)
    lines = reported(suite)
    assert 0 < lines["expanded 150 of 200, cuDNN"]["relative_error"] < 1e-5
    assert {lines[f"expanded: faster by the {name}"]["cases"] for name in ("own kernel", "cuDNN")} == {
        "none",
        "150 of 200",
    }


@on_a_cpu
def test_a_peer_that_fails_is_a_line(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there and does not take what it is given, among others that do."""

    def refuses(_: object) -> NoReturn:
        raise TypeError("an unexpected keyword\nand more")

    monkeypatch.setattr(gpu_peers, "EXPERTS", {"json": refuses, "torch": gpu_peers.grouped_mm})
    monkeypatch.setattr(gpu_peers, "ATTENTION", {"no_such_package": refuses})
    assert gpu_peers.peers(suite)
    lines = reported(suite)
    assert lines["no_such_package"]["outcome"] == "not installed"
    assert lines["experts, 3 tokens, json"]["outcome"] == "failed: TypeError: an unexpected keyword"
    assert lines["experts, 3 tokens, torch"]["relative_error"] < 1e-5
    assert lines["attention 2 x 70, latentd"]["us"] > 0


def test_a_group_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(command: list[str], **_: object) -> object:
        started.append(command[command.index("--group") + 1])
        return type("Done", (), {"returncode": int(started[-1] == "model")})

    monkeypatch.setattr("subprocess.run", run)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert started == list(GROUPS)


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"), [(1, 1024, 1.15), (32, 1024, 7.16), (256, 1024, 9.31), (32, 8192, 8.82)]
)
def test_the_roofline_is_the_one_worked_out_by_hand(rows: int, context: int, milliseconds: float) -> None:
    """Of DeepSeek-V2-Lite in bfloat16 at 4.3 TB/s and 790 TFLOP/s."""
    config = read_config(SHAPES["lite"])
    seconds = roofline(config, Limits(4.3e12, 790e12), rows, context, itemsize=2)
    assert math.isclose(seconds * 1e3, milliseconds, rel_tol=0.03)
