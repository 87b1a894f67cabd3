"""How the kernels come to be: the recipe, an install without a compiler, and a library of another version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.ops.cpu import build, library

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is loaded once a process; here it is tried again."""
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_signatures_are_those_of_the_header() -> None:
    text = re.sub(r"//.*", "", (build.SOURCES / "abi.h").read_text(encoding="utf-8"))
    returned = {"int": "c", "void": "n", "size_t": "s", "const char*": "t", "const void*": "p"}
    taken = {"int64_t": "i", "int": "c", "latentd_format": "c", "size_t": "s", "float": "f"}
    named = {"int64_t m": "r", "int64_t tokens": "r", "void* workspace": "w"}
    found = {}
    for result, name, parameters in re.findall(r"(?m)^([\w *]+?) ?latentd_(\w+)\(([^)]*)\);", text):
        arguments = [] if parameters == "void" else parameters.split(",")
        arguments = [" ".join(argument.split()) for argument in arguments]
        letters = [
            named.get(argument) or ("p" if "*" in argument else taken[argument.split()[0]]) for argument in arguments
        ]
        found[name] = f"{returned[result]} {''.join(letters)}"
    assert found == library.SIGNATURES
    assert f"#define LATENTD_ABI {library.ABI}\n" in text


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("broken", ["missing", "other version", "not a library"])
def test_without_a_library_one_line_says_so(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "other version":
        if not build.LIBRARY.exists():
            pytest.skip("the kernels are not built")
        monkeypatch.setattr(library, "ABI", library.ABI + 1)
    else:
        monkeypatch.setattr(library, "LIBRARY", tmp_path / "libkernels.so")
        if broken == "not a library":
            (tmp_path / "libkernels.so").write_bytes(b"?")
    assert library.library() is None
    assert library.library() is None
    (record,) = caplog.records
    assert record.message.startswith("no CPU kernels")


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(build.BuildError, match="no C"):
        build.build(tmp_path / "libkernels.so")
    assert not list(tmp_path.iterdir())


def test_setup_succeeds_without_a_compiler(tmp_path: Path) -> None:
    """setup.py alone, as the isolated build calls it, on a copy in which no library of ours can lie."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    ignored = shutil.ignore_patterns("*.so", ".build-*", "__pycache__")
    shutil.copytree(build.SOURCES.parent, tmp_path / "model/ops/cpu", ignore=ignored)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=tmp_path,
        env=os.environ | {"CXX": "/nonexistent/c++"},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_stale_when_a_source_is_newer(tmp_path: Path) -> None:
    made = tmp_path / "libkernels.so"
    assert build.is_stale(made)
    made.touch()
    assert not build.is_stale(made)
    os.utime(made, (0, 0))
    assert build.is_stale(made)
