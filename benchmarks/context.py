"""Speed over the context: `python -m benchmarks.context MODEL [--tokens 131072] [--plot FILE]` (minutes).

Starts the daemon on a checkpoint and streams one request whose prompt fills the window; its progress events tell how
fast the prompt is computed at every depth. Then prefixes of that prompt, which the cache still has, are asked again,
and what comes between their tokens tells how fast tokens are generated behind 1K, 2K, ... tokens.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.long_context import free_port, wait_ready
from model.config import load_config
from scheduler.config import BLOCK_SIZE

GENERATED = 33
POINTS = 24
"""Of the curve of the prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072, help="window: prompt and output together")
    parser.add_argument("--plot", type=Path, help="SVG file")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="behind --: options for `latentd serve`")
    arguments = parser.parse_intermixed_args()
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", str(arguments.model), "--port", str(port)]
    command += ["--max-model-len", str(arguments.tokens), "--num-blocks", str(arguments.tokens // BLOCK_SIZE + 64)]
    with subprocess.Popen([*command, "--log-level", "warning", *arguments.serve]) as server:
        try:
            wait_ready(f"http://127.0.0.1:{port}")
            prefill, decode = measure(port, load_config(arguments.model).vocab_size, arguments.tokens)
        finally:
            server.terminate()
    print("| context | prompt tokens/s | generated tokens/s |\n| --- | --- | --- |")
    for context, rate in decode:
        near = min(prefill, key=lambda point: abs(math.log(point[0] / context)))
        print(f"| {context:,} | {near[1]:.0f} | {rate:.1f} |")
    if arguments.plot is not None:
        arguments.plot.write_text(plot({"prompt tokens/s": prefill, "generated tokens/s": decode}), encoding="utf-8")


Curve = list[tuple[int, float]]
"""Tokens of context, tokens a second."""


def measure(port: int, vocab_size: int, tokens: int) -> tuple[Curve, Curve]:
    rng = random.Random(1)
    prompt = [rng.randrange(16, vocab_size - 64) for _ in range(tokens - GENERATED)]
    began, done, prefill = time.monotonic(), 0, []
    for at, event in stream(port, prompt):
        if (progress := event.get("prompt_progress")) is not None and progress[
            "processed"
        ] - done >= tokens / POINTS / 4:
            prefill.append((progress["processed"], (progress["processed"] - done) / (at - began)))
            began, done = at, progress["processed"]
    print(f"{len(prompt):,} tokens of prompt done", flush=True)
    decode = []
    for context in [1024 << power for power in range(20) if 1024 << power < tokens] + [len(prompt)]:
        times = [at for at, event in stream(port, prompt[:context]) if event.get("choices")]
        gaps = [after - before for before, after in itertools.pairwise(times) if after > before]
        decode.append((context, 1 / statistics.median(gaps)))
    return prefill, decode


def stream(port: int, prompt: list[int]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Every event of one greedy answer, and when it came."""
    body = {"prompt": prompt, "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=7200)
    connection.request(
        *("POST", "/v1/completions", json.dumps(body | {"return_progress": True})),
        headers={"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise SystemExit(f"{response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            yield time.monotonic(), json.loads(line[6:])
    connection.close()


def plot(curves: dict[str, Curve]) -> str:
    """Both axes logarithmic."""
    width, height, margin = 900, 420, 60
    points = [point for curve in curves.values() for point in curve]
    (left, right), (low, high) = (
        (math.floor(math.log2(min(axis))), math.ceil(math.log2(max(axis)))) for axis in zip(*points, strict=True)
    )

    def place(context: float, rate: float) -> tuple[float, float]:
        x = margin + (math.log2(context) - left) / (right - left) * (width - 2 * margin)
        return x, height - margin - (math.log2(rate) - low) / (high - low) * (height - 2 * margin)

    parts = []
    for power in range(left, right + 1):
        x, y = place(2**power, 2**low)
        name = f"{2**power // 1024}K" if power >= 10 else f"{2**power}"
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{name}</text>')
    for power in range(low, high + 1):
        x, y = place(2**left, 2**power)
        parts.append(f'<path d="M{x:.0f} {y:.0f}H{width - margin}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{2.0**power:g}</text>')
    for (name, curve), colour in zip(curves.items(), ("#48c", "#c33"), strict=True):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        x, y = place(*curve[0])
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{line}"/>')
        parts.append(f'<text x="{x + 6:.0f}" y="{y - 8:.0f}" fill="{colour}">{name}</text>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    return svg + 'font-size="12"><rect width="100%" height="100%" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    main()
