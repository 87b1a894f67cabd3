from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from server import limits, text_slices
from server.text_slices import TextSlicer, UnbrokenTextError
from tests.server.tokenizer_folders import BUILTIN, V3_TOKENIZER

UNBROKEN = int(limits.UNBROKEN_TEXT.maximum)


def read(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def v2() -> tokenizers.Tokenizer:
    """The V3-era vocabulary behind the pieces that DeepSeek-V2 cuts."""
    tokenizer = read(V3_TOKENIZER)
    patterns = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [*splits, pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


TOKENIZERS = {"builtin": read(BUILTIN), "v2": v2(), "v3": read(V3_TOKENIZER)}
ADDED = [token.content for token in TOKENIZERS["v3"].get_added_tokens_decoder().values()]
PIECES = [
    *(
        "a",
        "The",
        "don't",
        "x_y",
        "'s",
        "1",
        "23",
        "4567",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "!",
        "?!",
        "-",
        "_",
    ),
    *(
        "é",
        "e\u0301",
        "中",
        "文字",
        "한",
        "😀",
        "👩\u200d👩",
        "٣",
        "½",
        "ß",
        "://",
        "<｜",
        "｜>",
        "<｜User｜>",
        "\u2028",
        "\0",
    ),
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_slices_have_the_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_slices, "SLICE", 64)
    monkeypatch.setattr(text_slices, "WINDOW", 64)
    tokenizer = TOKENIZERS[name]
    slicer = TextSlicer(tokenizer, [token.content for token in tokenizer.get_added_tokens_decoder().values()])
    random = Random(name)
    num_slices = 0
    for _ in range(60):
        few = random.sample(PIECES, random.randrange(2, len(PIECES)))
        text = "".join(random.choices(few, k=500))
        slices = list(slicer.slices(text))
        num_slices += len(slices)
        assert "".join(slices) == text
        parts = [tokenizer.encode(each, add_special_tokens=False).ids for each in slices]
        assert [each for ids in parts for each in ids] == tokenizer.encode(text, add_special_tokens=False).ids
    assert num_slices > 500


def test_long_texts_come_in_slices() -> None:
    slicer = TextSlicer(TOKENIZERS["v3"], ADDED)
    for text in ("The sea was calm. " * 40_000, "海很平静。" * 100_000, "x = [1, 2, 3]\n" * 50_000, "a1" * 300_000):
        slices = list(slicer.slices(text))
        assert "".join(slices) == text
        assert max(map(len, slices)) < text_slices.SLICE + 3 * text_slices.WINDOW


@pytest.mark.parametrize("char", ["a", " ", "中", "7", "!", "e\u0301"])
def test_text_without_a_break(char: str) -> None:
    slicer = TextSlicer(TOKENIZERS["v3"], ADDED)
    assert len(list(slicer.slices(char * (UNBROKEN // len(char))))) == 1
    with pytest.raises(UnbrokenTextError, match="without a break"):
        list(slicer.slices(char * 2 * UNBROKEN))


def test_tokenizers_without_patterns_get_texts_whole() -> None:
    text = "one two\n" * 100_000
    spaced, renamed = read(BUILTIN), read(BUILTIN)
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    renamed.normalizer = normalizers.Prepend("▁")  # type: ignore[assignment]
    for tokenizer in (spaced, renamed, tokenizers.Tokenizer(tokenizers.models.BPE())):
        assert list(TextSlicer(tokenizer, ()).slices(text)) == [text]
