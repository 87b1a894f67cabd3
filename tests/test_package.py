"""The wheel: what is in it, and that it serves from another folder and another environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("server", "scheduler", "model")
# A clean shell: nothing of this environment may help the installed command.
ENVIRONMENT = {"PATH": os.defpath, "HOME": "/nonexistent", "LANG": "C.UTF-8"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that no build folder of an earlier day gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    (wheel,) = out.iterdir()
    return wheel


def pip(python: str | Path, *arguments: str, timeout: float = 120) -> None:
    """The pip of this environment, at work in the environment of `python`."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, text=True, capture_output=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr


def serve_and_ask(environment: Path, folder: Path) -> dict[str, Any]:
    """Starts the installed command in a folder of its own and returns one answer of the built-in model."""
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [environment / "bin/latentd", "serve", "--port", "0", "--num-threads", "1"],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while " at http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        url = log.read_text().partition(" at http://")[2].split()[0]
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = json.dumps({"messages": messages, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://{url}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return answer


def check_command(environment: Path, folder: Path) -> None:
    version = subprocess.run(
        [environment / "bin/latentd", "--version"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert version.stdout == f"latentd {PROJECT['version']}\n"
    where = subprocess.run(
        [environment / "bin/python", "-P", "-c", "import server.cli, model.config; print(server.cli.__file__)"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)
    answer = serve_and_ask(environment, folder)
    assert answer["model"] == "latentd-builtin"
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
        licences = {name.partition("/licenses/")[2] for name in archive.namelist() if "/licenses/" in name}
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"model/builtin/{name}" for name in ("config.json", "model.safetensors", "README.md", "NOTICE")} <= names
    assert licences == {"LICENSE", "model/builtin/NOTICE"}
    assert wheel.name == f"latentd-{PROJECT['version']}-py3-none-any.whl"
    assert "License-Expression: Apache-2.0" in text
    assert "# latentd" in text  # the README is the description


def test_the_wheel_serves_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows only the dependencies, by path, from the one the tests run in."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    pip(environment / "bin/python", "install", "--no-deps", "--no-index", str(wheel))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    # A plain path: .pth files in there are not read, so the editable install of the sources stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    # Folders that are called like our packages must not be taken for them.
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the wrong package')", encoding="utf-8")
    check_command(environment, folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installs all pinned dependencies; torch first, as the Makefile does."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    constraints = ("-c", str(ROOT / "constraints.txt"))
    (torch,) = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("torch==")
    ]
    pip(environment / "bin/python", "install", *constraints, torch, timeout=1200)
    pip(environment / "bin/python", "install", *constraints, str(wheel), timeout=1200)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    check_command(environment, folder)
