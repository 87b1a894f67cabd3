"""Not collected where there is no triton, or neither a GPU nor its interpreter (`make test-kernels`)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())

collect_ignore_glob = [] if RUNS else ["test_*.py"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """The interpreter makes its loop bounds in a way that numpy deprecates."""
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"))
