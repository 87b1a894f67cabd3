"""What was measured, as files and as the tables of docs/benchmarks.md."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import msgspec

from benchmarks.cpu_kernels import Limits
from benchmarks.peers.limits import limit
from benchmarks.peers.load import Run
from benchmarks.peers.scenarios import COLUMNS, SCENARIOS, Column, Figure
from benchmarks.peers.servers import SERVERS
from model.config import DeepseekConfig

OURS = "latentd"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario against one server."""

    server: str
    scenario: str
    date: str
    startup_s: float
    resident_mib: float
    """When it was ready."""
    peak_mib: float
    """Up to the end of this scenario."""
    foreign_cpu: float
    """Share of the machine's cores that processes other than server and driver took."""
    runs: list[Run]

    def median(self, figure: Figure) -> float:
        return float(statistics.median(getattr(run, figure) for run in self.runs))


def save(result: Result, folder: Path) -> None:
    data = msgspec.json.format(msgspec.json.encode(result), indent=1)
    (folder / f"{result.server}.{result.scenario}.json").write_bytes(data + b"\n")


def load(folder: Path) -> list[Result]:
    """Those of servers and scenarios that still exist, in their order."""
    paths = (folder / f"{server}.{scenario}.json" for server in SERVERS for scenario in SCENARIOS)
    return [msgspec.json.decode(path.read_bytes(), type=Result) for path in paths if path.exists()]


def ratio_table(results: list[Result], checkpoint: str, machine: Limits, config: DeepseekConfig | None) -> str:
    """Ours against the best peer of each scenario and precision, on one checkpoint; without a config, no limits."""
    rows = []
    for precision, column in itertools.product(("bf16", "8-bit", "4-bit"), COLUMNS):
        figure = column.figure
        medians = {
            result.server: result.median(figure)
            for result in results
            if _belongs(result, checkpoint, precision, column)
        }
        ours = [value for server, value in medians.items() if server.startswith(OURS)]
        peers = {server: value for server, value in medians.items() if not server.startswith(OURS)}
        if not ours or not peers:
            continue
        best = (max if figure == "output_tok_s" else min)(peers, key=peers.__getitem__)
        ratio = ours[0] / peers[best] if figure == "output_tok_s" else peers[best] / ours[0]
        target = column.targets[precision]
        row = [precision, column.title, _show(ours[0], figure), f"{_show(peers[best], figure)} ({best})"]
        row += [f"**{ratio:.2f}**", f"{target:.1f}", "met" if ratio >= target else "missed"]
        if config:
            row.append(_show(limit(machine, config, precision, SCENARIOS[column.scenario], figure), figure))
        rows.append(row)
    head = ["weights", "scenario", "ours", "best peer", "ratio", "target", "", *(["limit"] if config else [])]
    return _markdown(head, rows)


def _belongs(result: Result, checkpoint: str, precision: str, column: Column) -> bool:
    server = SERVERS[result.server]
    same = (server.checkpoint, server.precision, result.scenario) == (checkpoint, precision, column.scenario)
    return same and precision in column.targets


def _show(value: float, figure: Figure) -> str:
    if figure == "output_tok_s":
        return f"{value:,.1f} tok/s"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def measured_table(results: list[Result]) -> str:
    """Every result, with its spread."""
    head = ["server", "clients x prompt + output", "tok/s (min - max)", "first token", "between tokens, p50 / p99"]
    return _markdown([*head, "others' CPU", "start", "memory, peak"], [measured_row(result) for result in results])


def measured_row(result: Result) -> list[str]:
    scenario = SCENARIOS[result.scenario]
    rates = [run.output_tok_s for run in result.runs]
    short = sum(run.short for run in result.runs)
    gaps = [1000 * statistics.median(getattr(run, name) for run in result.runs) for name in ("itl_p50_s", "itl_p99_s")]
    return [
        result.server,
        f"{scenario.clients} x {scenario.prompt:,} + {scenario.output}" + (f" ({short} short)" if short else ""),
        f"{statistics.median(rates):,.1f} ({min(rates):,.1f} - {max(rates):,.1f})",
        _show(result.median("ttft_s"), "ttft_s"),
        f"{gaps[0]:.1f} / {gaps[1]:.1f} ms",
        f"{result.foreign_cpu:.0%}",
        f"{result.startup_s:.1f} s",
        f"{result.peak_mib:,.0f} MiB",
    ]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])
