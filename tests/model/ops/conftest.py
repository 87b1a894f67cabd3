"""The compiled kernels, on every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.ops.cpu import library as binding
from model.ops.cpu.library import ISAS, Library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, help="another library of the kernels than the installed one")


def pytest_configure(config: pytest.Config) -> None:
    binding.LIBRARY = config.getoption("--kernels", None) or binding.LIBRARY


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Library]:
    """On two threads. Afterwards the best instruction set is in use again."""
    library = binding.library()
    if library is None:
        pytest.skip("the kernels are not built")
    best = library.isa
    if not library.use_isa(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    library.set_threads(2)
    yield library
    assert library.use_isa(best)
