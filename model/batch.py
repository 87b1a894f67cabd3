"""What crosses the boundary between the scheduler and the model worker: plain data, no torch.

A `ForwardBatch` says which rows run, from which position and for how many tokens; `SampledTokens`
says what came out. Token ids of a running row live in the worker (`model/rows.py`): a batch carries
them only when a row is bound to a request (`NewRow`), so a decode step costs a few integers a row and
a step can be planned before the tokens of the step before it are known.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import msgspec

NOT_FINITE = -1
"""In place of a token id: the logits were not finite."""
NONE_LEFT = -2
"""In place of a token id: what the request allows (its grammar, ids, bans and biases) has no id in common."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of one request is chosen. All values are already validated at the HTTP edge.

    `seed` is always set: the front-end draws one where the client gave none, so that a request's
    tokens are a function of (request, seed) alone, whatever its neighbours are.
    """

    max_tokens: int
    """Most tokens to generate, >= 1; clipped so that prompt + max_tokens <= max_model_len."""
    seed: int = 0
    """Key of the counter-based generator, reduced to 64 unsigned bits."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as vLLM and transformers; the two above over output only, as OpenAI."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request beside the checkpoint's eos ids."""
    ignore_eos: bool = False
    """The checkpoint's eos ids do not end the request (`stop_token_ids` still do)."""
    min_tokens: int = 0
    """Until so many tokens are generated, eos and stop ids cannot be drawn (with `ignore_eos`: stop ids only)."""
    logit_bias: dict[int, float] = {}
    """Added to the logits before temperature; -100 and below bans."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these can be drawn; empty means all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is banned where the ones before it were just generated."""
    logprobs: int | None = None
    """Log-probabilities of each sampled token and of so many most likely ones; None means none at all."""
    prompt_logprobs: int | None = None
    """Likewise for every prompt token but the first. Such a request takes no prefix hit."""


class Logprobs(msgspec.Struct, array_like=True):
    """Raw (before penalties, bias, temperature) log-probabilities of consecutive tokens, one entry a token.

    Entry i holds the token itself first, then the k most likely ids in falling order (the token may be among them).
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]

    def extend(self, later: Logprobs) -> None:
        """Append the entries of the tokens that follow."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs


@dataclass(frozen=True, slots=True)
class NewRow:
    """Binds a worker row to a request: sent with the first step of an admission or a resumption."""

    row: int
    """0 <= row < max_num_seqs."""
    tokens: array[int]
    """`array('I')`: every token known so far, prompt then output (a resumed request has output)."""
    num_prompt_tokens: int
    params: SamplingParams
    block_table: list[int] = field(default_factory=list)
    """Blocks the row starts with: those of a prefix hit, already computed."""


@dataclass(slots=True)
class ScheduledRow:
    """One row's share of a step: tokens [start, start + num_tokens) of its request."""

    row: int
    start: int
    """Position of the first token = number of tokens whose latents are already in the cache."""
    num_tokens: int
    new_blocks: list[int] = field(default_factory=list)
    """Block ids appended to the row's block table before the step runs."""
    sample: bool = False
    """The newest token known is among them, so its logits choose the next token."""
    drafts: list[int] = field(default_factory=list)
    """Guesses at the tokens behind the newest one, the last of `num_tokens`; only with `sample`, and never under a
    grammar. Each is accepted if the ones before it are and it is what sampling in its place gives."""


@dataclass(slots=True)
class ForwardBatch:
    """One step. The worker applies `released_rows`, then `new_rows`, then runs `rows`."""

    step: int
    rows: list[ScheduledRow]
    new_rows: list[NewRow] = field(default_factory=list)
    released_rows: list[int] = field(default_factory=list)
    grammar_bitmasks: dict[int, bytes] = field(default_factory=dict)
    """Row -> packed bits, little-endian, one a token id, at least vocab_size of them: 1 where the id may be drawn."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampled_rows(self) -> list[int]:
        """The row of each place that is sampled, in order: one behind the newest token, one behind each draft."""
        return [row.row for row in self.rows if row.sample for _ in range(1 + len(row.drafts))]

    def accepted(self, token_ids: list[int]) -> list[int]:
        """Which of the tokens sampled in those places count: a row's first, and each whose draft was the one before."""
        accepted: list[int] = []
        first = 0
        for row in self.rows:
            if row.sample:
                last = first
                for draft in row.drafts:
                    if token_ids[last] != draft:
                        break
                    last += 1
                accepted += range(first, last + 1)
                first += 1 + len(row.drafts)
        return accepted


@dataclass(slots=True)
class SampledTokens:
    """The outcome of one step, in columns: `token_ids[i]` was sampled for `rows[i]`."""

    step: int
    rows: list[int]
    """Rows of the batch with `sample`, in batch order; each once for every draft accepted and once more."""
    token_ids: list[int]
    """NOT_FINITE or NONE_LEFT, the last of its row, where there is none: the request ends with an error."""
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By row, for rows that asked for them."""
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By row: of the prompt tokens that this step's positions predict, in order."""
