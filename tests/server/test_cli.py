"""The command as an operator uses it: what it prints, the one line of every error, and its exit codes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from server import healthcheck
from server.banner import SUGGESTIONS
from server.cli import main
from server.limits import LIMITS
from server.settings import BUILTIN_MODEL, Settings, flag_of

LATENTD = (sys.executable, "-m", "server")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LATENTD_"):
            monkeypatch.delenv(name)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused with code 2, nothing on stdout and one line on stderr."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("latentd: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("latentd: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "--prot", "9000"], "--prot: no such option (did you mean --port?)"),
        (["serve", "--max-model-length=8"], "--max-model-length: no such option (did you mean --max-model-len?)"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["serve", "--port", "many"], "--port: should be a valid integer, not 'many'"),
        (["serve", "--max-num", "3"], "--max-num: no such option (did you mean --max-num-seqs?)"),
        (["serve", "/a", "/b"], "unexpected argument '/b'"),
        (["serve", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["serve", "--config", "/no/file"], "--config: cannot read /no/file: No such file or directory"),
        (["serve", "--host", "name.invalid"], "--host: cannot resolve 'name.invalid'"),
        (["inspect"], "inspect: MODEL_DIR is missing"),
        (["inspect", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["inspect", "x", "--device-memory", "80G"], "--device-memory: '80G' is not a size; write for example 4GiB"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert error_line(capsys, *arguments).startswith(line)


def test_an_unknown_command_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search("srve.*serve.*inspect", error_line(capsys, "srve"))


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "inspect" in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert [flag_of(name) for name in Settings.model_fields if name != "model" and flag_of(name) not in text] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"latentd {version('latentd')}\n"


def test_doctor_ends_as_what_it_finds(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also in a folder with packages that are called like ours."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/__init__.py").write_text("raise ImportError", encoding="utf-8")
    with contextlib.chdir(tmp_path):
        code = main(["doctor"])
    lines = capfd.readouterr().out.splitlines()
    assert f"latentd       {version('latentd')}" in lines[0]
    assert {line.split()[0] for line in lines} <= {"ok", "AMISS"}
    assert code == any(line.startswith("AMISS") for line in lines)


def test_print_config_is_a_config_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTD_API_KEY", "sk-canary")
    flags = ["--port", "9", "--served-model-name", "a", "--served-model-name", 'b"', "--no-prefix-cache", "--strict"]
    assert main(["serve", *flags, "--kv-cache-memory", "2GiB", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "sk-canary" not in text
    assert all(re.search(rf"(?m)^# +{limit.name} ", text) for limit in LIMITS)
    values = tomllib.loads(text)
    assert values["served_model_name"] == ["a", 'b"']
    assert (values["port"], values["prefix_cache"], values["kv_cache_memory"]) == (9, False, 2 << 30)
    assert values["strict"] is True
    file = tmp_path / "latentd.toml"
    file.write_text(text, encoding="utf-8")
    assert main(["serve", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_inspect_the_builtin_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(BUILTIN_MODEL), "--json", "--device-memory", "1GiB"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = json.loads((BUILTIN_MODEL / "config.json").read_text(encoding="utf-8"))
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert report["cache_bytes_per_token"] == 2 * width * config["num_hidden_layers"]
    assert report["parameters"] * 2 == report["weight_files_bytes"]
    assert report["available_bytes"] == 1 << 30
    assert report["cached_tokens"] % 64 == 0
    used = report["weight_bytes"] + report["cached_tokens"] * report["cache_bytes_per_token"]
    assert 0 <= (1 << 30) - used < 64 * report["cache_bytes_per_token"]
    assert report["longest_context"] == config["max_position_embeddings"]
    assert main(["inspect", str(BUILTIN_MODEL)]) == 0
    assert f"{report['cache_bytes_per_token']:,} bytes a token" in capsys.readouterr().out


def test_inspect_plans_from_the_config_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): 15.7 B parameters, 2.4 B active, 31,104 bytes a token."""
    config = json.loads((BUILTIN_MODEL / "config.json").read_text(encoding="utf-8"))
    config |= {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["inspect", str(tmp_path), "--json", "--device-memory", "80GiB"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert round(report["parameters"] / 1e9, 1) == 15.7
    assert round(report["active_parameters"] / 1e9, 1) == 2.5
    assert report["cache_bytes_per_token"] == 576 * 27 * 2 == 31104
    assert report["weight_files_bytes"] is None
    assert report["requests_of_128k"] == (80 * 2**30 - report["weight_bytes"]) // (131072 * 31104)
    assert main(["inspect", str(tmp_path), "--device-memory", "8GiB"]) == 0
    assert "the weights do not fit" in capsys.readouterr().out


@contextlib.contextmanager
def daemon(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """`latentd serve` as a process of its own; killed at the end if it is still there."""
    command = [*LATENTD, "serve", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ | (environment or {}), **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> int:
    """Status of a GET; 0 when nobody answers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", path)
            with connection.getresponse() as response:
                return response.status
        except (OSError, http.client.HTTPException):
            return 0


def wait_for(port: int, path: str, status: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while get(port, path) != status:
        assert time.monotonic() < deadline, f"{path} did not become {status}"
        time.sleep(0.05)


@contextlib.contextmanager
def open_stream(port: int, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A completion of which the first event has come."""
    body = {"prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            assert response.status == 200
            assert response.readline().startswith(b"data: ")
            yield response


def test_a_port_in_use_is_one_line_and_code_1_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = time.monotonic()
        with daemon("--port", str(taken.getsockname()[1])) as process:
            out, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert out == ""
        assert re.fullmatch(r"latentd: cannot listen on 127\.0\.0\.1 port \d+: Address already in use\n", err)
        assert time.monotonic() - started < 10


def test_an_engine_that_cannot_start_is_one_line_and_code_2() -> None:
    with daemon("--port", "0", "--max-model-len", "100000000") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert re.fullmatch(r"latentd: max_model_len 100000000 .*\n", err)


def test_a_signal_while_loading_ends_at_once_with_code_0() -> None:
    port = free_port()
    with daemon("--port", str(port)) as process:
        wait_for(port, "/ready", 503)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - started < 5
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_a_daemon_from_its_first_line_to_a_drain(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert healthcheck.main([str(port)]) == 1
    assert "not ready" in capsys.readouterr().err
    with daemon("--port", str(port), "--host", "0.0.0.0", "--num-blocks", "64", "--num-threads", "1") as process:
        wait_for(port, "/ready", 200)
        assert healthcheck.main([str(port)]) == 0
        resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert resident is not None
        assert int(resident[1]) * 1024 < 150e6
        with open_stream(port, max_tokens=50) as stream:
            process.send_signal(signal.SIGTERM)
            wait_for(port, "/ready", 503)
            rest = stream.read().decode()
        assert rest.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in rest
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert f"serves latentd-builtin at http://127.0.0.1:{port}/v1" in out
    assert "64 blocks of 64 = 4,096 tokens" in out
    assert all(question in out for question in SUGGESTIONS)
    assert "without an API key" in out
    assert out.count("curl ") == 1


def test_a_second_signal_does_not_wait_for_open_requests() -> None:
    port = free_port()
    with daemon("--port", str(port), environment={"LATENTD_API_KEY": ""}) as process:
        wait_for(port, "/ready", 200)
        with open_stream(port, max_tokens=8000) as stream:
            process.send_signal(signal.SIGINT)
            wait_for(port, "/ready", 503)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            out, err = process.communicate(timeout=30)
            assert time.monotonic() - started < 2
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert b"[DONE]" not in stream.read()
    assert process.returncode == 128 + signal.SIGINT
    assert "cut off" in err
    assert "without an API key" not in out
