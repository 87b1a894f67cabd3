"""Who may import whom: server -> scheduler -> model, never back, and no torch before the model runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "scheduler", "model")

# Torch-free modules of the packages below that a package may use. None: no restriction beside the direction.
SCHEDULER_SEES = {"model.batch", "model.config"}
SERVER_SEES = {"scheduler.messages", "scheduler.channel", "scheduler.config", "model.batch", "model.config"}
# What stands in a checkpoint folder is read by the same torch-free code on both sides of the channel.
READS_CHECKPOINTS = {"model.checkpoint", "model.json_file", "model.memory"}
MODULES_THAT_READ_CHECKPOINTS = {
    "server.daemon",
    "server.inspect",
}
TORCH_FREE = SCHEDULER_SEES | READS_CHECKPOINTS


def modules() -> list[str]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def file_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """Modules of ours that the source names, wherever the import stands and whatever guards it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            name = str(node.module)
            # `from model import config` names a module, `from model.config import X` something in it.
            found |= {
                f"{name}.{alias.name}" if (ROOT / name.replace(".", "/")).is_dir() else name for alias in node.names
            }
    return {name for name in found if name.split(".")[0] in PACKAGES}


def allowed(module: str, imported: str) -> bool:
    package, target = module.split(".")[0], imported.split(".")[0]
    if target == package:
        return True
    match package:
        case "server" if module in MODULES_THAT_READ_CHECKPOINTS:
            return imported in SERVER_SEES | READS_CHECKPOINTS
        case "server":
            return imported in SERVER_SEES
        case "scheduler" if module == "scheduler.engine":
            return target == "model"
        case "scheduler":
            return imported in SCHEDULER_SEES
    return False


def test_the_rule_tells_right_from_wrong() -> None:
    assert allowed("server.app", "scheduler.messages")
    assert allowed("scheduler.engine", "model.runner")
    assert allowed("server.inspect", "model.memory")
    assert not allowed("server.app", "scheduler.scheduler")
    assert not allowed("server.app", "model.runner")
    assert not allowed("server.app", "model.memory")
    assert not allowed("scheduler.scheduler", "model.runner")
    assert not allowed("scheduler.engine", "server.settings")
    assert not allowed("model.runner", "scheduler.config")


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    wrong = {imported for imported in imports_of(module) if not allowed(module, imported)}
    assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", sorted(name for name in modules() if name.endswith("__init__")))
def test_package_files_are_empty(module: str) -> None:
    assert file_of(module).read_text(encoding="utf-8").strip() == ""


def test_every_module_that_may_read_checkpoints_exists() -> None:
    assert set(modules()) >= MODULES_THAT_READ_CHECKPOINTS | TORCH_FREE


@pytest.mark.parametrize(
    "names",
    [("server.app", "server.daemon", "server.cli"), ("scheduler.scheduler", *sorted(TORCH_FREE))],
    ids=["front-end", "scheduler"],
)
def test_no_torch_is_loaded(names: tuple[str, ...]) -> None:
    """In a process of its own: the front-end must start in a second and survive whatever torch does."""
    program = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_only_the_settings_read_the_environment() -> None:
    """The engine client hands the environment on to the engine process, without reading it; compiling the kernels, when
    latentd is installed, heeds CXX as every build does."""
    readers = set()
    for module in modules():
        for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(module)
    assert readers <= {"server.settings", "server.engine_client", "model.ops.cpu.build"}
