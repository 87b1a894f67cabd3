"""Not collected where there is no triton, or neither a GPU nor its interpreter (`make test-kernels`)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())

collect_ignore_glob = [] if RUNS else ["test_*.py"]
