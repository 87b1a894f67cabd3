"""The streamed text is the text of all tokens at once, and stop strings never leak, whatever the chunks are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import Detokenizer
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.tokenizer_folders import BUILTIN, BUILTIN_VOCAB_SIZE, V3_TOKENIZER, V3_VOCAB_SIZE

FOLDERS = {"builtin": (BUILTIN, BUILTIN_VOCAB_SIZE), "v3": (V3_TOKENIZER, V3_VOCAB_SIZE)}
LOADED = {name: load_tokenizer(folder, size) for name, (folder, size) in FOLDERS.items()}


@pytest.fixture(params=sorted(FOLDERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return LOADED[request.param]


class Letters:
    """Token i is the i-th of some byte strings: for cases that no real tokenizer has in one place."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        return False


def chunks(ids: list[int], cuts: list[int]) -> Iterator[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for start, end in itertools.pairwise(edges):
        yield ids[start:end]


def stream(detokenizer: Detokenizer, pushes: Iterator[list[int]]) -> str:
    return "".join([detokenizer.push(ids) for ids in pushes] + [detokenizer.finish()])


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the text ends by the documented rule: the match that ends first, then the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


CUTS = st.lists(st.integers(0, 200), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FOLDERS)), st.randoms(use_true_random=False), st.integers(0, 60), CUTS, st.booleans())
def test_any_chunks_give_the_text_of_all_bytes(
    name: str, rng: random.Random, length: int, cuts: list[int], skip_special: bool
) -> None:
    tokenizer = LOADED[name]
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
    kept = [i for i in ids if not (skip_special and tokenizer.is_special(i))]
    expected = b"".join(map(tokenizer.token_bytes, kept)).decode("utf-8", "replace")
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special)
    assert stream(detokenizer, chunks(ids, cuts)) == expected
    assert detokenizer.num_tokens == length


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab🙂", max_size=40),
    st.lists(st.text("ab🙂", min_size=1, max_size=5), min_size=1, max_size=4),
    CUTS,
    st.booleans(),
    st.integers(1, 3),
)
def test_stop_strings_equal_a_search_in_the_whole_text(
    text: str, stops: list[str], cuts: list[int], include: bool, token_size: int
) -> None:
    data = text.encode()
    pieces = [data[at : at + token_size] for at in range(0, len(data), token_size)]
    detokenizer = Detokenizer(Letters(*pieces), stop=stops, include_stop=include)
    result = stream(detokenizer, chunks(list(range(len(pieces))), cuts))
    stop = first_stop(text, stops)
    if stop is None:
        assert (result, detokenizer.stopped, detokenizer.num_tokens) == (text, None, len(pieces))
        return
    end, matched = stop
    assert detokenizer.stopped == matched
    assert result == (text[:end] if include else text[: end - len(matched)])
    # The tokens up to the one whose bytes complete the stop string, whatever the chunks.
    assert detokenizer.num_tokens == -(-len(text[:end].encode()) // token_size)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_holds_back_only_the_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(Letters(b"a", b"b"), stop=stops)
    sent = seen = ""
    for char in text:
        sent += detokenizer.push(["ab".index(char)])
        seen += char
        if detokenizer.stopped is not None:
            break
        longest = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert sent == seen[: len(seen) - longest]


def test_valid_text_equals_the_librarys_decode(tokenizer: Tokenizer) -> None:
    folder = BUILTIN if tokenizer is LOADED["builtin"] else V3_TOKENIZER
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (
        "Hello, world!",
        "  leading and trailing  ",
        "tabs\tand\r\nlines\n\n\n",
        "中文测试,标点。",
        "🙂👩‍👩‍👧‍👦 ℕ ﷽ é e\u0301",
        "x = [1, 22, 333]  # 4444",
        "<｜User｜>hi<｜Assistant｜>\x00\x7f",
    ):
        ids = library.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        assert stream(detokenizer, iter([[i] for i in ids])) == text == library.decode(ids, skip_special_tokens=False)


def test_a_character_comes_out_whole() -> None:
    detokenizer = Detokenizer(Letters(*[bytes([b]) for b in "🙂".encode()], b"!"))
    assert [detokenizer.push([i]) for i in range(4)] == ["", "", "", "🙂"]


def test_an_incomplete_character_ends_as_a_replacement_character() -> None:
    detokenizer = Detokenizer(Letters(b"\xf0\x9f", b"x"))
    assert detokenizer.push([0]) == ""
    assert detokenizer.finish() == "\ufffd"
    detokenizer = Detokenizer(Letters(b"\xf0\x9f", b"x"))
    assert detokenizer.push([0]) + detokenizer.push([1]) + detokenizer.finish() == "\ufffdx"


def test_special_tokens_are_skipped_on_demand_only(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    assert Detokenizer(tokenizer).push([eos]) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).push([eos]) == tokenizer.eos_token


def test_ids_without_a_token_are_silent(tokenizer: Tokenizer) -> None:
    assert Detokenizer(tokenizer).push([-1, tokenizer.vocab_size, 2**31]) == ""


def test_text_after_the_stop_string_is_dropped_and_earlier_text_kept() -> None:
    detokenizer = Detokenizer(Letters(b"Hello wor", b"ld!", b" more"), stop=["world"])
    assert detokenizer.push([0]) == "Hello "
    assert detokenizer.push([1, 2]) == ""
    assert detokenizer.stopped == "world"
    assert detokenizer.num_tokens == 2
    assert detokenizer.push([2]) + detokenizer.finish() == ""


def test_a_stop_string_inside_the_beginning_of_another_matches() -> None:
    detokenizer = Detokenizer(Letters(b"a", b"b"), stop=["abc", "b"])
    assert stream(detokenizer, iter([[0], [1]])) == "a"
    assert detokenizer.stopped == "b"


def test_of_matches_that_end_together_the_longest_wins() -> None:
    detokenizer = Detokenizer(Letters(b"xab"), stop=["b", "ab"])
    assert detokenizer.push([0]) == "x"
    assert detokenizer.stopped == "ab"


def test_an_end_without_match_gives_back_what_was_held() -> None:
    detokenizer = Detokenizer(Letters(b"Hello wor"), stop=["world"])
    assert (detokenizer.push([0]), detokenizer.finish()) == ("Hello ", "wor")


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(Letters(), stop=["a", ""])
