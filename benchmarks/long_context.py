"""128K for real: `python -m benchmarks.long_context [--tokens 131072] [--echo TOP]` (minutes; `make bench-long`).

Starts the daemon on a checkpoint of tiny width whose window is 131,072 tokens, sends one request that fills the
window (prompt + output) and then a second one with the same prompt. Exit code 1 unless

- the first runs to its end and its cache is `tokens / 64` blocks, no more and no less;
- the second computes at most 64 tokens of its prompt.

With `--echo TOP` the first request also asks for its whole prompt back with TOP alternatives for every token, and there
is no second one; what that costs shows in the peak memory of the two processes, which is printed either way.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from model.config import load_config
from scheduler.config import BLOCK_SIZE
from server.settings import BUILTIN_MODEL
from tests.checkpoints import make_checkpoint, yarn

ANSWER_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072, help="window, prompt and output together")
    parser.add_argument("--chunk", type=int, default=2048, help="token budget of a step")
    parser.add_argument("--echo", type=int, metavar="TOP", help="echo the prompt with so many alternatives a token")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(
            Path(folder) / "long",
            "v2-yarn",
            dtype=torch.float32,
            tokenizer=BUILTIN_MODEL,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=args.tokens,
            rope_scaling=yarn(40, 0.707, 0.707, original_max_position_embeddings=4096),
        )
        return run(model, args.tokens, args.chunk, args.echo)


def run(model: Path, tokens: int, chunk: int, echo: int | None) -> int:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    num_blocks = tokens // BLOCK_SIZE + 64
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port)]
    command += ["--num-blocks", str(num_blocks), "--max-num-batched-tokens", str(chunk), "--log-level", "warning"]
    with subprocess.Popen(command) as server:
        try:
            wait_ready(base)
            rng = random.Random(1)
            vocab_size = load_config(BUILTIN_MODEL).vocab_size
            prompt = [rng.randrange(16, vocab_size - 64) for _ in range(tokens - ANSWER_TOKENS)]
            watcher = PeakUsage(base, num_blocks)
            before = peak_mib(server.pid)
            cold = complete(base, prompt, echo)
            peak = watcher.stop()
            warm = complete(base, prompt, None) if echo is None else cold
            after = peak_mib(server.pid)
        finally:
            server.terminate()
    print("peak memory, MiB:", ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.0f}" for name in before))
    if echo is not None:
        ok = cold["entries"] == tokens and peak == tokens // BLOCK_SIZE
        print(
            f"{tokens} tokens, echo with {echo}: {cold['seconds']:.1f} s, {cold['entries']} entries, "
            f"{cold['bytes'] / 2**20:.0f} MiB of JSON: {'ok' if ok else 'FAILED'}"
        )
        return 0 if ok else 1
    computed = len(prompt) - warm["cached"]
    ok = cold["completion"] == ANSWER_TOKENS and peak == tokens // BLOCK_SIZE and computed <= BLOCK_SIZE
    ok = ok and cold["text"] == warm["text"]
    print(
        f"{tokens} tokens: first {cold['seconds']:.1f} s ({len(prompt) / cold['seconds']:.0f} prompt tokens/s), "
        f"{peak} blocks at the peak; again {warm['seconds']:.2f} s, {computed} prompt tokens computed, "
        f"{'same' if cold['text'] == warm['text'] else 'OTHER'} text: {'ok' if ok else 'FAILED'}"
    )
    return 0 if ok else 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PeakUsage:
    """Reads the gauge of blocks in use ten times a second, beside the request."""

    def __init__(self, base: str, num_blocks: int) -> None:
        self._base, self._num_blocks = base, num_blocks
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            for line in get(f"{self._base}/metrics").splitlines():
                if line.startswith("vllm:kv_cache_usage_perc"):
                    self._peak = max(self._peak, round(float(line.split()[-1]) * self._num_blocks))


def peak_mib(pid: int) -> dict[str, float]:
    """The most memory that the front-end and its engine have had so far."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    peaks = {}
    for name, each in zip(("front-end", "engine"), (str(pid), *children), strict=False):
        [line] = [line for line in Path(f"/proc/{each}/status").read_text().splitlines() if line.startswith("VmHWM")]
        peaks[name] = int(line.split()[1]) / 1024
    return peaks


def complete(base: str, prompt: list[int], echo: int | None) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    if echo is not None:
        body |= {"echo": True, "logprobs": echo}
    request = urllib.request.Request(
        f"{base}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.monotonic()
    with urllib.request.urlopen(request) as response:
        data = response.read()
    answer = json.loads(data)
    usage = answer["usage"]
    logprobs = answer["choices"][0]["logprobs"]
    return {
        "entries": len(logprobs["tokens"]) if logprobs else 0,
        "bytes": len(data),
        "text": answer["choices"][0]["text"],
        "seconds": time.monotonic() - started,
        "completion": usage["completion_tokens"],
        "cached": usage["prompt_tokens_details"]["cached_tokens"],
    }


def wait_ready(base: str) -> None:
    for _ in range(600):
        try:
            get(f"{base}/ready")
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the daemon did not become ready in a minute")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
    return text


if __name__ == "__main__":
    sys.exit(main())
