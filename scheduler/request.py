"""One request inside the engine: the only mutable thing that the scheduler hands around."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from model.batch import NONE_LEFT, NOT_FINITE, SamplingParams
from scheduler.messages import Finished, FinishReason
from scheduler.ngram import NgramDrafter

NAN_LOGITS = Finished(
    reason=FinishReason.ERROR, code="nan_logits", message="the model produced logits that are not finite"
)
NO_TOKEN_LEFT = Finished(
    reason=FinishReason.REJECTED,
    code="no_token_left",
    message="No token is left to draw: what the request allows (grammar, token ids) and what it excludes (bad words, "
    "logit biases, stop tokens before min_tokens) contradict each other.",
)
FAULTS = {NOT_FINITE: NAN_LOGITS, NONE_LEFT: NO_TOKEN_LEFT}
"""How a request ends for which this came instead of a token."""
_LENGTH = Finished(reason=FinishReason.LENGTH)


class RequestStatus(enum.Enum):
    """A preempted request is WAITING again; what sets it apart is `num_preemptions`."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """Written by `Scheduler` and its parts alone, once it was added.

    A request holds its row and its blocks together, from admission until the last step that refers to
    them was processed. That can be a step later than the end of its running: a preempted or finished
    request with `steps_in_flight` still holds them.
    """

    request_id: str
    params: SamplingParams
    tokens: array[int]
    """`array('I')`: prompt, then output, as far as known here."""
    num_prompt_tokens: int
    max_num_tokens: int
    """Prompt + output at which the request ends with LENGTH."""
    priority: int
    stop_token_ids: frozenset[int]
    """The request's own and, unless ignored, the checkpoint's eos ids."""
    root: bytes
    """Start of the hash chain."""
    block_hashes: list[bytes]
    """Of the full blocks of `tokens`: all of the prompt's, the output's as they fill up."""
    tenant: str = ""
    """Whose it is: tenants take turns."""
    has_grammar: bool = False
    in_lockstep: bool = False
    """What may come next follows from known tokens alone (a grammar, banned sequences): never scheduled while one of
    its tokens is in flight."""
    drafter: NgramDrafter | None = None
    """Where drafts come from, for a request that has any."""
    progress: bool = False
    """Say after each step how much of the prompt is computed, until the first token."""
    arrived_at: float = 0.0
    """Seconds on the clock of the scheduler's caller, as the next one."""
    scheduled_at: float = 0.0
    """Of the first admission."""

    num_tokens: int = 0
    """Prompt + output, with the tokens that steps in flight will sample: >= len(tokens)."""
    num_computed_tokens: int = 0
    """Tokens whose latents are in the cache once the steps in flight have run."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at the first admission; None before it."""
    num_prompt_tokens_done: int = 0
    """Most of the prompt that was ever computed or found: what a resumed request computes again counts once."""
    num_prompt_logprobs: int = 0
    """Prompt tokens, from the second on, whose log-probabilities were delivered, where they were asked for."""
    drafts: list[int] = field(default_factory=list)
    """Guesses at what follows `tokens`: for the next step, or, where a step is in flight, those it computes."""
    num_registered_blocks: int = 0
    """Leading blocks of `block_table` that were offered to the prefix index, or came from it."""
    block_table: list[int] = field(default_factory=list)
    row: int | None = None
    status: RequestStatus = RequestStatus.WAITING
    order: tuple[int, int] = (0, 0)
    """(priority, arrival): unique, and the order of everything."""
    steps_in_flight: int = 0
    num_preemptions: int = 0

    def until_end(self, token_ids: list[int]) -> list[int]:
        """Those of newly sampled ones that count: up to the first that ends the request."""
        for index, token_id in enumerate(token_ids):
            if token_id in FAULTS:
                return token_ids[:index]
            if token_id in self.stop_token_ids:
                return token_ids[: index + 1]
        return token_ids

    def end_of(self, new: list[int], fault: Finished | None) -> Finished | None:
        """How it ends with its newest tokens, if it does. `fault`: what came behind them instead of a token."""
        if new and new[-1] in self.stop_token_ids:
            return Finished(reason=FinishReason.STOP, stop_token_id=new[-1])
        if fault is not None:
            return fault
        return _LENGTH if len(self.tokens) >= self.max_num_tokens else None
