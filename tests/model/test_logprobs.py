"""Log-probabilities: by their definition, and of the whole engine against the naive twin in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from model.batch import Logprobs, SamplingParams
from model.config import load_config
from model.logprobs import SLICE_ROWS, entries_of, score
from model.reference import reference_logits
from scheduler.config import BLOCK_SIZE
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint, read_tensors
from tests.model.engine import Engine, Outcome

MAX_TOKENS = 6
TOLERANCE = 1e-4


def logprobs_of(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[tuple[list[int], list[float]]]:
    """Of each row: its token, then its likeliest ones."""
    scores = score(logits, torch.tensor(token_ids), max(num_top))
    return [(e.token_ids[0], e.logprobs[0]) for e in entries_of(scores, token_ids, num_top)]


def test_a_tokens_own_comes_first_then_the_likeliest_and_of_equal_ones_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0], [0.0, -torch.inf, 0.0, 0.0, 0.0]])
    entries = logprobs_of(logits, [0, 4, 1], [3, 2, 0])
    assert [ids for ids, _ in entries] == [[0, 1, 3, 2], [4, 0, 1], [1]]
    exact = logits.double().log_softmax(-1)
    for row, (ids, values) in enumerate(entries):
        np.testing.assert_allclose(values, exact[row, ids].numpy(), rtol=1e-6)
    assert entries[2][1] == [-float("inf")]


def test_what_a_row_gets_does_not_depend_on_what_its_neighbours_ask() -> None:
    """Rounded logits are full of ties."""
    logits = torch.randn((40, 2000), generator=torch.Generator().manual_seed(0)).round(decimals=1)
    num_top = [i % 21 for i in range(40)]
    together = logprobs_of(logits, list(range(40)), num_top)
    for i in range(40):
        assert logprobs_of(logits[i : i + 1], [i], [num_top[i]])[0][0] == together[i][0]
        likeliest = sorted(range(2000), key=lambda t: (-float(logits[i, t]), t))[: num_top[i]]
        assert together[i][0] == [i, *likeliest]


def test_more_than_there_is_cannot_be_had() -> None:
    (ids, _), (more, _) = logprobs_of(torch.arange(8.0).repeat(2, 1), [0, 1], [20, 3])
    assert (ids, more) == ([0, 7, 6, 5, 4, 3, 2, 1, 0], [1, 7, 6, 5])


def test_logits_that_are_not_finite_give_nan() -> None:
    logits = torch.zeros((2, 30))
    logits[0, 3] = torch.nan
    (_, broken), (_, sound) = logprobs_of(logits, [5, 5], [2, 2])
    assert np.isnan(broken[0])
    assert len(sound) == 3


@dataclass(frozen=True)
class Case:
    model_dir: Path
    requests: list[AddRequest]
    reference: list[Tensor]
    """[T, V] log-probabilities after each token of prompt and output."""
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=["v2-yarn", "v3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_dir = make_checkpoint(tmp_path_factory.mktemp("logprobs"), request.param)
    rng = np.random.default_rng(3)
    shared = rng.integers(2, 256, size=130)
    requests = []
    for i, length in enumerate((1, 2, 64, 65, 200, 190, 255, 127)):
        prompt = rng.integers(2, 256, size=length)
        if i % 2 == 0:
            prompt[:130] = shared[:length]
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=(0.0, 0.9)[i % 2],
            seed=i,
            ignore_eos=True,
            logprobs=(3, 0, None, 20)[i % 4],
            prompt_logprobs=(5, None, 0, 20)[i % 4] if i else 2,
            # What changes the choice must not change what is reported.
            logit_bias={7: 3.0, 9: -100.0} if i % 3 else {},
            repetition_penalty=1.3,
        )
        requests.append(AddRequest(request_id=str(i), prompt=prompt.astype("<u4").tobytes(), params=params))
    tokens = Engine(model_dir, prefix_cache=False).generate(requests).tokens
    config, weights = load_config(model_dir), read_tensors(model_dir)
    reference = [
        reference_logits(config, weights, [*prompt_of(request), *output]).log_softmax(-1)
        for request, output in zip(requests, tokens, strict=True)
    ]
    return Case(model_dir, requests, reference, tokens)


def prompt_of(request: AddRequest) -> list[int]:
    return np.frombuffer(request.prompt, "<u4").tolist()


def check(case: Case, outcome: Outcome) -> None:
    assert outcome.tokens == case.tokens
    for i, request in enumerate(case.requests):
        prompt, reference = prompt_of(request), case.reference[i]
        last = len(prompt) - 1
        compare(outcome.prompt_logprobs[i], prompt[1:], reference[:last], request.params.prompt_logprobs)
        compare(outcome.logprobs[i], outcome.tokens[i], reference[last : last + MAX_TOKENS], request.params.logprobs)


def compare(ours: Logprobs, tokens: list[int], reference: Tensor, num_top: int | None) -> None:
    if num_top is None:
        assert ours == Logprobs([], [])
        return
    assert [ids[0] for ids in ours.token_ids] == tokens
    assert {len(ids) for ids in ours.token_ids} <= {num_top + 1}
    if not tokens:
        return
    values = torch.tensor(ours.logprobs)
    torch.testing.assert_close(values, reference.gather(1, torch.tensor(ours.token_ids)), rtol=0, atol=TOLERANCE)
    if num_top:
        torch.testing.assert_close(values[:, 1:], reference.topk(num_top).values, rtol=0, atol=TOLERANCE)


def test_alone(case: Case) -> None:
    engine = Engine(case.model_dir)
    outcomes = [engine.generate([request]) for request in case.requests]
    check(
        case,
        Outcome(
            tokens=[outcome.tokens[0] for outcome in outcomes],
            cached_tokens=[],
            logprobs=[outcome.logprobs[0] for outcome in outcomes],
            prompt_logprobs=[outcome.prompt_logprobs[0] for outcome in outcomes],
            num_preemptions=0,
            accepted_tokens=0,
        ),
    )


def test_together_and_again_with_a_full_prefix_cache(case: Case) -> None:
    engine = Engine(case.model_dir)
    check(case, engine.generate(case.requests))
    again = engine.generate(case.requests)
    check(case, again)
    for request, cached in zip(case.requests, again.cached_tokens, strict=True):
        full = (len(request.prompt) // 4 - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert cached == (full if request.params.prompt_logprobs is None else 0)


def test_in_steps_of_7_tokens(case: Case) -> None:
    check(case, Engine(case.model_dir, budget=7).generate(case.requests))


def test_preempted_for_want_of_blocks(case: Case) -> None:
    outcome = Engine(case.model_dir, num_blocks=12, watermark_blocks=0).generate(case.requests)
    assert outcome.num_preemptions >= 1
    check(case, outcome)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_in_the_middle_of_prompts(case: Case, prefix_cache: bool) -> None:
    engine = Engine(case.model_dir, budget=48, prefix_cache=prefix_cache)
    outcome = engine.generate(case.requests, preempt_every=8)
    assert outcome.num_preemptions >= 3
    check(case, outcome)


def test_the_logits_of_a_long_prompt_never_exist_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(case.model_dir)
    sizes = []
    logits = engine.runner.model.logits

    def count(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return logits(hidden)

    monkeypatch.setattr(engine.runner.model, "logits", count)
    prompt = np.random.default_rng(0).integers(2, 256, size=500)
    params = structs.replace(case.requests[0].params, prompt_logprobs=1)
    engine.generate([AddRequest(request_id="long", prompt=prompt.astype("<u4").tobytes(), params=params)])
    assert max(sizes) == SLICE_ROWS
    assert sum(sizes) == 499 + MAX_TOKENS
