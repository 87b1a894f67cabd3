"""Property: whatever the text, the stop strings and the pace, a stream, a whole answer and the definition agree, and
ids, log-probabilities and text belong together.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Logprobs
from scheduler.messages import AddRequest, Started
from server.streams import RequestStream
from tests.server.harness import Answer, Script, ScriptedEngine, chat, finish, ids_of, make_app, post, tokenizer

ALPHABET = "ab \n.é漢🙂"
texts = st.text(ALPHABET, min_size=1, max_size=24)


def reference(ids: list[int], stops: list[str], include_stop: bool) -> tuple[str, int]:
    """Text and number of tokens: the shortest run of tokens whose text has a stop string decides."""
    for count in range(1, len(ids) + 1):
        # A character that is not complete yet cannot end a stop string.
        text = b"".join(map(tokenizer().token_bytes, ids[:count])).decode(errors="ignore")
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        if ends:
            end, length = min(ends)
            return text[: end if include_stop else end + length], count
    return b"".join(map(tokenizer().token_bytes, ids)).decode(errors="replace"), len(ids)


def paced(ids: list[int], sizes: list[int]) -> Script:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def push() -> None:
            rest = list(ids)
            for size in itertools.chain(sizes, itertools.repeat(len(ids))):
                part, rest = rest[:size], rest[size:]
                out.push(
                    part,
                    started=Started(0, 0.0, 0.0),
                    logprobs=Logprobs([[each] for each in part], [[-each / 8] for each in part]),
                    finished=None if rest else finish(),
                )
                if not rest:
                    return
                await asyncio.sleep(0)

        engine.tasks.append(asyncio.ensure_future(push()))

    return script


@settings(max_examples=150, deadline=None)
@given(
    text=texts,
    cut=st.integers(0, 2),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    include_stop=st.booleans(),
    sizes=st.lists(st.integers(1, 4), max_size=12),
    is_chat=st.booleans(),
)
def test_stream_whole_and_reference_agree(
    text: str, cut: int, stops: list[str], include_stop: bool, sizes: list[int], is_chat: bool
) -> None:
    ids = ids_of(text)
    ids = ids[: max(1, len(ids) - cut)]  # perhaps in the middle of a character
    fields: dict[str, Any] = {
        "stop": stops,
        "include_stop_str_in_output": include_stop,
        "return_token_ids": True,
        "logprobs": True if is_chat else 0,
    }
    path, body = ("/v1/chat/completions", chat(**fields)) if is_chat else ("/v1/completions", {"prompt": "x", **fields})

    async def both() -> tuple[Answer, Answer]:
        app, _ = make_app(paced(ids, sizes))
        return await post(app, path, body), await post(app, path, {**body, "stream": True})

    whole, stream = asyncio.run(both())
    expected, count = reference(ids, stops, include_stop)
    [choice] = whole.json["choices"]
    assert (choice["message"]["content"] if is_chat else choice["text"]) == expected
    assert choice["token_ids"] == ids[:count]
    assert whole.json["usage"]["completion_tokens"] == count
    pieces = [event["choices"][0] for event in stream.events]
    streamed = [piece["delta"].get("content", "") if is_chat else piece["text"] for piece in pieces]
    assert "".join(streamed) == expected
    assert list(itertools.chain.from_iterable(piece.get("token_ids") or [] for piece in pieces)) == ids[:count]
    for piece in pieces:
        assert len(values_of(piece, is_chat)) == len(piece.get("token_ids") or [])
    values = [value for piece in pieces for value in values_of(piece, is_chat)]
    assert values == values_of(choice, is_chat) == [-each / 8 for each in ids[:count]]


def values_of(choice: Any, is_chat: bool) -> list[float]:
    logprobs = choice["logprobs"]
    if logprobs is None:
        return []
    return [each["logprob"] for each in logprobs["content"]] if is_chat else logprobs["token_logprobs"]
