"""Cancelling, counting and forgetting against the real process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model.ops.cpu.library import library
from server.banner import SUGGESTIONS
from tests.e2e.daemon import Daemon

KEYS = ("first-key", "second-key")
ADMIN = "admin-key"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    environment = {"LATENTD_API_KEY": ",".join(KEYS), "LATENTD_ADMIN_KEY": ADMIN}
    daemon = Daemon(tmp_path_factory.mktemp("guarded"), environment=environment)
    yield daemon
    assert daemon.stop() == 0


def test_a_stream_is_cancelled_by_its_own_key_only(guarded: Daemon) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 8000, "ignore_eos": True}
    headers = {**bearer(KEYS[0]), "X-Request-Id": "mine"}
    with httpx.stream("POST", f"{guarded.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        chunk = json.loads(next(lines).removeprefix("data: "))
        assert httpx.get(f"{guarded.url}/load", headers=bearer(KEYS[1])).json() == {"server_load": 1}
        for name in ("mine", chunk["id"]):
            path = f"{guarded.url}/v1/requests/{name}/cancel"
            assert httpx.post(path, headers=bearer(KEYS[1])).status_code == 404
        assert httpx.post(path, headers=bearer(KEYS[0])).json() == {"cancelled": True}
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "cancelled"
    assert rest[-1] == "data: [DONE]"
    guarded.wait_idle(5)
    assert httpx.post(path, headers=bearer(KEYS[0])).status_code == 404


def test_the_prefix_cache_is_forgotten(guarded: Daemon) -> None:
    def cached() -> int:
        body = {"prompt": list(range(100, 300)), "max_tokens": 1}
        answer = httpx.post(f"{guarded.url}/v1/completions", json=body, headers=bearer(KEYS[0]), timeout=60).json()
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [cached(), cached()] == [0, 192]
    path = f"{guarded.url}/reset_prefix_cache"
    assert httpx.post(path, headers=bearer(KEYS[0])).status_code == 401
    assert httpx.post(path, headers=bearer(ADMIN)).json() == {"reset": True}
    assert [cached(), cached()] == [0, 192]


def test_keys_are_nowhere(guarded: Daemon) -> None:
    info = httpx.get(f"{guarded.url}/server_info", headers=bearer(KEYS[0]))
    assert info.json()["block_pool"]["num_blocks"] > 0
    for secret in (*KEYS, ADMIN):
        assert secret not in info.text + guarded.logs


@pytest.mark.skipif(library() is None, reason="the kernels are not built")
def test_quantised_weights(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--dtype", "bfloat16", "--quantization", "int4")
    try:
        assert "in int4 and bfloat16\n" in daemon.logs
        info = httpx.get(f"{daemon.url}/server_info").json()
        assert (info["engine"]["quantization"], info["settings"]["quantization"]) == ("int4", "int4")
        assert info["engine"]["weight_bytes"] < 8e6  # of 15.8 MB
        body = {"messages": [{"role": "user", "content": SUGGESTIONS[0]}], "temperature": 0}
        answer = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
    finally:
        assert daemon.stop() == 0


def test_count_is_what_the_model_reads(daemon: Daemon) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "max_tokens": 1}
    usage = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    assert httpx.post(f"{daemon.url}/tokenize", json=body).json()["count"] == usage["prompt_tokens"]
