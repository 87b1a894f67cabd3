"""Everything here is marked `faults`; the figures of a run are printed at its end, for docs/reliability.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.settings import BUILTIN_MODEL
from tests.e2e.daemon import Daemon

_figures: list[str] = []

Measured = Callable[[str, str], None]
StartDaemon = Callable[..., Daemon]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in sorted(_figures):
        terminalreporter.write_line(line)


@pytest.fixture
def measured() -> Measured:
    """`measured("F1", "ready again after 3.1 s")`: a figure of a row of the fault matrix."""
    return lambda row, figure: _figures.append(f"{row}: {figure}")


@pytest.fixture
def wide_model(tmp_path: Path) -> list[str]:
    """Options of a daemon: the built-in model, with a window of 131,072 and room for one such request."""
    folder = shutil.copytree(BUILTIN_MODEL, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] *= 16
    config["rope_scaling"]["factor"] *= 16
    (folder / "config.json").write_text(json.dumps(config))
    return [str(folder), "--num-blocks", "2048"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartDaemon]:
    """`start(*options, faults="", wait=True)`: a daemon that is gone after the test. `faults`: those of
    `tests.faults.engine`.
    """
    daemons: list[Daemon] = []

    def start_daemon(*options: str, faults: str = "", wait: bool = True) -> Daemon:
        folder = tmp_path / str(len(daemons))
        folder.mkdir()
        module = ("tests.faults.daemon", faults) if faults else ("server",)
        daemons.append(Daemon(folder, *options, module=module, wait=wait))
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait()
