"""A worker without a network that trusts nothing: the scheduler's tests run against it.

Every slot of its cache holds what a real one's latents depend on: a digest of all tokens up to and
including the slot's. A step writes the digests of its tokens, then reads back every position of every
row, so a block that was lost, shared wrongly, registered too early or written twice shows at once. The
next token is a function of the digest read at the last position: a wrong cache gives a wrong text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from model.batch import ForwardBatch, Logprobs, NewRow, SampledTokens, SamplingParams, ScheduledRow
from scheduler.messages import AddRequest, FinishReason, Grammar
from scheduler.scheduler import Scheduler

VOCAB_SIZE = 16
EOS = 15
NAN_SEED_BIT = 1 << 32
"""A request whose seed has this bit has broken logits at its third output token."""
REPEAT_SEED_BIT = 1 << 33
"""One whose seed has this bit repeats three tokens, but for some here and there: drafts are often right."""


def extend_digest(digest: bytes, token: int) -> bytes:
    return blake2b(digest + token.to_bytes(4, "little"), digest_size=16).digest()


def next_token(digest: bytes, params: SamplingParams, num_output_tokens: int) -> int:
    """The network and the sampler of this world."""
    if params.seed & NAN_SEED_BIT and num_output_tokens == 2:
        return -1
    drawn = blake2b(digest + params.seed.to_bytes(8, "little"), digest_size=1).digest()[0]
    if params.seed & REPEAT_SEED_BIT and drawn >= 32:
        return num_output_tokens % 3
    return drawn % VOCAB_SIZE


def run_alone(
    prompt: Sequence[int], params: SamplingParams, max_num_tokens: int, eos: int = EOS
) -> tuple[list[int], FinishReason]:
    """What a request gives when it is computed by itself, token by token, with no cache and no scheduler."""
    digest = b""
    for token in prompt:
        digest = extend_digest(digest, token)
    output: list[int] = []
    while True:
        token = next_token(digest, params, len(output))
        if token == -1:
            return output, FinishReason.ERROR
        output.append(token)
        if token in params.stop_token_ids or (token == eos and not params.ignore_eos):
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or len(prompt) + len(output) == max_num_tokens:
            return output, FinishReason.LENGTH
        digest = extend_digest(digest, token)


def logprobs_at(tokens: Sequence[int], positions: Sequence[int]) -> Logprobs:
    """This world's log-probability of a token is its position: what is lost, doubled or out of order shows."""
    return Logprobs([[tokens[position]] for position in positions], [[float(position)] for position in positions])


@dataclass
class Row:
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_table: list[int]
    num_computed: int
    digest: bytes


class FakeWorker:
    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.cache: list[list[bytes | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.written_in_step = [-1] * num_blocks
        self.processed_step = -1
        self.last_step = -1
        self.rows: dict[int, Row] = {}
        self.bound: list[NewRow] = []
        """Every binding, for tests that look at what was resumed."""

    def execute(self, batch: ForwardBatch) -> SampledTokens:
        assert batch.step == self.last_step + 1
        self.last_step = batch.step
        assert 0 < batch.num_tokens <= self.max_num_batched_tokens
        for row in batch.released_rows:
            del self.rows[row]
        for new_row in batch.new_rows:
            self._bind(new_row)
        assert len({row.row for row in batch.rows}) == len(batch.rows)
        assert {new_row.row for new_row in batch.new_rows} <= {row.row for row in batch.rows}
        for scheduled in batch.rows:
            self._write(batch.step, scheduled)
        sampled = SampledTokens(batch.step, [], [])
        for scheduled in batch.rows:
            self._read(scheduled, sampled)
        return sampled

    def _bind(self, new_row: NewRow) -> None:
        assert 0 <= new_row.row < self.max_num_seqs
        assert new_row.row not in self.rows, "a row was bound before it was released"
        # (c) the tokens are the request's true ones: its prompt and what it gives alone, so far.
        tokens, num_prompt = list(new_row.tokens), new_row.num_prompt_tokens
        output = tokens[num_prompt:]
        true_output, _ = run_alone(tokens[:num_prompt], new_row.params, len(tokens) + 1)
        assert output == true_output[: len(output)], "a row was bound to wrong tokens"
        # A hit ends below the last token, and was computed by a step whose outcome is known.
        num_hit = len(new_row.block_table) * self.block_size
        assert num_hit < len(tokens), "nothing is left to compute"
        for block in new_row.block_table:
            assert 0 <= self.written_in_step[block] <= self.processed_step, "a hit on a block that is not processed"
        digest = b""
        for token in tokens[:num_hit]:
            digest = extend_digest(digest, token)
        self.rows[new_row.row] = Row(tokens, num_prompt, new_row.params, list(new_row.block_table), num_hit, digest)
        self.bound.append(new_row)

    def _write(self, step: int, scheduled: ScheduledRow) -> None:
        row = self.rows[scheduled.row]
        # (a) every position exactly once, in order.
        assert scheduled.start == row.num_computed
        end = scheduled.start + scheduled.num_tokens
        known = end - len(scheduled.drafts)
        assert scheduled.start < known <= len(row.tokens), "a token is computed before it is known"
        row.block_table.extend(scheduled.new_blocks)
        assert len(row.block_table) == -(-known // self.block_size) == -(-end // self.block_size)
        assert scheduled.sample == (known == len(row.tokens))
        assert scheduled.sample or not scheduled.drafts
        row.tokens += scheduled.drafts
        for position in range(scheduled.start, end):
            block = row.block_table[position // self.block_size]
            # (b) what a row writes belongs to nobody else.
            if position % self.block_size == 0 or position == scheduled.start:
                users = [other for other, state in self.rows.items() if block in state.block_table]
                assert users == [scheduled.row], f"block {block} is written by one of its users {users}"
                self.written_in_step[block] = step
            row.digest = extend_digest(row.digest, row.tokens[position])
            self.cache[block][position % self.block_size] = row.digest
        row.num_computed = end

    def _read(self, scheduled: ScheduledRow, sampled: SampledTokens) -> None:
        row = self.rows[scheduled.row]
        digest = b""
        for position in range(row.num_computed):
            digest = extend_digest(digest, row.tokens[position])
            slot = self.cache[row.block_table[position // self.block_size]][position % self.block_size]
            assert slot == digest, f"position {position} of row {scheduled.row} reads another prefix"
        if row.params.prompt_logprobs is not None:
            predicted = range(scheduled.start + 1, min(row.num_computed + 1, row.num_prompt_tokens))
            if predicted:
                sampled.prompt_logprobs[scheduled.row] = logprobs_at(row.tokens, predicted)
        if scheduled.sample:
            self._sample(row, scheduled, sampled)

    def _sample(self, row: Row, scheduled: ScheduledRow, sampled: SampledTokens) -> None:
        """Accepts drafts by what the row gives alone, token by token: no words shared with the real worker."""
        drafts = scheduled.drafts
        del row.tokens[len(row.tokens) - len(drafts) :]
        row.digest = b""
        for token in row.tokens:
            row.digest = extend_digest(row.digest, token)
        logprobs = Logprobs([], [])
        for draft in [*drafts, None]:
            token = next_token(row.digest, row.params, len(row.tokens) - row.num_prompt_tokens)
            logprobs.extend(Logprobs([[token]], [[float(len(row.tokens))]]))
            sampled.rows.append(scheduled.row)
            sampled.token_ids.append(token)
            row.num_computed = len(row.tokens)
            row.tokens.append(max(token, 0))
            if token != draft:
                break
            row.digest = extend_digest(row.digest, token)
        if row.params.logprobs is not None:
            sampled.logprobs[scheduled.row] = logprobs


def request_message(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 4,
    priority: int = 0,
    cache_salt: str = "",
    tenant: str = "",
    seed: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = True,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    progress: bool = False,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> AddRequest:
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        bad_words=bad_words,
    )
    return AddRequest(
        request_id=request_id,
        prompt=array("I", prompt).tobytes(),
        params=params,
        priority=priority,
        cache_salt=cache_salt,
        tenant=tenant,
        grammar=grammar,
        progress=progress,
    )


def worker_for(scheduler: Scheduler, max_num_seqs: int) -> FakeWorker:
    return FakeWorker(
        num_blocks=scheduler.pool.num_blocks,
        block_size=scheduler.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=scheduler.max_lone_chunk,
    )
