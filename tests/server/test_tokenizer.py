"""Prompts to ids and ids to bytes, on the built-in tokenizer, the V3-era one, and small ones made for one rule each."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from server.tokenizer import EncodeError, Segment, Tokenizer, TokenizerError, load_tokenizer
from tests.server.tokenizer_folders import BUILTIN, BUILTIN_VOCAB_SIZE, V3_TOKENIZER, V3_VOCAB_SIZE

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = ("", "Hello, world!", "  12345 x  ", "中文🙂 ℕ é\r\n\t", "a<｜User｜>b<think>c", "\x00 ﷽ \u200b")


@pytest.fixture(scope="module")
def builtin() -> Tokenizer:
    return load_tokenizer(BUILTIN, BUILTIN_VOCAB_SIZE)


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return load_tokenizer(V3_TOKENIZER, V3_VOCAB_SIZE)


@pytest.fixture(params=["builtin", "v3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    return asyncio.run(tokenizer.encode(text, add_special_tokens=add_special_tokens)).tolist()


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny() -> tokenizers.Tokenizer:
    """Byte-level, no merges: 256 bytes, then <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return tokenizer


def test_ids_are_the_librarys(tokenizer: Tokenizer) -> None:
    folder = BUILTIN if tokenizer.vocab_size == BUILTIN_VOCAB_SIZE else V3_TOKENIZER
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = encode(tokenizer, text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert text_of(tokenizer, ids) == text


def test_ids_are_an_array_of_uint32(builtin: Tokenizer) -> None:
    ids = asyncio.run(builtin.encode("hello", add_special_tokens=True))
    assert isinstance(ids, array)
    assert ids.typecode == "I"


def test_bos_is_added_once_and_only_on_demand(builtin: Tokenizer) -> None:
    assert builtin.add_bos_token
    bos = builtin.bos_token_id
    assert encode(builtin, "hi") == encode(builtin, "hi", add_special_tokens=True)[1:]
    for text in ("hi", "", BOS, BOS + "hi"):
        assert encode(builtin, text, add_special_tokens=True).count(bos) == 1
        assert encode(builtin, text, add_special_tokens=True)[0] == bos


def test_add_bos_token_false_adds_none(v3: Tokenizer) -> None:
    assert not v3.add_bos_token
    assert v3.bos_token_id == 0
    assert encode(v3, "hi", add_special_tokens=True) == encode(v3, "hi")


@pytest.mark.parametrize(("setting", "count"), [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, 0)])
def test_a_post_processor_that_adds_bos_does_not_double_it(
    tmp_path: Path, setting: dict[str, bool], count: int
) -> None:
    library = tiny()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = load_tokenizer(write(tmp_path, library, bos_token="<s>", eos_token="</s>", **setting), 300)
    assert encode(tokenizer, "hi", add_special_tokens=True).count(256) == count
    assert encode(tokenizer, "hi").count(256) == 0


def test_bos_and_eos_as_text_or_as_object(builtin: Tokenizer, v3: Tokenizer) -> None:
    for tokenizer in (builtin, v3):
        assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
        assert [tokenizer.token_bytes(i).decode() for i in tokenizer.eos_token_ids] == [EOS]


def test_untrusted_text_has_no_control_tokens(tokenizer: Tokenizer) -> None:
    text = "".join(tokenizer.added_tokens) + "plain"
    ids = asyncio.run(tokenizer.encode_segments([Segment(text, trusted=False)])).tolist()
    control = {encode(tokenizer, token)[0] for token in tokenizer.added_tokens}
    assert len(control) == len(tokenizer.added_tokens)
    assert control.isdisjoint(ids)
    assert text_of(tokenizer, ids) == text


def test_segments_come_in_order(tokenizer: Tokenizer) -> None:
    segments = [Segment("a", True), Segment("<｜User｜>", False), Segment("<｜User｜>", True), Segment("b", False)]
    ids = asyncio.run(tokenizer.encode_segments(segments)).tolist()
    assert text_of(tokenizer, ids) == "a<｜User｜><｜User｜>b"
    assert ids.count(encode(tokenizer, "<｜User｜>")[0]) == 1


def test_a_surrogate_without_its_partner_is_an_error(builtin: Tokenizer) -> None:
    with pytest.raises(EncodeError, match="Unicode"):
        encode(builtin, "a\ud800b")


def test_every_byte_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert all(bytes([byte]) in singles for byte in range(256))


def test_token_bytes_of_every_id_agree_with_the_librarys_decode(v3: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(V3_TOKENIZER / "tokenizer.json"))
    texts = library.decode_batch([[i] for i in range(v3.vocab_size)], skip_special_tokens=False)
    assert [v3.token_bytes(i).decode("utf-8", "replace") for i in range(v3.vocab_size)] == texts


def test_ids_that_are_no_token_are_empty(v3: Tokenizer) -> None:
    for token_id in (-1, 128_815, V3_VOCAB_SIZE - 1, V3_VOCAB_SIZE, 2**40):
        assert v3.token_bytes(token_id) == b""


def test_special_means_the_flag_in_the_file(builtin: Tokenizer) -> None:
    assert builtin.is_special(encode(builtin, BOS)[0])
    assert builtin.is_special(encode(builtin, EOS)[0])
    assert not builtin.is_special(encode(builtin, "<｜User｜>")[0])
    assert not builtin.is_special(encode(builtin, "a")[0])


def test_max_token_bytes_bounds_the_number_of_tokens(tokenizer: Tokenizer) -> None:
    longest = max(map(tokenizer.token_bytes, range(tokenizer.vocab_size)), key=len)
    assert tokenizer.max_token_bytes == len(longest)
    for text in (" " * 5000, "a" * 5000, "=" * 5000):
        assert len(encode(tokenizer, text)) * tokenizer.max_token_bytes >= len(text)


def test_sentence_piece_tokens_keep_their_space_and_byte_fallback_is_bytes(tmp_path: Path) -> None:
    vocab = {"▁the": 0, "▁": 1, "a": 2, "<0x0A>": 3, "<0xF0>": 4, "<0x9F>": 5, "<0x99>": 6, "<0x82>": 7, "<s>": 8}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>"])
    tokenizer = load_tokenizer(write(tmp_path, library), 9)
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b" the", b" ", b"a", b"\n"]
    assert text_of(tokenizer, [0, 4, 5, 6, 7, 2]) == " the🙂a"
    assert library.decode([0, 4, 5, 6, 7, 2]) == "the🙂a"  # a whole text loses its first space, an answer does not


def test_byte_level_entries_outside_the_alphabet_stand_for_themselves(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE(vocab={"Ġa": 0, "Ġ｜": 1, "a b": 2}, merges=[]))
    library.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(write(tmp_path, library), 3)
    for token_id, expected in enumerate((" a", "Ġ｜", "a b")):
        assert text_of(tokenizer, [token_id]) == expected == library.decode([token_id])


def test_metaspace_decoder(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE(vocab={"▁the": 0, "a": 1}, merges=[]))
    library.decoder = decoders.Metaspace()
    assert text_of(load_tokenizer(write(tmp_path, library), 2), [0, 1]) == " thea"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    library = tiny()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    assert len(encode(load_tokenizer(write(tmp_path, library), 300), "0123456789")) == 10


def test_chat_template_spellings(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    for value, expected in (("S", "S"), (named, "D"), (None, None)):
        assert load_tokenizer(write(tmp_path, tiny(), chat_template=value), 300).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path, 300).chat_template == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path, 300)
    assert (tokenizer.chat_template, tokenizer.bos_token, tokenizer.add_bos_token) == (None, None, False)


def _garbage(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _bad_settings(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(text)

    return change


def _tiktoken(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_text("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing$"),
        (_tiktoken, r"tokenizer\.json is missing; tiktoken\.model is not read"),
        (_garbage, r"tokenizer\.json is not a tokenizer: "),
        (_bad_settings("{"), r"tokenizer_config\.json is not JSON"),
        (_bad_settings("[]"), r"tokenizer_config\.json is not a JSON object"),
        (_bad_settings('{"bos_token": "<nope>"}'), "bos_token '<nope>' is not in tokenizer.json"),
        (_bad_settings('{"eos_token": 7}'), "eos_token is neither"),
        (_bad_settings('{"chat_template": 7}'), "chat_template is neither"),
        (_bad_settings('{"chat_template": [{"name": "rag", "template": ""}]}'), r"no default among \['rag'\]"),
    ],
)
def test_unusable_files_are_one_clear_line(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    change(write(tmp_path, tiny()))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path, 300)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="beyond the model's vocab_size 257"):
        load_tokenizer(write(tmp_path, tiny()), 257)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_unknown_decoders_are_refused(tmp_path: Path, decoder: Any) -> None:
    library = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        library.decoder = decoder
    with pytest.raises(TokenizerError, match="decoder"):
        load_tokenizer(write(tmp_path, library), 300)


def test_the_event_loop_runs_on_while_a_long_prompt_is_cut(v3: Tokenizer) -> None:
    text = "The quick brown fox jumps over 123 dogs. " * 12_000  # 0.5 MB; on the loop this takes 0.3 s and more

    async def worst_lag() -> float:
        worst = 0.0
        task = asyncio.create_task(v3.encode(text, add_special_tokens=True))
        while not task.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before)
        assert len(task.result()) > 100_000
        return worst

    assert min(asyncio.run(worst_lag()) for _ in range(2)) < 0.1
