"""`python -m tests.faults.engine [what goes wrong] --fd N`: the engine as it is, but for a fault in its worker."""

from __future__ import annotations

import argparse
import time
from typing import Any

from model.batch import ForwardBatch
from scheduler.config import EngineConfig
from scheduler.engine import load_model, main

POISON = "xyzzy"
"""`--raise-on-poison`: a prompt whose text ends with this word cannot be computed."""


class FaultyRunner:
    """The real worker, with a fault in some of its steps."""

    def __init__(self, config: EngineConfig, args: argparse.Namespace) -> None:
        time.sleep(args.load_seconds)
        self._runner: Any = load_model(config)
        self._args = args
        self._compute = self._runner._compute
        self._runner._compute = self._compute_or_fail
        self._num_computed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, batch: ForwardBatch) -> Any:
        if batch.step == self._args.raise_at_step:
            raise RuntimeError("a fault of the test")
        poison = set(self._args.raise_on_tokens)
        if poison and any(poison <= set(new.tokens) for new in batch.new_rows):
            raise RuntimeError("a poisonous prompt")
        if batch.step == self._args.stall_at_step:
            time.sleep(600)
        return self._runner.launch(batch)

    def _compute_or_fail(self, inputs: Any, cache: Any) -> tuple[Any, Any]:
        """In the middle of a step: the rows know of it, the latents do not."""
        self._num_computed += 1
        if self._num_computed in self._args.out_of_memory_at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory (a fault of the test)")
        hidden, logits = self._compute(inputs, cache)
        if self._num_computed in self._args.nan_at and len(logits):
            logits[0] = float("nan")
        return hidden, logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--raise-at-step", type=int)
    parser.add_argument("--raise-on-tokens", type=int, nargs="*", default=[])
    parser.add_argument("--stall-at-step", type=int)
    parser.add_argument("--out-of-memory-at", type=int, nargs="*", default=[], help="steps, counted from 1")
    parser.add_argument("--nan-at", type=int, nargs="*", default=[], help="steps whose first row breaks")
    own_args, engine_argv = parser.parse_known_args()
    main(engine_argv, runner_factory=lambda config: FaultyRunner(config, own_args))
