"""What one forward pass of the network reads: a ragged batch of rows, as tensors on the model's device.

Rows lie one after another in batch order without padding: row r owns the tokens
[query_start[r], query_start[r + 1]) of every [T] tensor. A decode row has one token, a prefill chunk
many; nothing else tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: place of each token in its own sequence, from 0."""
    slot_mapping: Tensor
    """[T] int64: where each token's latent is written, block * BLOCK_SIZE + offset. No slot occurs twice."""
    query_start: list[int]
    """R + 1 offsets into the T tokens, from 0 to T, strictly increasing; on the host."""
    context_lens: list[int]
    """R lengths on the host: tokens each row attends to, this step's own included (position of its last token + 1)."""
    block_tables: Tensor
    """[R, max_blocks] int32, row r's blocks in order. Entries past ceil(context_lens[r] / BLOCK_SIZE) are ignored."""
    sample_index: Tensor
    """[S] int64: the tokens (indices into T) whose hidden state chooses a next token."""

    @property
    def num_rows(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_start[-1]

    def halves(self) -> tuple[StepInputs, StepInputs]:
        """Its tokens as two steps, to be computed one after the other; nothing of either is sampled. T > 1."""
        middle = self.num_tokens // 2
        return self._part(0, middle), self._part(middle, self.num_tokens)

    def _part(self, first: int, last: int) -> StepInputs:
        spans = zip(self.query_start, self.query_start[1:], self.context_lens, strict=False)
        rows = [
            (row, min(stop, last) - first, context - max(stop - last, 0))
            for row, (start, stop, context) in enumerate(spans)
            if start < last and stop > first
        ]
        return StepInputs(
            token_ids=self.token_ids[first:last],
            positions=self.positions[first:last],
            slot_mapping=self.slot_mapping[first:last],
            query_start=[0, *(stop for _, stop, _ in rows)],
            context_lens=[context for _, _, context in rows],
            block_tables=self.block_tables[rows[0][0] : rows[-1][0] + 1],
            sample_index=self.sample_index[:0],
        )
