"""The benchmark of a GPU runs without one, so that it is whole when there is one; and what it holds figures against."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import GROUPS, Limits, read_config, roofline
from benchmarks.make_checkpoint import SHAPES


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is what is run there")
def test_every_group_runs_at_toy_sizes(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--toy"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["group"] for line in lines} == GROUPS.keys() - {"tests"}
    errors = [line["relative_error"] for line in lines if "relative_error" in line]
    assert len(errors) == 3
    assert max(errors) < 1e-4
    assert all(line["ms"] > 0 for line in lines if line["group"] == "step")


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
