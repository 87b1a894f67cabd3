"""An engine process for tests: everything of `scheduler.engine` but the model, which is replaced by arithmetic.

`python -m tests.scheduler.fake_engine [what goes wrong] --fd N`. The next token is a checksum of all tokens before it,
so outputs are deterministic, depend on every token, and are known to the tests (`expected_tokens`).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from array import array
from collections.abc import Sequence
from zlib import crc32

from model.batch import ForwardBatch, Logprobs, SampledTokens, SamplingParams
from scheduler.config import EngineConfig
from scheduler.engine import main
from scheduler.messages import Grammar

VOCAB_SIZE = 1000
EOS_TOKEN_ID = 0
MAX_MODEL_LEN = 262_144

COMMAND = (sys.executable, "-m", "tests.scheduler.fake_engine")


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model says after `prompt`."""
    checksum = crc32(array("I", prompt))
    tokens = []
    for _ in range(count):
        tokens.append(_choose(checksum))
        checksum = crc32(array("I", tokens[-1:]), checksum)
    return tokens


def _choose(checksum: int) -> int:
    return 1 + checksum % (VOCAB_SIZE - 1)  # never EOS_TOKEN_ID


class FakeRunner:
    model_type = "fake"
    fingerprint = "fake"
    max_model_len = MAX_MODEL_LEN
    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS_TOKEN_ID,)
    cache_bytes_per_token = 1
    weight_bytes = 0
    device = "cpu"
    dtype = "none"
    quantization = "none"
    ops = "fake"
    instruction_set = None
    prefill_attention = None

    def __init__(self, config: EngineConfig, args: argparse.Namespace) -> None:
        if args.load_error:
            raise ValueError(args.load_error)
        if args.load_bug:
            raise KeyError("a bug\nof two lines")
        time.sleep(args.load_seconds)
        self.num_blocks = config.num_blocks or 4096
        self._args = args
        self.overlaps: bool = args.overlap
        self._rows: dict[int, list[int]] = {}
        """Row: [checksum of its tokens, their number]."""
        self._bound: dict[int, tuple[array[int], SamplingParams]] = {}
        """Row: its prompt and parameters."""

    def launch(self, batch: ForwardBatch) -> FakeStep:
        return FakeStep(self._execute(batch), self._args.step_seconds)

    def _execute(self, batch: ForwardBatch) -> SampledTokens:
        if batch.step in self._args.out_of_memory_at_steps:
            for new in batch.new_rows:  # as a worker that fails in the middle
                self._rows[new.row] = [0, 0]
            raise MemoryError("out of memory\nin two lines")
        if batch.step == self._args.raise_at_step:
            raise RuntimeError("the model broke\nin two lines")
        if batch.step == self._args.kill_at_step:
            os.kill(os.getpid(), self._args.kill_with)
        if batch.step == self._args.stall_at_step:
            time.sleep(600)
        for row in batch.released_rows:
            del self._rows[row]
        for new in batch.new_rows:
            assert new.row not in self._rows
            self._rows[new.row] = [crc32(new.tokens), len(new.tokens)]
            self._bound[new.row] = (new.tokens[: new.num_prompt_tokens], new.params)
        sampled = SampledTokens(batch.step, [], [])
        for scheduled in batch.rows:
            state = self._rows[scheduled.row]
            end = scheduled.start + scheduled.num_tokens
            assert end <= state[1]
            assert scheduled.sample == (end == state[1])
            prompt, params = self._bound[scheduled.row]
            predicted = range(scheduled.start + 1, min(end + 1, len(prompt)))
            if params.prompt_logprobs is not None and predicted:
                columns = [[prompt[i]] for i in predicted], [[-float(i)] for i in predicted]
                sampled.prompt_logprobs[scheduled.row] = Logprobs(*columns)
            if scheduled.sample:
                token_id = _choose(state[0])
                if (mask := batch.grammar_bitmasks.get(scheduled.row)) is not None:
                    token_id = next(i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1)
                if params.logprobs is not None:
                    sampled.logprobs[scheduled.row] = Logprobs([[token_id]], [[-float(state[1])]])
                state[:] = [crc32(array("I", [token_id]), state[0]), state[1] + 1]
                sampled.rows.append(scheduled.row)
                sampled.token_ids.append(token_id)
        return sampled

    def reset(self) -> None:
        self._rows.clear()


class FakeStep:
    """Takes its time when its tokens are asked for, as one on a device does."""

    def __init__(self, sampled: SampledTokens, seconds: float) -> None:
        self._sampled, self._seconds = sampled, seconds

    def collect(self) -> SampledTokens:
        time.sleep(self._seconds)
        return self._sampled


class FakeGrammars:
    """The text of a grammar is the only output it allows, as token ids; `?` is where it breaks."""

    def __init__(self) -> None:
        self._left: dict[str, list[str]] = {}

    def add(self, request_id: str, grammar: Grammar) -> None:
        if grammar.kind != "regex" or not grammar.text.split() or request_id in self._left:
            raise ValueError(f"no such kind, empty, or in use: {grammar.kind}")
        self._left[request_id] = grammar.text.split()

    def bitmask(self, request_id: str) -> bytes:
        token = self._left[request_id][0]
        if not token.isdecimal() or int(token) >= VOCAB_SIZE:
            raise ValueError("too complex")
        return (1 << int(token)).to_bytes(VOCAB_SIZE // 8, "little")

    def accept(self, request_id: str, token_id: int) -> bool:
        left = self._left[request_id]
        assert int(left.pop(0)) == token_id
        return not left

    def drop(self, request_id: str) -> None:
        self._left.pop(request_id, None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--load-error")
    parser.add_argument("--load-bug", action="store_true")
    parser.add_argument("--raise-at-step", type=int)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--out-of-memory-at-steps", type=int, nargs="*", default=[])
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--kill-with", type=int, default=signal.SIGKILL)
    parser.add_argument("--stall-at-step", type=int)
    own_args, engine_argv = parser.parse_known_args()
    main(
        engine_argv,
        runner_factory=lambda config: FakeRunner(config, own_args),
        grammars_factory=lambda config, runner: FakeGrammars(),
    )
