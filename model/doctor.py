"""What this machine has for latentd: `latentd doctor`. One line each; the exit code is 1 where something is amiss.

A process of its own, since it loads torch.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from model.cores import usable_cores
from model.memory import available_memory, in_gib

NEEDED_FILES = 1024
"""Connections of as many open requests as there are by default, twice, and the daemon's own files."""


class Finding(NamedTuple):
    name: str
    text: str
    amiss: bool = False


def examine() -> list[Finding]:
    """In the order in which they are printed."""
    cores = usable_cores()
    return [
        Finding("latentd", version("latentd")),
        Finding("python", platform.python_version()),
        *_torch(),
        Finding("cpu", f"{_cpu_model()}, {cores} of {os.cpu_count() or cores} cores usable"),
        *_kernels(),
        Finding("memory", f"{in_gib(available_memory())} available"),
        _open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def _torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return [Finding("torch", f"cannot be loaded, nothing runs without it: {error}", amiss=True)]
    gpu = "none that torch can use"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {in_gib(torch.cuda.mem_get_info()[1])}, CUDA {torch.version.cuda}"
    return [Finding("torch", torch.__version__), Finding("gpu", gpu)]


def _kernels() -> list[Finding]:
    try:
        from model.ops.cpu.library import ISAS, load

        kernels = load()
    except (ImportError, OSError) as error:
        lost = f"none, torch computes instead on a CPU, several times slower: {error}"
        return [Finding("kernels", lost, amiss=True)]
    chosen = kernels.isa
    runs = [isa for isa in ISAS if kernels.use_isa(isa)]
    kernels.use_isa(chosen)
    return [
        Finding("instructions", ", ".join(f"{isa} (chosen)" if isa == chosen else isa for isa in runs)),
        Finding("kernels", "compiled"),
    ]


def _open_files(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "no limit")
    few = limit < NEEDED_FILES
    return Finding("open files", f"{limit:,}" + (f", fewer than {NEEDED_FILES:,}: see `ulimit -n`" if few else ""), few)


def _cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = info.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    findings = examine()
    for finding in findings:
        print(f"{'AMISS' if finding.amiss else 'ok':6}{finding.name:14}{finding.text}")
    return int(any(finding.amiss for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
