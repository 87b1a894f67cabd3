"""Everything that crosses the process boundary between front-end and engine: msgspec structs, no pickle.

Frames are tagged unions: the front-end sends a `ToEngine`, the engine sends a `FromEngine`.
Every message about a request carries its id; ids match exactly; an unknown id is a counted no-op.
"""

from __future__ import annotations

import enum

import msgspec

from model.batch import Logprobs, SamplingParams
from scheduler.config import EngineConfig

PROTOCOL_VERSION = 1


class FinishReason(enum.StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are successes; the others carry a message."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REJECTED = "rejected"


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The first frame the front-end sends: how to build the engine."""

    config: EngineConfig
    protocol: int = PROTOCOL_VERSION


class Grammar(msgspec.Struct, frozen=True):
    """What the output must match, enforced token by token."""

    kind: str
    """`json_schema` (text: the schema, `{}` for any JSON object is spelt out), `regex`, `lark`."""
    text: str


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    request_id: str
    prompt: bytes
    """Token ids as little-endian uint32."""
    params: SamplingParams
    priority: int = 0
    """Lower runs first, as in vLLM; within a priority tenants take turns, and one tenant's run in order of arrival."""
    tenant: str = ""
    cache_salt: str = ""
    """Part of the prefix cache's root hash: requests share blocks only under the same salt."""
    grammar: Grammar | None = None
    progress: bool = False
    """Report how much of the prompt is computed after each step, until the first token."""


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Accept nothing more, run what is there for at most `drain_seconds`, then end and exit 0."""

    drain_seconds: float


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget all cached blocks that no request refers to."""


ToEngine = Configure | AddRequest | AbortRequests | ResetPrefixCache | Shutdown


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The one terminal event of a request."""

    reason: FinishReason
    stop_token_id: int | None = None
    """The token that ended it, for `STOP`."""
    message: str | None = None
    code: str | None = None
    """Machine word of an error, e.g. `context_length_exceeded`, `nan_logits`."""


class Started(msgspec.Struct, frozen=True, array_like=True):
    """How a request got to its first token."""

    cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    queue_seconds: float
    """From its arrival in the engine to its first step."""
    prefill_seconds: float
    """From its first step to its first token."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and running totals of the engine since its start; the front-end turns them into metrics."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens of waiting requests that are not computed yet."""
    num_blocks: int = 0
    free_blocks: int = 0
    """Blocks no request refers to (cached contents included)."""
    cached_blocks: int = 0
    """Blocks in the prefix index."""
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache, total."""
    prefix_hits: int = 0
    """Prompt tokens found there, total."""
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed (not found in the cache), total."""
    generation_tokens: int = 0
    num_steps: int = 0
    step_tokens: int = 0
    """Tokens of the last step."""
    step_seconds: float = 0.0
    """Duration of the last step."""
    num_drafts: int = 0
    """Times that a request's step had draft tokens, total."""
    draft_tokens: int = 0
    """Draft tokens computed, total."""
    accepted_tokens: int = 0
    """Those that were right, total."""
    unknown_ids: int = 0
    nan_logits: int = 0
    """Requests that ended because their logits were not finite, total."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded and has answered once: what the engine turned out to be."""

    model_type: str
    fingerprint: str
    """Hash of config and weights' names, sizes and dtypes; root of the prefix cache's hashes."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    cache_bytes_per_token: int
    weight_bytes: int
    device: str
    dtype: str
    quantization: str
    """Of the weights: `none`, `int8`, `int4`."""
    ops: str
    """Implementation of the operations: `eager`, `cpu`, `cuda`."""
    instruction_set: str | None
    """That the CPU kernels use, such as `avx512_bf16`; None where others compute."""
    prefill_attention: str | None
    """Who computes the attention of long prompts on a GPU, `cudnn` or `triton`; None elsewhere."""
    max_num_seqs: int
    max_num_batched_tokens: int
    load_seconds: float
    protocol: int = PROTOCOL_VERSION


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """What one step gave, in columns: request i got `token_ids[i]` (one or more)."""

    step: int
    request_ids: list[str]
    token_ids: list[list[int]]
    finished: dict[str, Finished]
    """By request id; a request can finish without a token in this step (abort, error)."""
    started: dict[str, Started]
    """By request id, with its first token."""
    stats: EngineStats
    logprobs: dict[str, Logprobs] = {}
    prompt_logprobs: dict[str, Logprobs] = {}
    """By request id; of the next prompt tokens in order, each exactly once, also over a preemption."""
    progress: dict[str, int] = {}
    """By request id: prompt tokens computed so far, where it was asked for."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine cannot go on and exits after this frame."""

    kind: str
    """`config` (exit 2: the operator must change something), `load` or `step` (exit 70: a failure of our own)."""
    message: str
    """One line for the operator; never sent to clients."""
    request_ids: list[str] = msgspec.field(default_factory=list)


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent once a second, whatever the main loop does."""

    step: int
    step_age: float
    """Seconds since the current step began; 0 when idle."""
    stats: EngineStats


FromEngine = EngineReady | StepOutput | EngineFailed | Heartbeat
