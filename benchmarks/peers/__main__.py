"""latentd beside other servers, on the same machine and checkpoints: `python -m benchmarks.peers COMMAND`.

    run SERVER...   starts each server in turn and measures its scenarios (`run all`: all that are there)
    table           prints what was measured: our ratios to the best peer, with targets and limits, then every figure

docs/benchmarks.md says how the peers get into the home folder. Results go to HOME/results, one file for each server and
scenario; a new run replaces them. Nothing else may run meanwhile: what others took of the processor is recorded.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.cpu_kernels import Limits, measure_limits
from benchmarks.peers import results
from benchmarks.peers.host import Running, machine_cpu_s, raised_priority, started
from benchmarks.peers.load import Prompts, Run, measure
from benchmarks.peers.scenarios import SCENARIOS, Scenario
from benchmarks.peers.servers import SERVERS
from model.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("build/peers"), help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("servers", nargs="+", choices=("all", *SERVERS), metavar="SERVER", help=", ".join(SERVERS))
    run.add_argument("--scenarios", type=lambda text: text.split(","), help=f"some of {','.join(SCENARIOS)}")
    run.add_argument("--runs", type=int, help="of each scenario; default: its own number")
    commands.add_parser("table")
    arguments = parser.parse_args()
    folder: Path = arguments.home / "results"
    if arguments.command == "table":
        print(tables(arguments.home, folder))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    folder.mkdir(parents=True, exist_ok=True)
    with raised_priority():
        for name in SERVERS if "all" in arguments.servers else arguments.servers:
            try:
                run_server(name, arguments.home, folder, arguments.scenarios, arguments.runs)
            except (OSError, EOFError, RuntimeError, ValueError) as error:  # the next server may do better
                print(f"{name}: {error}", flush=True)


def run_server(name: str, home: Path, folder: Path, only: list[str] | None, runs: int | None) -> None:
    """Measures a server's scenarios, each into its file. Raises what host.started and load.measure raise."""
    server = SERVERS[name]
    with started(server, home, folder / f"{name}.log") as running:
        prompts = Prompts(home / "checkpoints" / server.checkpoint, seed=time.time_ns())
        measure(running.port, Scenario(1, 32, 4), prompts, server.plain)
        resident = running.memory_mib("VmRSS")
        for scenario in (each for each in server.scenarios if only is None or each in only):
            spec = SCENARIOS[scenario]
            measured, foreign = _undisturbed(running, spec, prompts, server.plain, runs or spec.runs)
            result = results.Result(
                server=name,
                scenario=scenario,
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                startup_s=running.startup_s,
                resident_mib=resident,
                peak_mib=running.memory_mib("VmHWM"),
                foreign_cpu=foreign,
                runs=measured,
            )
            results.save(result, folder)
            print(*results.measured_row(result), sep="  ", flush=True)


def _undisturbed(running: Running, spec: Scenario, prompts: Prompts, plain: bool, runs: int) -> tuple[list[Run], float]:
    """The runs, and the share of the cores that others took meanwhile."""

    def others() -> float:
        return machine_cpu_s() - running.cpu_s() - time.process_time()

    wall, before = time.perf_counter(), others()
    measured = [measure(running.port, spec, prompts, plain) for _ in range(runs)]
    share = (others() - before) / (time.perf_counter() - wall) / (os.cpu_count() or 1)
    return measured, max(share, 0.0)


def tables(home: Path, folder: Path) -> str:
    """Markdown. The machine's speeds are measured once and kept beside the results."""
    speeds = folder / "machine.json"
    if not speeds.exists():
        speeds.write_bytes(msgspec.json.encode(measure_limits(os.cpu_count() or 1)))
    machine = msgspec.json.decode(speeds.read_bytes(), type=Limits)
    measured = results.load(folder)
    parts = [
        f"Limits at {machine.read / 1e9:.1f} GB/s, {machine.bf16 / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{machine.int8 / 1e9:.0f} GOP/s in int8.\n"
    ]
    for checkpoint in ("small", "tiny", "narrow"):
        config = None if checkpoint == "tiny" else load_config(home / "checkpoints" / checkpoint)
        parts.append(f"`{checkpoint}`:\n\n" + results.ratio_table(measured, checkpoint, machine, config))
    return "\n".join([*parts, results.measured_table(measured)])


if __name__ == "__main__":
    main()
