from __future__ import annotations

import random
from array import array

import pytest

from scheduler.ngram import COST, INDEXED_A_STEP, MAX_DRAFTS, NgramDrafter


def proposal(tokens: list[int]) -> list[int]:
    return NgramDrafter(array("I", tokens)).propose()


def test_what_followed_the_same_tokens_follows_again() -> None:
    text = list(range(100, 140))
    for length in (2, 3, 4, 8, 20):
        drafts = proposal([*text, 1, 2, 3, *text[10 : 10 + length]])
        assert drafts == text[10 + length :][: len(drafts)] != []
    assert proposal(text) == []
    assert proposal([5]) == proposal([5, 6]) == []


def test_the_longest_match_wins_and_of_equal_ones_the_last() -> None:
    assert proposal([1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 1, 2, 3, 4])[:1] == [50]
    assert proposal([1, 2, 3, 4, 50, 9, 1, 2, 3, 4, 60, 9, 1, 2, 3, 4])[:1] == [60]


def test_a_repetition_goes_on_beyond_its_end() -> None:
    drafts = proposal([7, 8, 9] * 5)
    assert len(drafts) == 3 * (len(drafts) // 3) + len(drafts) % 3 >= 4
    assert drafts == ([7, 8, 9] * MAX_DRAFTS)[: len(drafts)]


def test_more_agreement_makes_more_drafts() -> None:
    text = random.Random(0).sample(range(1000), 100)
    counts = [len(proposal([*text, 1001, *text[40 : 40 + n]])) for n in (1, 2, 4, 8, 16)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[3] == counts[4] <= MAX_DRAFTS


def tokens_per_step(followed: list[int], start: list[int]) -> tuple[float, float]:
    """What a request that says `followed` gets a step, and what its steps cost, with the drafts as they are made."""
    tokens = array("I", start)
    drafter = NgramDrafter(tokens)
    steps, drafted = 0, 0
    said = 0
    while said < len(followed):
        drafts = drafter.propose()
        accepted = 0
        while accepted < len(drafts) and followed[said + accepted : said + accepted + 1] == [drafts[accepted]]:
            accepted += 1
        if drafts:
            drafter.observe(len(drafts), accepted)
        tokens.extend(followed[said : said + accepted + 1])
        said += accepted + 1
        steps += 1
        drafted += len(drafts)
    return len(followed) / steps, (steps + COST * drafted) / len(followed)


def test_a_copy_comes_in_long_steps() -> None:
    text = random.Random(1).choices(range(1000), k=600)
    gained, _ = tokens_per_step(text, [*text, 1001])
    assert gained > 6


def test_a_text_whose_matches_mislead_costs_little() -> None:
    """Two tokens that agree mean nothing here: it must not be tried for ever, but again now and then."""
    rng = random.Random(2)
    gained, cost = tokens_per_step([rng.randrange(8) for _ in range(2000)], [rng.randrange(8) for _ in range(500)])
    assert cost < 1.08
    assert gained > 1.0


def test_it_recovers_when_a_text_begins_to_repeat() -> None:
    rng = random.Random(3)
    noise = [rng.randrange(8) for _ in range(1000)]
    text = [rng.randrange(8, 1000) for _ in range(400)]
    gained, _ = tokens_per_step(text, [*text, *noise])
    assert gained > 4


def test_a_long_prompt_is_indexed_piece_by_piece() -> None:
    text = random.Random(4).choices(range(1 << 17), k=4 * INDEXED_A_STEP)
    place = 3 * INDEXED_A_STEP
    tokens = array("I", [*text, *text[place : place + 8]])
    drafter = NgramDrafter(tokens)
    assert drafter.propose() == []
    for _ in range(4):
        drafter.index()
    drafts = drafter.propose()
    assert drafts == text[place + 8 : place + 8 + len(drafts)] != []


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3])
def test_short_texts(num_tokens: int) -> None:
    tokens = array("I", [1] * num_tokens)
    drafter = NgramDrafter(tokens)
    drafter.propose()
    rng = random.Random(5)
    for _ in range(3000):  # the table grows on the way
        tokens.append(rng.randrange(50))
        for draft in drafter.propose():
            assert draft in tokens
    tokens.extend(range(10_000, 11_000))
    tokens.extend(range(10_000, 10_020))
    for _ in range(20):
        drafter.index()
    assert drafter.propose()[0] == 10_020
