"""What the worker remembers of each running request between steps, and how a step's inputs are gathered from it.

A row belongs to one request from its admission until it finishes or is preempted; a resumed request is
bound anew. The worker appends what it sampled itself, so a decode step needs a few integers a row: on the device
`feed` does when a step is launched, for the next step to read, and on the host `learn` when its tokens have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE
from model.sampler import Limits, SamplingInputs
from model.transfer import to_device

BAN = -100.0
"""A bias so low bans, as OpenAI documents it."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a request's parameters say about the ids it may draw, prepared for each step."""

    allowed: NDArray[np.int64]
    biased: NDArray[np.int64]
    bias: NDArray[np.float32]
    ends: list[int]
    """Ids that end the request: banned until `min_tokens` are generated."""
    min_tokens: int
    bad_words: list[list[int]]

    def banned_after(self, output: NDArray[np.int32]) -> list[int]:
        """Ids that cannot follow the tokens generated so far."""
        banned = self.ends[:] if len(output) < self.min_tokens else []
        for word in self.bad_words:
            before = len(word) - 1
            if before <= len(output) and output[len(output) - before :].tolist() == word[:-1]:
                banned.append(word[-1])
        return banned


class Rows:
    """State of `max_num_seqs` rows of at most `max_model_len` tokens; pages of it are used only once written."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._tokens = np.empty((max_num_seqs, max_model_len), np.int32)
        self._history = torch.from_numpy(self._tokens)
        """[max_num_seqs, max_model_len] int32: the same on the device; on a CPU the same memory."""
        self._apart = self._device.type != "cpu"
        if self._apart:
            self._history = torch.empty(self._tokens.shape, dtype=torch.int32, device=device)
        self._num_tokens = [0] * max_num_seqs
        """With those that steps in flight sample."""
        self._blocks = np.empty((max_num_seqs, -(-max_model_len // BLOCK_SIZE)), np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self._params: list[SamplingParams | None] = [None] * max_num_seqs
        self._temperature = np.zeros(max_num_seqs, np.float64)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float64)
        self._min_p = np.zeros(max_num_seqs, np.float64)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._repetition = np.ones(max_num_seqs, np.float64)
        self._presence = np.zeros(max_num_seqs, np.float64)
        self._frequency = np.zeros(max_num_seqs, np.float64)
        self._limits: list[_Limits | None] = [None] * max_num_seqs
        self._plain = [False] * max_num_seqs
        """Greedy, with neither limits nor penalties."""

    def update(self, batch: ForwardBatch) -> None:
        """Release, bind and grow rows as `batch` says. Raises ValueError where the batch contradicts the rows."""
        for row in batch.released_rows:
            if self._params[row] is None:
                raise ValueError(f"step {batch.step} releases row {row}, which is not bound")
            self._params[row] = None
            self._num_tokens[row] = self._num_blocks[row] = 0
        for new in batch.new_rows:
            if self._params[new.row] is not None:
                raise ValueError(f"step {batch.step} binds row {new.row}, which is still bound")
            self._bind(new)
        for scheduled in batch.rows:
            if scheduled.new_blocks:
                self._append_blocks(scheduled.row, scheduled.new_blocks)
            if scheduled.drafts:
                self._place_drafts(scheduled)

    def reset(self) -> None:
        """Release all rows."""
        self._params = [None] * len(self._params)
        self._num_tokens = [0] * len(self._params)
        self._num_blocks = [0] * len(self._params)

    def step_inputs(self, batch: ForwardBatch) -> StepInputs:
        """Gather the T tokens of `batch`, already applied by `update`, with no Python work per token."""
        rows, starts, context_lens = [], [], []
        query_start, sample_index = [0], list[int]()
        stop = 0
        for scheduled in batch.rows:
            row, start, length = scheduled.row, scheduled.start, scheduled.num_tokens
            end, drafts = start + length, len(scheduled.drafts)
            known = self._num_tokens[row]
            if (
                length < 1
                or end > self._num_blocks[row] * BLOCK_SIZE
                or end - drafts > known
                or (end - drafts != known if scheduled.sample else drafts)
            ):
                raise ValueError(f"step {batch.step} schedules tokens or blocks its rows do not have")
            stop += length
            rows.append(row)
            starts.append(start)
            query_start.append(stop)
            context_lens.append(end)
            if scheduled.sample:
                sample_index += range(stop - 1 - drafts, stop)
        of_tokens = of_rows = np.array(rows, np.int64)
        positions = np.array(starts, np.int64)
        if stop > len(rows):
            of_tokens = np.repeat(of_rows, np.diff(query_start))
            positions = np.concatenate([np.arange(*span) for span in zip(starts, context_lens, strict=True)])
        blocks, offsets = np.divmod(positions, BLOCK_SIZE)
        slots = self._blocks[of_tokens, blocks] * np.int64(BLOCK_SIZE) + offsets
        width = max(self._num_blocks[row] for row in rows)
        return StepInputs(
            token_ids=self._gather(of_tokens, positions),
            positions=to_device(positions, self._device),
            slot_mapping=to_device(slots, self._device),
            query_start=query_start,
            context_lens=context_lens,
            block_tables=to_device(self._blocks[of_rows, :width], self._device),
            sample_index=to_device(np.array(sample_index, np.int64), self._device),
        )

    def _gather(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Tokens, int64 on the device, whether the host knows them or not."""
        if not self._apart:
            return torch.from_numpy(self._tokens[rows, positions].astype(np.int64))
        index = to_device(rows * self._tokens.shape[1] + positions, self._device)
        return self._history.view(-1).index_select(0, index).long()

    def params(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None
        return params

    def predicted_prompt_tokens(self, scheduled: ScheduledRow) -> list[int]:
        """The prompt tokens that the first positions of a row's share of the step predict: each position the next."""
        end = min(scheduled.start + scheduled.num_tokens + 1, int(self._num_prompt_tokens[scheduled.row]))
        tokens: list[int] = self._tokens[scheduled.row, scheduled.start + 1 : end].tolist()
        return tokens

    def sampling_inputs(
        self, sampled: Sequence[int], bitmasks: Mapping[int, bytes] | None = None
    ) -> SamplingInputs | None:
        """Parameters of the rows that sample, in the order given; `bitmasks` by row, of those under a grammar. None:
        all of them are greedy, with neither limits nor penalties.

        A row that comes again samples behind its drafts, one more each time, as if those were its newest tokens.
        """
        bitmasks = bitmasks or {}
        if not bitmasks and all(self._plain[row] for row in sampled):
            return None
        rows = np.array(sampled, np.int64)
        places = self._places(sampled)
        return SamplingInputs(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            seed=self._seed[rows],
            position=np.array(places, np.int64),
            repetition=self._repetition[rows],
            presence=self._presence[rows],
            frequency=self._frequency[rows],
            row=rows,
            num_prompt_tokens=self._num_prompt_tokens[rows],
            history=self._history,
            limits=[
                self._limits_of(row, index, places[index], bitmasks.get(row))
                for index, row in enumerate(sampled)
                if self._limits[row] is not None or row in bitmasks
            ],
        )

    def feed(self, sampled: Sequence[int], token_ids: Tensor) -> list[int]:
        """Write the S tokens that a step samples, int64 on the device, to their rows, where its drafts were: a row may
        run again before they are known. Returns their places, for `learn`.

        A request without a next token (below 0) is about to end: it gets id 0. A full row takes no more.
        """
        places = self._places(sampled)
        width = self._tokens.shape[1]
        kept = [i for i, place in enumerate(places) if place < width]
        if not self._apart:
            for i, token_id in enumerate(token_ids.tolist()):
                if places[i] < width:
                    self._tokens[sampled[i], places[i]] = max(token_id, 0)
        elif kept:
            index = np.array([sampled[i] * width + places[i] for i in kept], np.int64)
            chosen = token_ids.index_select(0, to_device(np.array(kept, np.int64), self._device))
            self._history.view(-1).index_copy_(0, to_device(index, self._device), chosen.clamp(min=0).int())
        for i in kept:
            if i == 0 or sampled[i] != sampled[i - 1]:
                self._num_tokens[sampled[i]] += 1
        return places

    def learn(self, sampled: Sequence[int], places: Sequence[int], token_ids: Sequence[int]) -> None:
        """On the host: tokens that were sampled for rows, at the places that `feed` gave them. Of a row that had drafts
        these are the ones accepted."""
        width = self._tokens.shape[1]
        for row, place, token_id in zip(sampled, places, token_ids, strict=True):
            if place < width:
                self._tokens[row, place] = max(token_id, 0)
                self._num_tokens[row] = max(self._num_tokens[row], place + 1)

    def _places(self, sampled: Sequence[int]) -> list[int]:
        """Where the next token of each row goes; of a row that comes again, beside itself, one further each time."""
        places: list[int] = []
        last = -1
        for row in sampled:
            places.append(places[-1] + 1 if row == last else self._num_tokens[row])
            last = row
        return places

    def _bind(self, new: NewRow) -> None:
        row, params, tokens = new.row, new.params, np.frombuffer(new.tokens, np.uint32)
        if not 0 < new.num_prompt_tokens <= len(tokens) <= self._tokens.shape[1]:
            raise ValueError(f"row {row} cannot hold {len(tokens)} tokens with a prompt of {new.num_prompt_tokens}")
        self._params[row] = params
        self._write(row, 0, tokens)
        self._num_tokens[row] = len(tokens)
        self._num_prompt_tokens[row] = new.num_prompt_tokens
        self._num_blocks[row] = 0
        self._append_blocks(row, new.block_table)
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = params.seed
        self._repetition[row] = params.repetition_penalty
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        self._limits[row] = self._prepare_limits(params)
        penalties = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self._plain[row] = params.temperature == 0 and not penalties and self._limits[row] is None

    def _prepare_limits(self, params: SamplingParams) -> _Limits | None:
        if not (params.min_tokens or params.logit_bias or params.allowed_token_ids or params.bad_words):
            return None
        bias = np.array(list(params.logit_bias.values()), np.float32)
        return _Limits(
            allowed=np.array(params.allowed_token_ids, np.int64),
            biased=np.array(list(params.logit_bias), np.int64),
            bias=np.where(bias <= BAN, np.float32(-np.inf), bias),
            ends=[*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)],
            min_tokens=params.min_tokens,
            bad_words=[list(word) for word in params.bad_words if word],
        )

    def _append_blocks(self, row: int, blocks: Sequence[int]) -> None:
        first = self._num_blocks[row]
        if first + len(blocks) > self._blocks.shape[1]:
            raise ValueError(f"row {row} cannot hold {first + len(blocks)} blocks")
        self._blocks[row, first : first + len(blocks)] = blocks
        self._num_blocks[row] = first + len(blocks)

    def _place_drafts(self, scheduled: ScheduledRow) -> None:
        """Behind the row's tokens, of which they become part only as far as they are sampled."""
        first = self._num_tokens[scheduled.row]
        if first + len(scheduled.drafts) > self._tokens.shape[1]:
            raise ValueError(f"row {scheduled.row} cannot hold {len(scheduled.drafts)} drafts")
        self._write(scheduled.row, first, np.array(scheduled.drafts, np.int32))

    def _write(self, row: int, first: int, tokens: NDArray[np.integer[Any]]) -> None:
        """Tokens that the host knows, from position `first`."""
        own = self._tokens[row, first : first + len(tokens)]
        own[:] = tokens
        if self._apart:
            self._history[row, first : first + len(tokens)].copy_(to_device(own, self._device))

    def _limits_of(self, row: int, index: int, num_tokens: int, bitmask: bytes | None) -> Limits:
        limits = self._limits[row]
        if limits is None:
            none = np.empty(0, np.int64)
            return Limits(index, bitmask, allowed=none, banned=none, biased=none, bias=np.empty(0, np.float32))
        output = self._tokens[row, self._num_prompt_tokens[row] : num_tokens]
        banned = np.array(limits.banned_after(output), np.int64)
        return Limits(index, bitmask, limits.allowed, banned, limits.biased, limits.bias)
