"""Log-probabilities as the two completion endpoints spell them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from server.events import PromptTokens, TokenLogprob
from server.schemas.chat import ChatLogprob, ChatLogprobs, TopLogprob
from server.schemas.completion import CompletionLogprobs
from server.tokenizer import Tokenizer

LOWEST = -9999.0
"""Instead of minus infinity, which is not JSON; OpenAI's value."""

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    content = []
    for entry in entries:
        data = tokenizer.token_bytes(entry.token_id)
        top = [_top_logprob(tokenizer, token_id, value) for token_id, value in entry.top]
        content.append(
            ChatLogprob(
                token=data.decode(errors="replace"), logprob=finite(entry.logprob), bytes=list(data), top_logprobs=top
            )
        )
    return ChatLogprobs(content=content)


def _top_logprob(tokenizer: Tokenizer, token_id: int, value: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode(errors="replace"), logprob=finite(value), bytes=list(data))


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


class CompletionLogprobWriter:
    """The four lists of one choice, piece by piece; the offsets go on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = _utf8_decoder("replace")
        self._offset = 0
        self._texts: dict[int, str] = {}
        """Each token's text once: an echo of 128K tokens with 20 alternatives would hold 2.7 million of them."""

    def prompt(self, prompt: PromptTokens) -> CompletionLogprobs:
        """Of an echoed prompt: nothing predicts its first token."""
        first = self._piece((TokenLogprob(prompt.token_ids[0], 0.0),))
        rest = self._piece(prompt.logprobs)
        # The answer is a text of its own, so an incomplete character does not reach into it.
        self._offset += len(self._utf8.decode(b"", final=True))
        return CompletionLogprobs(
            tokens=first.tokens + rest.tokens,
            token_logprobs=[None, *rest.token_logprobs],
            top_logprobs=[None, *rest.top_logprobs],
            text_offset=first.text_offset + rest.text_offset,
        )

    def answer(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        return self._piece(entries)

    def _piece(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        piece = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            text = self._text(entry.token_id)
            likely = {text: finite(entry.logprob)}
            for token_id, value in entry.top:
                other = self._text(token_id)
                likely[other] = max(finite(value), likely.get(other, LOWEST))
            piece.tokens.append(text)
            piece.token_logprobs.append(finite(entry.logprob))
            piece.top_logprobs.append(likely)
            piece.text_offset.append(self._offset)
            if not (self._skip_special_tokens and self._tokenizer.is_special(entry.token_id)):
                self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(entry.token_id)))
        return piece

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.token_bytes(token_id).decode(errors="replace")
        return text


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )
