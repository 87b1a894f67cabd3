"""The application without processes: a scripted engine behind the real app, called over ASGI directly."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fastapi import FastAPI
from tokenizers import Tokenizer as Encoder

from model.batch import Logprobs
from model.config import load_config
from scheduler.messages import AddRequest, EngineReady, EngineStats, Finished, FinishReason, Started
from server.app import build_app
from server.engine_client import EngineState, EngineUnavailable
from server.settings import BUILTIN_MODEL, Settings
from server.streams import RequestStream
from server.supervisor import Supervisor
from server.tokenizer import Tokenizer, load_tokenizer

Script = Callable[["ScriptedEngine", AddRequest, RequestStream], None]
WINDOW = 256
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TEXT = "one two three"
Header = tuple[bytes, bytes]


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUILTIN_MODEL, load_config(BUILTIN_MODEL).vocab_size)


@cache
def ids_of(text: str) -> list[int]:
    ids: list[int] = Encoder.from_file(str(BUILTIN_MODEL / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def finish(reason: FinishReason = FinishReason.LENGTH, **more: Any) -> Finished:
    return Finished(reason=reason, **more)


def answers(text: str) -> Script:
    """An engine that answers every request with `text` at once, one token after the other, and then its length."""
    ids = ids_of(text)

    def script(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
        async def tokens() -> None:
            for index, token_id in enumerate(ids):
                stream.push([token_id], started=Started(0, 0.0, 0.0) if index == 0 else None)
                await asyncio.sleep(0)
            stream.push([], finished=finish())

        engine.tasks.append(asyncio.ensure_future(tokens()))

    return script


def silent(engine: ScriptedEngine, request: AddRequest, stream: RequestStream) -> None:
    """An engine that never answers."""


class ScriptedEngine:
    """What the app uses of `EngineClient`, with the test in the place of the engine process."""

    def __init__(self, script: Script, state: EngineState = EngineState.READY) -> None:
        self.state = state
        self.failure: str | None = None
        self.step_age = 0.0
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.ready: EngineReady | None = EngineReady(
            model_type="deepseek_v2",
            fingerprint="0123456789abcdef",
            max_model_len=WINDOW,
            vocab_size=tokenizer().vocab_size,
            eos_token_ids=[1],
            num_blocks=64,
            block_size=64,
            cache_bytes_per_token=1,
            weight_bytes=1,
            device="cpu",
            dtype="float32",
            quantization="none",
            ops="cpu",
            instruction_set="avx2",
            prefill_attention="cudnn",
            max_num_seqs=4,
            max_num_batched_tokens=64,
            load_seconds=0.0,
        )
        self.requests: list[AddRequest] = []
        self.streams: dict[str, RequestStream] = {}
        self.aborted: list[str] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.submitted = asyncio.Event()
        self._script = script

    def submit(self, request: AddRequest) -> RequestStream:
        if self.state is not EngineState.READY:
            raise EngineUnavailable("not ready")
        stream = self.streams[request.request_id] = RequestStream(request.request_id)
        self.requests.append(request)
        self.submitted.set()
        self._script(self, request, stream)
        return stream

    def abort(self, request_id: str) -> None:
        stream = self.streams.pop(request_id, None)
        if stream is not None and not stream.ended:
            self.aborted.append(request_id)
            stream.push([], finished=Finished(reason=FinishReason.ABORT))

    def prompt(self, index: int = -1) -> list[int]:
        return list(array("I", self.requests[index].prompt))


def make_app(script: Script, state: EngineState = EngineState.READY, **options: Any) -> tuple[FastAPI, ScriptedEngine]:
    settings = Settings(**options)
    supervisor = Supervisor(settings.to_engine_config())
    engine = ScriptedEngine(script, state)
    supervisor.engine = engine  # type: ignore[assignment]
    app = build_app(settings, supervisor, tokenizer())
    engine.on_stats = supervisor.on_stats
    return app, engine


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The JSON of each event; asserts the framing."""
        assert b"\r" not in self.body
        assert self.body.endswith(b"\n\n")
        blocks = [block for block in self.body.decode().split("\n\n")[:-1] if not block.startswith(":")]
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        assert blocks[-1] == "data: [DONE]"
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def call(
    app: FastAPI,
    method: str,
    path: str,
    body: bytes | Sequence[bytes] = b"",
    headers: Iterable[Header] = (),
    *,
    disconnect: asyncio.Event | None = None,
    host: bytes | None = b"localhost:8000",
    on_write: Callable[[Answer], None] = lambda answer: None,
    takes_nothing: bool = False,
) -> Answer:
    """One request over ASGI. `disconnect`: the client leaves when it is set; otherwise after the whole answer.
    No `body` part: none is ever sent. `takes_nothing`: the client's window is full from the first byte on.
    """
    answer = Answer()
    parts = [body] if isinstance(body, bytes) else list(body)
    gone = disconnect or asyncio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert answer.status == 0
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            if takes_nothing:
                await asyncio.Event().wait()
            answer.writes.append(message["body"])
            on_write(answer)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*([] if host is None else [(b"host", host)]), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return answer


JSON: Header = (b"content-type", b"application/json")


async def post(app: FastAPI, path: str, data: Any, headers: Iterable[Header] = (), **more: Any) -> Answer:
    """POST of JSON: an object, or bytes as they are."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return await call(app, "POST", path, body, [JSON, *headers], **more)


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], **more}


def run(script: Script, path: str = COMPLETIONS, options: Any = None, **data: Any) -> tuple[Answer, ScriptedEngine]:
    async def go() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(script, **(options or {}))
        body = chat(**data) if path == CHAT else {"prompt": "Hello", **data}
        return await post(app, path, body), engine

    return asyncio.run(go())


def entries(ids: list[int], k: int) -> Logprobs:
    """Made-up but recognisable: token i has -i / 8, the alternatives are its neighbours."""
    return Logprobs(
        token_ids=[[token_id, *range(token_id, token_id + k)] for token_id in ids],
        logprobs=[[-token_id / 8, *(-token_id / 8 - more for more in range(k))] for token_id in ids],
    )


def scores(text: str = TEXT) -> Script:
    """An engine that gives the log-probabilities it is asked for, also of the prompt, in chunks of three."""
    ids = ids_of(text)

    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        prompt, params = engine.prompt(), request.params

        async def push() -> None:
            if params.prompt_logprobs is not None:
                for start in range(1, len(prompt), 3):
                    out.push([], prompt_logprobs=entries(prompt[start : start + 3], params.prompt_logprobs))
                    await asyncio.sleep(0)
            for index, token_id in enumerate(ids[: params.max_tokens]):
                logprobs = None if params.logprobs is None else entries([token_id], params.logprobs)
                out.push([token_id], started=None if index else Started(0, 0.25, 0.5), logprobs=logprobs)
                await asyncio.sleep(0)
            out.push([], finished=finish())

        engine.tasks.append(asyncio.ensure_future(push()))

    return script
