"""The kernels' tests under the compiler's sanitizers: `python -m tests.sanitizers [address] [thread]`.

The kernels are built once with the address and the undefined-behaviour sanitizer and once with the thread sanitizer,
and their tests call them on every instruction set of this machine. Nothing else is instrumented, but Python and torch
take the sanitizer's allocator, which surrounds every tensor with memory that must not be touched. Needs GCC.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from model.ops.cpu.build import build, compiler

FOLDER = Path(__file__).parent / "model/ops"
TESTS = [str(FOLDER / f"test_cpu_{name}.py") for name in ("pool", "linear", "moe", "attention", "sampler", "replay")]


class Sanitizer(NamedTuple):
    flags: tuple[str, ...]
    runtime: str
    options: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan.so",
        # Python leaks by design; before GCC 12.4 frames kept after a return are aligned too little for wide vectors.
        {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer(
        ("-fsanitize=thread",),
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:die_after_fork=0"},
    ),
}


def run(name: str) -> int:
    sanitizer = SANITIZERS[name]
    command = [*compiler(), f"-print-file-name={sanitizer.runtime}"]
    runtime = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not runtime.is_absolute():
        print(f"{name}: {compiler()[0]} has no {sanitizer.runtime}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"lib{name}.so")
        build(library, ("-O1", "-g", "-fno-omit-frame-pointer", *sanitizer.flags))
        environment = os.environ | sanitizer.options | {"LD_PRELOAD": str(runtime.resolve()), "OMP_NUM_THREADS": "1"}
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-s", *TESTS, f"--kernels={library}"]
        print(f"{name}: {' '.join(sanitizer.flags)}", flush=True)
        return subprocess.run(tests, env=environment).returncode


if __name__ == "__main__":
    sys.exit(max([run(name) for name in sys.argv[1:] or SANITIZERS]))
