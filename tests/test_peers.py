"""The comparison with other servers: its arithmetic, and one short run against the real daemon."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_kernels import Limits
from benchmarks.make_checkpoint import SHAPES
from benchmarks.peers import __main__ as peers
from benchmarks.peers import host, results
from benchmarks.peers.limits import limit
from benchmarks.peers.load import Run
from benchmarks.peers.scenarios import SCENARIOS, Figure, Scenario
from benchmarks.peers.servers import SERVERS, Server
from model.config import load_config
from server.settings import BUILTIN_MODEL

ZEN5 = Limits(read=42e9, bf16=920e9, int8=1750e9)


def run(output_tok_s: float = 1.0, ttft_s: float = 1.0, tpot_s: float = 1.0) -> Run:
    return Run(1.0, 128, 0, output_tok_s, ttft_s, itl_p50_s=0.01, itl_p99_s=0.02, tpot_s=tpot_s)


def result(server: str, scenario: str, *runs: Run) -> results.Result:
    return results.Result(
        server=server,
        scenario=scenario,
        date="2026-01-01",
        startup_s=1.0,
        resident_mib=100.0,
        peak_mib=200.0,
        foreign_cpu=0.015,
        runs=list(runs),
    )


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_ratio_is_the_median_over_the_best_peer_of_the_same_precision() -> None:
    measured = [
        result("latentd-int8", "c8", run(90), run(300), run(310)),
        result("llama-q8_0", "c8", run(100), run(10), run(120)),
        result("llama-q4_0", "c8", run(1000)),  # of another precision
        result("latentd-int8", "c4", run(50)),  # no peer
    ]
    assert cells(results.ratio_table(measured, "small", ZEN5, None)) == [
        ["8-bit", "c=8", "300.0 tok/s", "100.0 tok/s (llama-q8_0)", "**3.00**", "3.0", "met"]
    ]


def test_times_count_the_other_way_round() -> None:
    measured = [
        result("latentd-bf16", "p8k", run(ttft_s=10.0, tpot_s=0.020)),
        result("llama-bf16-8k", "p8k", run(ttft_s=90.0, tpot_s=0.060)),
        result("vllm-bf16", "p8k", run(ttft_s=15.0, tpot_s=0.080)),
    ]
    assert cells(results.ratio_table(measured, "small", ZEN5, None)) == [
        ["bf16", "8K prompt, first token", "10.00 s", "15.00 s (vllm-bf16)", "**1.50**", "1.8", "missed"],
        ["bf16", "decode at 8K context", "20.0 ms", "60.0 ms (llama-bf16-8k)", "**3.00**", "3.5", "missed"],
    ]


@pytest.mark.parametrize(
    ("precision", "scenario", "figure", "expected"),
    [
        ("bf16", "c1", "output_tok_s", 84),
        ("8-bit", "c1", "output_tok_s", 167),
        ("4-bit", "c1", "output_tok_s", 310),
        ("bf16", "c16", "output_tok_s", 344),
        ("8-bit", "c16", "output_tok_s", 671),
        ("bf16", "p2k", "ttft_s", 2048 / 1857),
        ("8-bit", "p2k", "ttft_s", 2048 / 3064),
        ("bf16", "p8k", "ttft_s", 8192 / 1232),
        ("bf16", "p8k", "tpot_s", 0.0132),
    ],
)
def test_limits_are_those_worked_out_by_hand(
    tmp_path: Path, precision: str, scenario: str, figure: Figure, expected: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["small"]))
    found = limit(ZEN5, load_config(tmp_path), precision, SCENARIOS[scenario], figure)
    assert found == pytest.approx(expected, rel=0.01)


def test_every_scenario_has_servers_and_every_server_its_scenarios() -> None:
    assert {scenario for server in SERVERS.values() for scenario in server.scenarios} == set(SCENARIOS)


def test_a_short_run_against_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "results").mkdir(parents=True)
    (home / "checkpoints").mkdir()
    (home / "checkpoints" / "tiny").symlink_to(BUILTIN_MODEL)
    command = f"{sys.executable} -m server serve {{home}}/checkpoints/tiny --port {{port}} --num-threads 1"
    server = Server(f"{command} --kv-cache-memory 64MiB --served-model-name m", "tiny", "bf16", ("t1",), ready="/ready")
    monkeypatch.setitem(SERVERS, "latentd-tiny", server)
    monkeypatch.setitem(SCENARIOS, "t1", Scenario(2, 16, 8))
    peers.run_server("latentd-tiny", home, home / "results", only=None, runs=2)
    [found] = results.load(home / "results")
    figures: tuple[Figure, ...] = ("output_tok_s", "ttft_s", "tpot_s")
    assert [(each.output_tokens, each.short) for each in found.runs] == [(16, 0), (16, 0)]
    assert all(found.median(figure) > 0 for figure in figures)
    assert found.peak_mib >= found.resident_mib > 50
    assert 0 <= found.foreign_cpu <= 1


@pytest.mark.parametrize("session", ["", "/autogroup-838 nice 0\n"])
def test_it_runs_where_the_system_does_not_share_among_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: str
) -> None:
    monkeypatch.setattr(host, "SESSION", tmp_path / "autogroup")
    host.SESSION.write_text(session)
    host._share_priority(os.getpid())


def test_a_server_that_does_not_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, "latentd-tiny", Server("false", "tiny", "bf16", ("t1",)))
    with pytest.raises(RuntimeError, match=r"see .*latentd-tiny\.log"):
        peers.run_server("latentd-tiny", tmp_path, tmp_path, only=None, runs=1)
