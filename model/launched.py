"""A step that was handed to the device and whose tokens are not looked at yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from model.batch import ForwardBatch, Logprobs, SampledTokens
from model.logprobs import Scores, column_of, entries_of
from model.rows import Rows
from model.transfer import ToHost


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step samples, on the device."""

    token_ids: Tensor
    """[S] int64, as `Ops.sample` gives them."""
    places: Sequence[int]
    """[S], as `Rows.feed` gives them."""
    asked: Mapping[int, int]
    """Which of the S want log-probabilities, and of how many alternatives."""
    scores: Scores | None
    """Of those, in their order; None where there are none."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """Prompt tokens that a row's positions predict, and their scores on the device."""

    token_ids: Sequence[int]
    num_top: int
    scores: Scores


class LaunchedStep:
    """Steps are collected in the order in which they were launched."""

    def __init__(
        self, batch: ForwardBatch, rows: Rows, sampled: Sampled | None, prompts: Mapping[int, ScoredPrompt]
    ) -> None:
        """`prompts`: by row."""
        self._batch, self._rows, self._sampled, self._prompts = batch, rows, sampled, prompts
        tensors = [] if sampled is None else [sampled.token_ids, *(sampled.scores or ())]
        for prompt in prompts.values():
            tensors += prompt.scores
        self._arriving = ToHost(tensors)

    def collect(self) -> SampledTokens:
        """Wait for its tokens; the rows learn them."""
        arrived = iter(self._arriving.wait())
        outcome = SampledTokens(self._batch.step, [], [])
        if self._sampled is not None:
            token_ids: list[int] = next(arrived).tolist()
            rows = self._batch.sampled_rows
            accepted = self._batch.accepted(token_ids)
            outcome.rows = [rows[i] for i in accepted]
            outcome.token_ids = [token_ids[i] for i in accepted]
            places = self._sampled.places
            self._rows.learn(outcome.rows, [places[i] for i in accepted], outcome.token_ids)
            if asked := self._sampled.asked:
                scores = Scores(next(arrived), next(arrived), next(arrived))
                chosen = [max(token_ids[i], 0) for i in asked]
                kept = set(accepted)
                for i, entry in zip(asked, entries_of(scores, chosen, list(asked.values())), strict=True):
                    if i in kept:
                        outcome.logprobs.setdefault(rows[i], Logprobs([], [])).extend(entry)
        for row, prompt in self._prompts.items():
            scores = Scores(next(arrived), next(arrived), next(arrived))
            outcome.prompt_logprobs[row] = column_of(scores, prompt.token_ids, prompt.num_top)
        return outcome
