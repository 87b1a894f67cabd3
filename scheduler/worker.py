"""What the engine needs of the model worker and of whatever enforces grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from model.batch import ForwardBatch, SampledTokens
from scheduler.messages import Grammar


class Runner(Protocol):
    """What the engine needs of the model worker, `model.runner.ModelRunner`."""

    @property
    def model_type(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def cache_bytes_per_token(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def ops(self) -> str: ...
    @property
    def instruction_set(self) -> str | None: ...
    @property
    def prefill_attention(self) -> str | None: ...

    @property
    def overlaps(self) -> bool:
        """A step may be launched before the one before it is collected."""

    def launch(self, batch: ForwardBatch) -> Launched:
        """After a MemoryError, and `reset`, it can go on; after any other exception it is lost."""

    def reset(self) -> None:
        """Forget all rows and what was launched."""


class Launched(Protocol):
    """A step that the worker has begun, `model.launched.LaunchedStep`."""

    def collect(self) -> SampledTokens: ...


class Grammars(Protocol):
    """What the engine needs of whatever enforces grammars: the state of each request that has one, by id."""

    def add(self, request_id: str, grammar: Grammar) -> None:
        """Compile, in the reader thread. `ValueError`, from here and below, says what is wrong with the grammar."""

    def bitmask(self, request_id: str) -> bytes:
        """Which ids may come next, packed as in `ForwardBatch.grammar_bitmasks`; eos where the text may end."""

    def accept(self, request_id: str, token_id: int) -> bool:
        """Advance by a sampled token; True where nothing more can follow."""

    def drop(self, request_id: str) -> None:
        """Forget a request. A no-op for one without a grammar."""
