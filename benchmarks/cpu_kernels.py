"""The CPU kernels beside what this machine can do at most: `python -m benchmarks.cpu_kernels [--kernels moe,...]`.

Weights lie cold in memory: every call takes other ones, more than the caches hold. `limit` is the share of a call's
time that reading its bytes once at the measured stream bandwidth would take, or computing at the peak of the registers,
whichever is longer; both are measured first. MB: weights, or latents in the cache, that a call reads at least.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.large_pages import LargePages
from model.ops.cpu.build import compiler
from model.ops.cpu.library import AttentionShape, Format, Library, library

COLD_BYTES = 200 << 20
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
LINEARS = {"q + kv_a": (1824, 1024), "o": (1024, 1024), "lm_head": (32768, 1024)}
D, WIDTH, EXPERTS, PER_TOKEN, SHARED_WIDTH = 1024, 512, 32, 4, 1024
HEADS, RANK, ROPE, NOPE, VALUE, PAGE = 16, 256, 32, 64, 64, 64
DECODING = ((1, 1, 128), (1, 1, 2048), (1, 1, 16384), (1, 1, 131072), (8, 1, 2048), (16, 1, 256), (32, 1, 2048))
PROMPTS = ((1, 512, 512), (1, 2048, 2048), (1, 512, 4608))
"""Rows, new tokens of each, and its context with them."""


class Limits(NamedTuple):
    """Bytes a second, operations a second."""

    read: float
    bf16: float
    int8: float


class Case(NamedTuple):
    name: str
    format: Format
    bytes: float
    operations: float
    calls: Sequence[Callable[[], object]]
    """Alike, each on memory of its own."""


def measure_limits(threads: int) -> Limits:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "limits.so")
        flags = ["-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", "-pthread", "-Wno-psabi"]
        subprocess.run([*compiler(), *flags, str(Path(__file__).parent / "cpu_limits.cpp"), "-o", built], check=True)
        loaded = ctypes.CDLL(str(built))
        figures = []
        for name in ("read_bandwidth", "bf16_peak", "int8_peak"):
            measure = loaded[name]
            measure.restype = ctypes.c_double
            figures.append(max(float(measure(threads)) for _ in range(3)))
    return Limits(*figures)


def packed(kernels: Library, format: Format, number: int, n: int, k: int) -> Tensor:
    """[number, bytes]: the same random weights, one behind the other."""
    data = LargePages().empty(number, kernels.packed_bytes(format, n, k))
    kernels.pack(format, (torch.randn(n, k) * 0.02).bfloat16(), data[0])
    data[1:] = data[0]
    return data


def linears(kernels: Library, format: Format, rows: list[int]) -> Iterator[Case]:
    for name, (n, k) in LINEARS.items():
        copies = max(2, COLD_BYTES // kernels.packed_bytes(format, n, k))
        weights = packed(kernels, format, copies, n, k)
        for m in rows:
            x = torch.randn(m, k).bfloat16()
            y = torch.empty((m, n), dtype=torch.float32 if name == "lm_head" else torch.bfloat16)
            if name == "lm_head" and m > 64:
                continue  # it takes sampled rows only
            calls = [partial(kernels.linear, format, x, weight, y) for weight in weights]
            yield Case(f"linear {name} {n} x {k}, M = {m}", format, weights[0].nbytes, 2.0 * m * n * k, calls)


def moes(kernels: Library, format: Format, rows: list[int]) -> Iterator[Case]:
    expert = kernels.packed_bytes(format, 2 * WIDTH, D) + kernels.packed_bytes(format, D, WIDTH)
    layers = max(2, COLD_BYTES // (EXPERTS * expert))
    gate_ups = packed(kernels, format, layers * EXPERTS, 2 * WIDTH, D).view(layers, EXPERTS, -1)
    downs = packed(kernels, format, layers * EXPERTS, D, WIDTH).view(layers, EXPERTS, -1)
    shared_gate_ups = packed(kernels, format, layers, 2 * SHARED_WIDTH, D)
    shared_downs = packed(kernels, format, layers, D, SHARED_WIDTH)
    for m in rows:
        x = torch.randn(m, D).bfloat16()
        y = torch.empty_like(x)
        space = torch.empty(kernels.moe_workspace(m, D, WIDTH, EXPERTS, PER_TOKEN, SHARED_WIDTH), dtype=torch.uint8)
        weights = torch.full((m, PER_TOKEN), 0.25)
        calls: list[Callable[[], object]] = []
        used = 0
        for layer in range(16):
            chosen = torch.rand(m, EXPERTS).argsort(dim=1)[:, :PER_TOKEN].int().contiguous()
            used += int(chosen.flatten().bincount().count_nonzero())
            at = layer % layers
            shared = SHARED_WIDTH, shared_gate_ups[at], shared_downs[at]
            arguments = (format, x, WIDTH, EXPERTS, chosen, weights, gate_ups[at], downs[at], shared, x, y, space)
            calls.append(partial(kernels.moe, *arguments))
        read = float(used / 16 * expert + shared_gate_ups[0].nbytes + shared_downs[0].nbytes)
        operations = 6.0 * m * D * (WIDTH * PER_TOKEN + SHARED_WIDTH)
        yield Case(f"experts and shared MLP, M = {m}", format, read, operations, calls)


def attentions(kernels: Library, absorbed: bool) -> Iterator[Case]:
    heads = [packed(kernels, Format.BF16, HEADS, n, k) for n, k in ((RANK, NOPE), (NOPE, RANK), (VALUE, RANK))]
    for rows, new, context in DECODING if absorbed else PROMPTS:
        pages = rows * -(-context // PAGE)
        layers = max(1, min(64, COLD_BYTES // (pages * PAGE * (RANK + ROPE) * 2)))
        cache = torch.randn(1 << 20).bfloat16().repeat(pages * layers * PAGE * (RANK + ROPE) // (1 << 20) + 1)
        tables = torch.randperm(pages).int().view(rows, -1)
        starts = torch.arange(0, rows * new + 1, new, dtype=torch.int32)
        contexts = torch.full((rows,), context, dtype=torch.int32)
        shape = AttentionShape(
            *(rows, rows * new, starts.data_ptr(), contexts.data_ptr(), tables.data_ptr(), tables.shape[1]),
            *(cache.data_ptr(), layers, PAGE, HEADS, RANK, ROPE, NOPE, VALUE, 0.1),
        )
        q_nope = torch.randn(rows * new, HEADS, NOPE).bfloat16()
        q_rope = torch.randn(rows * new, HEADS, ROPE).bfloat16()
        output = torch.empty(rows * new, HEADS, VALUE).bfloat16()
        space = torch.empty(kernels.attention_workspace(shape), dtype=torch.uint8)
        arguments = (q_nope, q_rope, *heads, output, space)
        calls = [
            partial(attend, kernels, shape, layer, arguments, (starts, contexts, tables, cache))
            for layer in range(layers)
        ]
        latents = float(pages * PAGE * (RANK + ROPE) * 2)
        if absorbed:
            operations = 2.0 * rows * HEADS * (context * (2 * RANK + ROPE) + RANK * (NOPE + VALUE))
            name = f"absorbed attention, {rows} x {context}"
        else:
            pairs = new * (context - new) + new * (new + 1) / 2
            operations = 2.0 * HEADS * (pairs * (NOPE + ROPE + VALUE) + context * RANK * (NOPE + VALUE))
            name = f"expanded attention, {new} of {context}"
        yield Case(name, Format.BF16, latents, operations, calls)


def attend(
    kernels: Library, shape: AttentionShape, layer: int, arguments: Sequence[Tensor], kept: Sequence[Tensor]
) -> None:
    """kept: what `shape` has the addresses of."""
    kernels.attention(Format.BF16, shape, layer, *arguments)


def median_time(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < seconds and len(times) < 1000):
        before = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", default="linear,moe,absorbed,expanded")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--isa", help="another instruction set than the best")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    options = parser.parse_args()
    kernels = library()
    if kernels is None:
        parser.error("the kernels are not built")
    if options.isa and not kernels.use_isa(options.isa):
        parser.error(f"this machine does not run {options.isa}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels.set_threads(options.threads)
    limits = measure_limits(options.threads)
    print(f"{kernels.isa}, {options.threads} threads; limits: read {limits.read / 1e9:.1f} GB/s, ", end="")
    print(f"bf16 {limits.bf16 / 1e12:.3f} TFLOPS, int8 {limits.int8 / 1e12:.3f} TOPS")
    print(f"{'kernel':<40} {'format':<6} {'MB':>7} {'us':>9} {'GB/s':>6} {'TFLOPS':>7} {'limit':>6}")
    rows = [int(m) for m in options.rows.split(",")]
    for kernel in options.kernels.split(","):
        if kernel in ("absorbed", "expanded"):
            groups = [attentions(kernels, kernel == "absorbed")]
        else:
            make = {"linear": linears, "moe": moes}[kernel]
            groups = [make(kernels, Format[name.upper()], rows) for name in options.formats.split(",")]
        for group in groups:
            for case in group:
                seconds = median_time(case.calls, options.seconds)
                peak = limits.bf16 if case.format is Format.BF16 else limits.int8
                shortest = max(case.bytes / limits.read, case.operations / peak if peak else 0.0)
                print(
                    f"{case.name:<40} {case.format.name.lower():<6} {case.bytes / 1e6:>7.2f} {seconds * 1e6:>9.1f} "
                    f"{case.bytes / seconds / 1e9:>6.1f} {case.operations / seconds / 1e12:>7.3f} "
                    f"{shortest / seconds:>6.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
