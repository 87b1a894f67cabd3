"""Compiles the kernels: `python -m model.ops.cpu.build` in place, setup.py into the package that is being made.

Only the standard library is used, so that an isolated build downloads nothing. Each instruction set the compiler knows
gets its own copy of kernels.cpp; which one runs is decided when the library is loaded.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
LIBRARY = Path(__file__).parent / "libkernels.so"

FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # GCC 12 takes its own intrinsics' undefined operands for mistakes.
    *("-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
# Best first: the library takes the first that the machine runs.
X86_64 = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}


class BuildError(Exception):
    """The message is the compiler's, or says that there is none."""


def compiler() -> list[str]:
    """$CXX, or the first of the usual names that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler found" + (f": CXX={named[0]}" if named else ""))


def build(library: Path = LIBRARY, flags: tuple[str, ...] = ()) -> None:
    """flags: more of the compiler's, such as a sanitizer."""
    command = [*compiler(), *FLAGS, *flags]
    started = _newest_source()
    isas = {**(X86_64 if platform.machine() in ("x86_64", "AMD64") else {}), "portable": ()}
    isas = {name: flags for name, flags in isas.items() if _knows(command, flags)}
    built = " ".join(f"BUILT({name})" for name in isas)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        units = {
            "pool": ("pool.cpp",),
            "library": ("library.cpp", f"-DLATENTD_BUILT={built}", *(f"-DLATENTD_HAS_{name.upper()}" for name in isas)),
            **{name: ("kernels.cpp", f"-DISA={name}", *flags) for name, flags in isas.items()},
        }

        def compile_unit(name: str) -> str:
            source, *flags = units[name]
            target = f"{folder}/{name}.o"
            _run([*command, *flags, "-c", str(SOURCES / source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(folder, library.name)
        _run([*command, "-shared", *objects, "-o", str(linked)])
        # As old as what it was made of: a source that is saved while the compiler runs makes it stale.
        os.utime(linked, (started, started))
        linked.replace(library)


def is_stale(library: Path = LIBRARY) -> bool:
    return not library.exists() or library.stat().st_mtime < _newest_source()


def _newest_source() -> float:
    return max(file.stat().st_mtime for file in (*SOURCES.iterdir(), Path(__file__)))


def _knows(command: list[str], flags: tuple[str, ...]) -> bool:
    """Whether the compiler is new enough for an instruction set."""
    try:
        _run([*command, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> None:
    result = subprocess.run(command, text=True, capture_output=True)
    sys.stderr.write(result.stderr if result.returncode == 0 else "")
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{result.stderr}")


if __name__ == "__main__":
    if is_stale():
        try:
            build()
        except BuildError as error:
            sys.exit(str(error))
