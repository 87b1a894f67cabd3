from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.daemon import Daemon


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as they found it."""
    names = ("--served-model-name", "builtin", "--served-model-name", "hub/builtin")
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), *names)
    yield daemon
    assert daemon.stop() == 0
