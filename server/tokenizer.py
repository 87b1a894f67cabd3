"""A checkpoint's tokenizer, by its files alone: text to ids for prompts, ids to bytes for answers.

`tokenizer.json` says how text is cut; `tokenizer_config.json` names the begin and end tokens and holds the chat
template. The class it names is ignored (no transformers here): the family's files say `LlamaTokenizerFast`, which
they are not.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from server.text_slices import SLICE, TextSlicer, UnbrokenTextError

ENCODE_THREADS = 2


class TokenizerError(ValueError):
    """A checkpoint's tokenizer cannot be used; the message is one line that names the file."""


class EncodeError(ValueError):
    """A text that has no tokens: it is not valid Unicode."""


class TooManyTokensError(ValueError):
    """A text has more tokens than were wanted; `count` are known."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the text has more than {count} tokens")
        self.count = count


class Segment(NamedTuple):
    """A piece of a prompt. In an untrusted piece, texts that look like control tokens are only text."""

    text: str
    trusted: bool


class Tokenizer:
    """Immutable after construction; `encode` may be called from any number of tasks.

    `vocab_size` is the number of rows of the model's embedding: it may exceed what the tokenizer defines
    (the rest decodes to nothing) but never be smaller.
    """

    def __init__(self, full: tokenizers.Tokenizer, vocab_size: int, settings: dict[str, Any], template: str | None):
        full.no_truncation()
        full.no_padding()
        self._full = full
        # The same model (shared, not copied) without its added tokens: cuts control-token texts like any text.
        self._plain = tokenizers.Tokenizer(full.model)
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        if full.pre_tokenizer is not None:
            self._plain.pre_tokenizer = full.pre_tokenizer
        self._executor = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="tokenize")

        added = full.get_added_tokens_decoder()
        self.added_tokens = tuple(token.content for token in added.values())
        """Texts that `encode` turns into one token each, whatever surrounds them."""
        self._slicer = TextSlicer(full, self.added_tokens)
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = _token_table(full, vocab_size, {i: token.content for i, token in added.items()})
        self.vocab_size = vocab_size
        self.max_token_bytes = max(map(len, self._token_bytes))
        """UTF-8 bytes of the longest token: a text of n bytes has at least n / max_token_bytes tokens."""
        self.chat_template = template
        """Jinja source of the checkpoint's chat template; None for base models."""

        self.bos_token = _token_text(settings, "bos_token")
        self.eos_token = _token_text(settings, "eos_token")
        self.bos_token_id = self._id_of(self.bos_token, "bos_token")
        eos_token_id = self._id_of(self.eos_token, "eos_token")
        self.eos_token_ids = () if eos_token_id is None else (eos_token_id,)
        """By the tokenizer's files; the ids that end a request are those of config and generation_config."""
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):
            # Files that do not say: whether the post-processor would have added it.
            add_bos = self.bos_token_id in full.encode("").ids
        self.add_bos_token = add_bos and self.bos_token_id is not None
        """Whether a bare prompt (no chat template) begins with BOS."""
        self._bos = array("I", [] if self.bos_token_id is None else [self.bos_token_id])

    def _id_of(self, text: str | None, field: str) -> int | None:
        if text is None:
            return None
        token_id = self._full.token_to_id(text)
        if token_id is None:
            raise TokenizerError(f"tokenizer_config.json: {field} {text!r} is not in tokenizer.json")
        return token_id

    async def encode(self, text: str, *, add_special_tokens: bool, most: int | None = None) -> array[int]:
        """Token ids (`array('I')`) of a whole prompt, control tokens in it included.

        With `add_special_tokens` the result begins with exactly one BOS where the checkpoint wants one,
        also when the text begins with it already. Raises as `encode_segments`.
        """
        ids = await self.encode_segments([Segment(text, trusted=True)], most)
        if add_special_tokens and self.add_bos_token and ids[:1] != self._bos:
            return self._bos + ids
        return ids

    async def encode_segments(self, segments: Sequence[Segment], most: int | None = None) -> array[int]:
        """Token ids of the segments, each cut on its own; nothing is added between them.

        Raises `EncodeError`, and `TooManyTokensError` when a slice was not the last and there are more than `most`.
        """
        loop = asyncio.get_running_loop()
        slices = self._slices(segments)
        ids = array("I")
        # A slice each time, so that a long text does not hold up what others have to cut.
        while await loop.run_in_executor(self._executor, self._encode, slices, ids):
            if most is not None and len(ids) > most:
                raise TooManyTokensError(len(ids))
        return ids

    def _slices(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        for segment in segments:
            for text in self._slicer.slices(segment.text):
                yield Segment(text, segment.trusted)

    def _encode(self, slices: Iterator[Segment], ids: array[int]) -> bool:
        """Encode a slice's worth of text; whether there may be more."""
        size = 0
        try:
            for text, trusted in slices:
                tokenizer = self._full if trusted else self._plain
                # Only the batch calls of the library release the GIL; `encode` would stop the event loop.
                ids.extend(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
                size += len(text)
                if size >= SLICE:
                    return True
        except TypeError as error:  # what the library raises for a lone surrogate
            raise EncodeError("the text is not valid Unicode: it has a surrogate without its partner") from error
        except UnbrokenTextError as error:
            raise EncodeError(str(error)) from error
        return False

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, perhaps not whole characters; b"" for ids no token has."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them; "" for ids no token has."""
        return [self._full.id_to_token(token_id) or "" for token_id in token_ids]

    def token_id(self, text: str) -> int | None:
        """The token that is spelled so in the vocabulary; control tokens are spelled as their text."""
        token_id: int | None = self._full.token_to_id(text)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Marked special in tokenizer.json. In this family that is BOS, EOS and padding, not role and tool marks."""
        return token_id in self._special

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def load_tokenizer(model_dir: Path, vocab_size: int) -> Tokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; only the first must exist.

    `vocab_size`: rows of the model's embedding. Raises `TokenizerError`.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tiktoken.model", "tokenizer.model") if (model_dir / name).exists()]
        hint = f"; {others[0]} is not read: convert it to a tokenizer.json with transformers first" if others else ""
        raise TokenizerError(f"{path} is missing{hint}")
    try:
        full = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from error
    settings: dict[str, Any] = {}
    config_path = model_dir / "tokenizer_config.json"
    if config_path.is_file():
        try:
            settings = json.loads(config_path.read_bytes())
        except ValueError as error:
            raise TokenizerError(f"{config_path} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise TokenizerError(f"{config_path} is not a JSON object")
    try:
        return Tokenizer(full, vocab_size, settings, _chat_template(model_dir, settings))
    except TokenizerError as error:
        raise TokenizerError(f"{model_dir}: {error}") from error


def _chat_template(model_dir: Path, settings: dict[str, Any]) -> str | None:
    """The file wins over the field, as in transformers; of several named templates the one named default."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"chat_template.jinja is not UTF-8: {error}") from error
    match settings.get("chat_template"):
        case None:
            return None
        case str(template):
            return template
        case list(entries):
            named = {
                e["name"]: e["template"] for e in entries if isinstance(e, dict) and {"name", "template"} <= e.keys()
            }
            if isinstance(default := named.get("default"), str):
                return default
            raise TokenizerError(f"tokenizer_config.json: chat_template has no default among {sorted(named)}")
        case _:
            raise TokenizerError("tokenizer_config.json: chat_template is neither a string nor a list")


def _token_text(settings: dict[str, Any], field: str) -> str | None:
    """A token is spelled as a string or as an AddedToken object."""
    match settings.get(field):
        case None:
            return None
        case str(text) | {"content": str(text)}:
            return text
        case _:
            raise TokenizerError(f"tokenizer_config.json: {field} is neither a string nor an object with content")


def _token_table(full: tokenizers.Tokenizer, vocab_size: int, added: dict[int, str]) -> list[bytes]:
    decode = _token_decoder(full)
    table = [b""] * vocab_size
    found = 0
    for token_id in range(vocab_size):
        if (content := added.get(token_id)) is not None:
            table[token_id] = content.encode()
        elif (token := full.id_to_token(token_id)) is not None:
            table[token_id] = decode(token)
        else:
            continue
        found += 1
    if found < full.get_vocab_size(with_added_tokens=True):
        raise TokenizerError(f"tokenizer.json has ids beyond the model's vocab_size {vocab_size}")
    return table


def _token_decoder(full: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How one entry of the vocabulary becomes bytes, by the decoder that tokenizer.json declares.

    A SentencePiece decoder also drops the first space of a text. That belongs to whole texts: an answer
    continues a prompt, so here every token keeps its space.
    """
    if full.decoder is None:
        raise TokenizerError("tokenizer.json has no decoder")
    steps = list(_decoder_steps(json.loads(full.decoder.__getstate__())))
    kinds = {step["type"] for step in steps}
    if unknown := kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise TokenizerError(f"tokenizer.json: decoder {sorted(unknown)[0]} is not supported")
    if "ByteLevel" in kinds:
        alphabet = {char: byte for byte, char in _byte_level_alphabet()}

        def byte_level(token: str) -> bytes:
            try:
                return bytes(map(alphabet.__getitem__, token))
            except KeyError:  # an entry with a character outside the alphabet stands for itself
                return token.encode()

        return byte_level

    replacements = [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]
    replacements += [(s["pattern"]["String"], s["content"]) for s in steps if "String" in s.get("pattern", {})]

    def sentence_piece(token: str) -> bytes:
        if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return sentence_piece


def _decoder_steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if state["type"] == "Sequence":
        for step in state["decoders"]:
            yield from _decoder_steps(step)
    else:
        yield state


def _byte_level_alphabet() -> Iterator[tuple[int, str]]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 is itself, the others follow from U+0100 on, in order."""
    moved = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield byte, chr(byte)
        else:
            yield byte, chr(256 + moved)
            moved += 1
