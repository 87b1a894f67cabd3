"""Steps of single tokens on a CPU: `python -m benchmarks.cpu_step MODEL_DIR [--rows 1,8,16,64]`.

Per step in microseconds: the network by single calls and by one replayed call, and the worker's whole step, greedy.
The first two compute the same tokens again and again; every step has new ones, so that other experts and more memory
are touched, and `around` is what of the steps was not the network.
`memory`: the share of the network's time that reading the weights it touches once would take at the stream bandwidth
that is measured first; experts are counted as if tokens chose them evenly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu_kernels import measure_limits
from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.config import DeepseekConfig
from model.cores import usable_cores
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.memory import QUANTIZED_BITS, SCALE_BITS
from model.ops.interface import Network
from model.runner import ModelRunner, load_runner

MAX_STEPS = 128


def touched_bytes(config: DeepseekConfig, weight_bytes: int, expert_bits: float, rows: int) -> float:
    """Of `weight_bytes`, those that a step of so many tokens reads: not the embedding, nor experts nobody chose.
    `expert_bits`: of each of their numbers."""
    hidden, width = config.hidden_size, config.moe_intermediate_size or 0
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    experts = moe_layers * (config.n_routed_experts or 0) * 3 * hidden * width * expert_bits / 8
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * hidden * 2
    chosen = 1.0 - (1.0 - (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1)) ** rows
    return weight_bytes - embedding - experts * (1.0 - chosen)


def start_rows(runner: ModelRunner, rows: int, context: int, released: list[int]) -> None:
    """Binds so many rows of `context` tokens each, instead of those released, and computes their prompts."""
    per_row = -(-(context + MAX_STEPS) // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=MAX_STEPS, temperature=0.0, ignore_eos=True)
    for row in range(rows):
        tokens = array("I", torch.randint(runner.vocab_size, (context,), generator=generator).tolist())
        blocks = list(range(row * per_row, (row + 1) * per_row))
        new = NewRow(row=row, tokens=tokens, num_prompt_tokens=context, params=params)
        prompt = ScheduledRow(row=row, start=0, num_tokens=context, new_blocks=blocks, sample=True)
        runner.execute(ForwardBatch(step=0, rows=[prompt], new_rows=[new], released_rows=released))
        released = []


def decode(rows: int, position: int) -> ForwardBatch:
    return ForwardBatch(step=1, rows=[ScheduledRow(row, position, 1, sample=True) for row in range(rows)])


def median_us(call: Callable[[int], object], times: int) -> float:
    taken = []
    for index in range(times):
        before = time.perf_counter()
        call(index)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken) * 1e6


class Stopwatch:
    """A network that says how long it took."""

    def __init__(self, network: Network) -> None:
        self.seconds = 0.0
        self._network = network

    def __call__(self, inputs: StepInputs, cache: LatentCache) -> tuple[Tensor, Tensor]:
        before = time.perf_counter()
        outputs = self._network(inputs, cache)
        self.seconds = time.perf_counter() - before
        return outputs


def measure_steps(runner: ModelRunner, rows: int, context: int, steps: int) -> tuple[float, float]:
    """Medians in microseconds: whole steps, and what of each was not the network."""
    network = runner._compute
    runner._compute = stopwatch = Stopwatch(network)
    around = []

    def step(index: int) -> None:
        before = time.perf_counter()
        runner.execute(decode(rows, context + index))
        around.append(time.perf_counter() - before - stopwatch.seconds)

    whole = median_us(step, steps)
    runner._compute = network
    return whole, statistics.median(around) * 1e6


def measure(
    runner: ModelRunner, replayed: Network, rows: int, context: int, steps: int
) -> tuple[float, float, float, float]:
    inputs = runner.prepare(decode(rows, context))
    return (
        median_us(lambda _: runner.model.compute(inputs, runner.cache), steps),
        median_us(lambda _: replayed(inputs, runner.cache), steps),
        *measure_steps(runner, rows, context, steps),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", choices=("none", *QUANTIZED_BITS), default="none")
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help=f"for each figure, at most {MAX_STEPS}")
    options = parser.parse_args()
    sizes = [int(rows) for rows in options.rows.split(",")]
    limits = measure_limits(usable_cores())
    blocks = max(sizes) * -(-(options.context + MAX_STEPS) // BLOCK_SIZE)
    runner = load_runner(
        options.model,
        quantization=options.quantization,
        num_blocks=blocks,
        max_num_seqs=max(sizes),
        progress=False,
    )
    expert_bits = 16.0 if options.quantization == "none" else QUANTIZED_BITS[options.quantization] + SCALE_BITS
    replayed = runner.model.ops.recorded(runner.model.compute, runner.model.config)
    print(f"ops {runner.ops}, read {limits.read / 1e9:.1f} GB/s")
    print(f"{'rows':>4} {'calls':>9} {'replay':>9} {'step':>9} {'around':>9} {'memory':>7}")
    released: list[int] = []
    with torch.inference_mode():
        for rows in sizes:
            start_rows(runner, rows, options.context, released)
            single, network, step, around = measure(runner, replayed, rows, options.context, options.steps)
            touched = touched_bytes(runner.model.config, runner.weight_bytes, expert_bits, rows)
            share = touched / limits.read / (network / 1e6)
            print(f"{rows:>4} {single:>9.0f} {network:>9.0f} {step:>9.0f} {around:>9.0f} {share:>7.0%}", flush=True)
            released = list(range(rows))


if __name__ == "__main__":
    main()
