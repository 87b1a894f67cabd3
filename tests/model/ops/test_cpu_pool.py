"""The threads behind the CPU kernels: who calls them, how many they are, and that they are there again after a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.ops.cpu import library as binding
from model.ops.cpu.library import Format, Library

WEIGHT = torch.randn(640, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def kernels() -> Iterator[Library]:
    library = binding.library()
    if library is None:
        pytest.skip("the kernels are not built")
    library.set_threads(3)
    yield library
    library.set_threads(2)


def linear(kernels: Library, seed: int) -> Tensor:
    """Ten jobs, whose weights are packed by ten others."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    packed = torch.empty(kernels.packed_bytes(Format.BF16, *WEIGHT.shape), dtype=torch.uint8)
    kernels.pack(Format.BF16, WEIGHT, packed)
    y = torch.full((5, len(WEIGHT)), torch.nan)
    kernels.linear(Format.BF16, x, packed, y)
    return y


def threads_of_the_pool() -> int:
    """One that was joined may still be listed, or go while it is read: what ends is waited for."""
    names: list[str] = []
    for _ in range(500):
        before, names = names, []
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                names.append(Path(task, "comm").read_text().strip())
        if names == before:
            break
        time.sleep(0.01)
    return names.count("latentd-kernels")


def test_thousands_of_regions_lose_no_job(kernels: Library) -> None:
    kernels.set_threads(1)
    exact = linear(kernels, 0)
    kernels.set_threads(3)
    for _ in range(2000):
        assert torch.equal(linear(kernels, 0), exact)


def test_callers_on_several_threads_do_not_disturb_each_other(kernels: Library) -> None:
    exact = [linear(kernels, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as callers:
        for seed, found in enumerate(callers.map(lambda index: linear(kernels, index % 8), range(400))):
            assert torch.equal(found, exact[seed % 8])


def test_threads_start_with_the_first_jobs_and_end_with_the_number(kernels: Library) -> None:
    kernels.set_threads(1)
    assert threads_of_the_pool() == 0
    kernels.set_threads(4)
    assert threads_of_the_pool() == 0
    exact = linear(kernels, 0)
    assert threads_of_the_pool() == 3
    kernels.set_threads(2)
    assert torch.equal(linear(kernels, 0), exact)
    assert threads_of_the_pool() == 1


def test_a_forked_process_has_threads_of_its_own(kernels: Library) -> None:
    exact = linear(kernels, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # one that waits for threads which it does not have is killed
        equal = torch.equal(linear(kernels, 0), exact)
        os._exit(0 if equal and threads_of_the_pool() == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(kernels, 0), exact)


def test_a_process_ends_while_its_threads_sleep(kernels: Library) -> None:
    script = f"""
import ctypes
library = ctypes.CDLL({str(binding.LIBRARY)!r})
library.latentd_set_threads(4)
rows = (ctypes.c_uint16 * (64 * 32))()
def norm():
    size = ctypes.c_int64
    library.latentd_rms_norm(rows, size(32), rows, ctypes.c_float(1), size(64), size(32), rows, size(32))
norm()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
