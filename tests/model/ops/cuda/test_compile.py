"""Every kernel compiled ahead for GPUs that are not here, as it is launched at published shapes, and its code read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.model.ops.cuda.ahead import SHARED_MEMORY

TILES = {90: "HGMMA", 89: "HMMA", 80: "HMMA"}
"""The instruction that multiplies tiles: a Hopper's takes 64 lines, an Ampere's 16."""


PRODUCTS = ("_split", "_prefill", "_up", "_down", "_linear")


@cache
def compiled(capability: int) -> list[dict[str, Any]]:
    """In a process of its own: under the interpreter nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.ops.cuda.ahead", str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_nothing_is_spilled_and_everything_fits(capability: int) -> None:
    kernels = compiled(capability)
    assert {kernel["kernel"] for kernel in kernels} == {
        *("_rms_norm", "_rope_and_cache", "_split", "_merge", "_prefill", "_fold", "_route"),
        *("_align", "_up", "_down", "_sum", "_silu_mul", "_choose", "_mask", "_linear"),
    }
    for kernel in kernels:
        assert kernel["reg"] > 0
        assert kernel["stack"] == kernel["LDL"] == kernel["STL"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_products_run_on_tensor_cores_and_are_fed_ahead(capability: int) -> None:
    products = [kernel for kernel in compiled(capability) if kernel["kernel"] in PRODUCTS]
    assert len(products) > 10
    for kernel in products:
        # One token of 16 heads, and 32 columns of a quantised product with one token.
        narrow = kernel["launch"].startswith("V2-Lite: decode, 1 queries") or (
            kernel["kernel"] == "_linear" and kernel["launch"].endswith(", 1 tokens")
        )
        assert kernel["HMMA" if narrow else TILES[capability]] > 0, kernel
        assert kernel["LDGSTS"] > 0, kernel
