"""The sampler against a plain numpy oracle, against transformers' logits processors, and by statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import sampler
from model.batch import NONE_LEFT, NOT_FINITE
from model.sampler import (
    CANDIDATES,
    GOLDEN_GAMMA,
    SLICE_ELEMENTS,
    Limits,
    SamplingInputs,
    exponentials,
    mix64,
    truncate,
)


def sample(logits: torch.Tensor, inputs: SamplingInputs | None) -> list[int]:
    tokens: list[int] = sampler.sample(logits, inputs).tolist()
    return tokens


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def limits_of(index: int, limits: dict[str, Any], vocab_size: int) -> Limits:
    bitmask = None
    if "grammar" in limits:
        bits = np.zeros(vocab_size, np.uint8)
        bits[limits["grammar"]] = 1
        bitmask = np.packbits(bits, bitorder="little").tobytes() + b"\xff"  # what is beyond the vocabulary is ignored
    bias = limits.get("bias", {})
    return Limits(
        index=index,
        bitmask=bitmask,
        allowed=np.array(limits.get("allowed", []), np.int64),
        banned=np.array(limits.get("banned", []), np.int64),
        biased=np.array(list(bias), np.int64),
        bias=np.array(list(bias.values()), np.float32),
    )


def inputs_of(rows: list[dict[str, Any]], vocab_size: int = 0) -> SamplingInputs:
    """Columns from one dict a row; `penalties` is (tokens, num_prompt_tokens, repetition, presence, frequency).

    `limits` has any of grammar, allowed, banned (ids) and bias (by id), and needs `vocab_size`.
    """

    def column(name: str, default: float, dtype: type) -> NDArray[Any]:
        return np.array([row.get(name, default) for row in rows], dtype)

    def penalties(place: int, default: float, dtype: type) -> NDArray[Any]:
        return np.array([row["penalties"][place] if "penalties" in row else default for row in rows], dtype)

    # The position of a row is the number of its tokens: those with penalties have both.
    tokens = [row["penalties"][0] if "penalties" in row else [] for row in rows]
    history = np.full((len(rows), max(map(len, tokens), default=0) + 3), -7, np.int32)
    for line, own in zip(history[::-1], tokens, strict=True):
        line[: len(own)] = own
    positions = [len(own) or row.get("position", 0) for row, own in zip(rows, tokens, strict=True)]
    return SamplingInputs(
        temperature=column("temperature", 1.0, np.float64),
        top_k=column("top_k", 0, np.int64),
        top_p=column("top_p", 1.0, np.float64),
        min_p=column("min_p", 0.0, np.float64),
        seed=column("seed", 0, np.uint64),
        position=np.array(positions, np.int64),
        repetition=penalties(2, 1.0, np.float64),
        presence=penalties(3, 0.0, np.float64),
        frequency=penalties(4, 0.0, np.float64),
        row=np.arange(len(rows))[::-1],
        num_prompt_tokens=penalties(1, 0, np.int64),
        history=torch.from_numpy(history),
        limits=[limits_of(i, row["limits"], vocab_size) for i, row in enumerate(rows) if "limits" in row],
    )


def random_rows(count: int, vocab_size: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {
            "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.0])),
            "top_k": int(rng.choice([0, 1, 5, vocab_size, 10 * vocab_size])),
            "top_p": float(rng.choice([0.05, 0.5, 0.9, 1.0])),
            "min_p": float(rng.choice([0.0, 0.02, 0.4, 1.0])),
            "seed": int(rng.integers(2**64, dtype=np.uint64)),
            "position": i,
        }
        if i % 3 == 0:
            tokens = rng.integers(vocab_size, size=30).tolist()
            row["penalties"] = (tokens, 12, *(float(x) for x in rng.choice([0.5, 1.0, 1.5, 2.0], 3)))
            row["position"] = len(tokens)
        if i % 4 < 2:
            ids = rng.permutation(vocab_size)
            kinds = {
                "grammar": ids[: vocab_size // 2].tolist(),
                "allowed": ids[vocab_size // 3 :].tolist(),
                "banned": ids[vocab_size // 3 : vocab_size // 3 + 5].tolist(),
                "bias": {int(ids[0]): -np.inf, **{int(t): float(rng.normal() * 3) for t in ids[1:12]}},
            }
            chosen = rng.choice(list(kinds), size=int(rng.integers(1, 5)), replace=False)
            row["limits"] = {name: kinds[name] for name in chosen}
        rows.append(row)
    return rows


def oracle_mix64(x: int) -> int:
    """The body of Vigna's splitmix64.c, in Python's integers."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return x ^ x >> 31


def oracle_probabilities(logits: NDArray[np.float32], row: dict[str, Any]) -> NDArray[np.float64]:
    """One row, one id at a time, as the API documents it; temperature > 0."""
    scores = logits.copy()
    limits = row.get("limits", {})
    for token in range(len(scores)):
        if (
            token not in limits.get("grammar", [token])
            or token not in limits.get("allowed", [token])
            or token in limits.get("banned", [])
        ):
            scores[token] = -np.inf
        scores[token] += np.float32(limits.get("bias", {}).get(token, 0.0))
    if "penalties" in row:
        tokens, num_prompt_tokens, repetition, presence, frequency = row["penalties"]
        for token in set(tokens):
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        for token in set(tokens[num_prompt_tokens:]):
            scores[token] -= np.float32(presence + frequency * tokens[num_prompt_tokens:].count(token))
    if row["temperature"] == 0:
        return (np.arange(len(scores)) == scores.argmax()).astype(np.float64)
    exact = np.exp((scores - scores.max()).astype(np.float64) / row["temperature"])
    order = sorted(range(len(exact)), key=lambda i: (-exact[i], i))
    if row["top_k"]:
        order = order[: row["top_k"]]
    total, mass, kept = sum(exact[i] for i in order), 0.0, []
    for i in order:
        if mass < row["top_p"] * total or row["top_p"] == 1.0:
            kept.append(i)
        mass += exact[i]
    kept = [i for i in kept if exact[i] >= row["min_p"] * exact[order[0]]]
    probabilities = np.zeros(len(exact))
    probabilities[kept] = exact[kept]
    return probabilities / probabilities.sum()


def oracle_token(logits: NDArray[np.float32], row: dict[str, Any]) -> int:
    key = oracle_mix64(oracle_mix64(row["seed"]) ^ row["position"])
    arrivals = {}
    for i, probability in enumerate(oracle_probabilities(logits, row)):
        if probability > 0:
            bits = oracle_mix64((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64)
            arrivals[i] = -math.log(((bits >> 11) + 0.5) / 2**53) / probability
    return min(arrivals, key=lambda i: arrivals[i])


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
    ],
)
def test_the_generator_gives_the_known_answers_of_splitmix64(seed: int, outputs: list[int]) -> None:
    states = torch.tensor([seed]) + torch.arange(1, 5) * GOLDEN_GAMMA
    assert [word % 2**64 for word in mix64(states).tolist()] == outputs
    uniform = (torch.tensor([word >> 11 for word in outputs]).double() + 0.5) / 2**53
    torch.testing.assert_close(exponentials(torch.tensor([seed]), torch.arange(4)), -uniform.log())


def test_all_bits_of_the_seed_count() -> None:
    seeds = [0, 1, 1 << 31, 1 << 32, 1 << 63, 2**64 - 1]
    rows = [{"seed": seed, "position": position} for seed in seeds for position in (0, 1, 131_071)]
    assert len(set(sample(torch.zeros((18, 1 << 16)), inputs_of(rows)))) == 18


def test_a_change_of_the_last_bits_changes_few_draws() -> None:
    """What other batch shapes do to logits in bfloat16; an inverse cumulative distribution loses a third of these."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((100, 20_000), generator=generator) * 2.5
    changed = logits + 0.01 * torch.randn(logits.shape, generator=generator)
    rows = inputs_of([{"temperature": 0.8, "top_p": 0.9, "seed": i} for i in range(100)])
    kept = sum(a == b for a, b in zip(sample(logits, rows), sample(changed, rows), strict=True))
    assert kept >= 95


@pytest.mark.parametrize("vocab_size", [40, 2 * CANDIDATES + 77])
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_mixed_rows_equal_the_oracle(vocab_size: int, spread: float) -> None:
    """Flat logits make top_p keep more ids than the candidates; rounded ones have ties at every border."""
    rng = np.random.default_rng(vocab_size)
    for ties in (False, True):
        logits = (rng.standard_normal((60, vocab_size)) * spread).astype(np.float32)
        if ties:
            logits = np.round(logits * 4) / 4
        rows = random_rows(60, vocab_size, rng)
        expected = [oracle_token(logits[i], row) for i, row in enumerate(rows)]
        assert sample(torch.from_numpy(logits.copy()), inputs_of(rows, vocab_size)) == expected


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(5)
    vocab_size = SLICE_ELEMENTS // 5  # several slices
    logits = torch.from_numpy(rng.standard_normal((12, vocab_size)).astype(np.float32)) * 3
    rows = random_rows(12, vocab_size, rng)
    together = sample(logits.clone(), inputs_of(rows, vocab_size))
    alone = [sample(logits[i : i + 1].clone(), inputs_of([row], vocab_size))[0] for i, row in enumerate(rows)]
    assert alone == together
    backwards = sample(logits.flip(0).contiguous(), inputs_of(rows[::-1], vocab_size))
    assert backwards[::-1] == together


def test_greedy_takes_the_lowest_of_equal_ids_and_ignores_everything_but_penalties() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 0.5, 2.5, 2.5]])
    rows = [{"temperature": 0.0, "top_k": 3, "top_p": 0.1, "seed": 9}, {"temperature": 0.0}]
    assert sample(logits.clone(), inputs_of(rows)) == [1, 2]
    rows[0]["penalties"] = ([1], 1, 2.0, 0.0, 0.0)
    assert sample(logits.clone(), inputs_of(rows)) == [2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "limits",
    [{"grammar": []}, {"allowed": [3], "banned": [3]}, {"grammar": [3, 4], "bias": {3: -np.inf, 4: -np.inf}}],
)
def test_a_row_with_nothing_left_to_draw_says_so_and_harms_nobody(limits: dict[str, Any], temperature: float) -> None:
    logits = torch.randn((3, 30), generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = [{"temperature": temperature, "top_p": 0.9, "seed": i} for i in range(3)]
    expected = sample(logits.clone(), inputs_of(rows))
    rows[1]["limits"] = limits
    assert sample(logits.clone(), inputs_of(rows, 30)) == [expected[0], NONE_LEFT, expected[2]]
    logits[1, 7] = torch.nan
    assert sample(logits, inputs_of(rows, 30)) == [expected[0], NOT_FINITE, expected[2]]


def test_a_single_id_that_is_left_is_drawn_whatever_the_temperature() -> None:
    logits = torch.randn((4, 300), generator=torch.Generator().manual_seed(1))
    kinds = ({"grammar": [77]}, {"allowed": [77]}, {"banned": [i for i in range(300) if i != 77]}, {"bias": {77: 1e4}})
    for temperature in (0.0, 0.5, 1e300):
        rows = [{"temperature": temperature, "top_p": 0.9, "limits": limits} for limits in kinds[:3]]
        rows.append({"temperature": min(temperature, 1.0), "limits": kinds[3]})
        assert sample(logits.clone(), inputs_of(rows, 300)) == [77] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_minus_one_and_harms_nobody(bad: float, temperature: float) -> None:
    logits = torch.randn((3, 30), generator=torch.Generator().manual_seed(1))
    rows = [
        {"temperature": temperature, "top_p": 0.9, "seed": i, "penalties": ([3], 1, 1.2, 0.1, 0.1)} for i in range(3)
    ]
    expected = sample(logits.clone(), inputs_of(rows))
    logits[1, 7] = bad
    assert sample(logits, inputs_of(rows)) == [expected[0], -1, expected[2]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_neither_overflow_nor_divide_by_zero(temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, -80.0, 29.0]]).repeat(400, 1)
    drawn = sample(logits, inputs_of([{"temperature": temperature, "position": i} for i in range(400)]))
    counts = np.bincount(drawn, minlength=4)
    if temperature < 1:
        assert counts.tolist() == [0, 400, 0, 0]
    else:
        assert counts.min() > 70


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)])
def test_top_p_keeps_the_id_that_crosses_it_and_none_beyond(top_p: float, kept: int) -> None:
    weights = torch.tensor([[0.25, 1.0, 0.25, 0.5]], dtype=torch.float64)  # an eighth, a half, an eighth, a quarter
    truncate(weights, np.array([0]), np.array([top_p]), np.array([0.0]))
    assert set(weights[0].nonzero().flatten().tolist()) == set([1, 3, 0, 2][:kept])


def test_top_p_counts_within_what_top_k_left() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    truncate(weights, np.array([2]), np.array([0.6]), np.array([0.0]))  # 1 of 1.5 is two thirds
    assert weights[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_min_p_is_relative_to_the_likeliest() -> None:
    weights = torch.tensor([[0.2, 1.0, 0.19, 0.5]], dtype=torch.float64)
    truncate(weights, np.array([0]), np.array([1.0]), np.array([0.2]))
    assert weights[0].tolist() == [0.2, 1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    "row",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 1.1, "top_p": 0.9, "penalties": ([1, 2, 3, 3, 9], 2, 1.3, 0.5, 0.25)},
    ],
)
def test_draws_follow_the_distribution(row: dict[str, Any]) -> None:
    """Pearson's chi-square over positions of one seed, and over seeds at one position; 5 sigma, fixed keys."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | row
    probabilities = oracle_probabilities(logits.numpy(), full)
    num_draws = 20_000
    for keys in ([{"seed": 42, "position": i} for i in range(num_draws)], [{"seed": i} for i in range(num_draws)]):
        rows = [row | key for key in keys]
        repeated = logits.repeat(num_draws, 1)
        if "penalties" in row:  # one row's penalties, applied once
            sampled = inputs_of([full | {"temperature": 0.0}])
            first = logits[None].clone()
            sample(first, sampled)
            repeated = first.repeat(num_draws, 1)
            rows = [{name: value for name, value in r.items() if name != "penalties"} for r in rows]
        counts = np.bincount(sample(repeated, inputs_of(rows)), minlength=60)
        assert not counts[probabilities == 0].any()
        expected = probabilities * num_draws
        frequent = expected >= 5
        statistic = ((counts[frequent] - expected[frequent]) ** 2 / expected[frequent]).sum()
        degrees = frequent.sum() - 1
        assert statistic < degrees + 5 * np.sqrt(2 * degrees)
        assert counts[~frequent].sum() <= expected[~frequent].sum() + 5 * np.sqrt(expected[~frequent].sum() + 1)


def test_truncation_and_penalties_agree_with_transformers() -> None:
    """Kept sets and probabilities of its processors in generate()'s order, on logits without ties."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = np.random.default_rng(11)
    for _ in range(40):
        vocab_size = int(rng.choice([50, 2000]))
        logits = torch.from_numpy(rng.standard_normal((1, vocab_size)).astype(np.float32)) * 3
        tokens = rng.integers(vocab_size, size=20).tolist()
        row: dict[str, Any] = {
            "temperature": float(rng.choice([0.5, 1.0, 1.7])),
            "top_k": int(rng.choice([1, 7, 40])),
            "top_p": float(rng.choice([0.3, 0.9, 0.97])),
            "min_p": float(rng.choice([0.01, 0.1])),
            "penalties": (tokens, 5, float(rng.choice([0.8, 1.2])), 0.0, 0.0),
        }
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(row["penalties"][2]),
                TemperatureLogitsWarper(row["temperature"]),
                TopKLogitsWarper(row["top_k"]),
                TopPLogitsWarper(row["top_p"]),
                MinPLogitsWarper(row["min_p"]),
            ]
        )
        theirs = processors(torch.tensor([tokens]), logits.clone()).softmax(-1)[0].double().numpy()
        ours = oracle_probabilities(logits[0].numpy(), row)
        assert np.array_equal(theirs > 0, ours > 0)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_greedy_rows_without_parameters_are_chosen_as_with_them() -> None:
    logits = torch.randn((6, 3000), generator=torch.Generator().manual_seed(5)).round()
    logits[1, 7] = torch.nan
    logits[2, 8] = -torch.inf
    logits[4, 9] = torch.inf
    expected = sample(logits.clone(), inputs_of([{"temperature": 0.0}] * 6))
    assert [token_id == -1 for token_id in expected] == [False, True, True, False, True, False]
    assert sample(logits, None) == expected
