"""Nothing that is read, from a socket, a file or a request, can become code: the packages lack the means."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [file for package in ("model", "scheduler", "server") for file in sorted((ROOT / package).rglob("*.py"))]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
LISTENERS = {"zmq", "multiprocessing", "xmlrpc", "socketserver", "Pyro4", "Pyro5", "rpyc"}
"""What others have opened by accident: all we listen on is the HTTP port."""
LOADERS = {"yaml", "transformers", "importlib.machinery", "runpy", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {
    ("torch", "load"),
    ("torch", "hub"),
    ("np", "load"),
    ("numpy", "load"),
    ("np", "fromregex"),
    ("os", "system"),
    ("os", "popen"),
    ("torch", "package"),
}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [str(node.module)]
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(f"{node.lineno}: {name}()")
                continue
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in METHODS:
                found.append(f"{node.lineno}: {owner}.{attribute}")
                continue
            case ast.keyword(arg="shell" | "trust_remote_code" | "allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{value.lineno}: {node.arg}=")
                continue
            case _:
                continue
        banned = UNPICKLERS | LISTENERS | LOADERS
        found += [f"{node.lineno}: import {name}" for name in names if {name, name.split(".")[0]} & banned]
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_source_has_no_such_means(file: Path) -> None:
    assert offences(file.read_text(encoding="utf-8")) == []


def test_templates_are_compiled_in_the_sandbox_only() -> None:
    text = {file.name: file.read_text(encoding="utf-8") for file in SOURCES}
    assert [name for name, source in text.items() if "jinja2" in source] == ["chat_template.py"]
    assert "ImmutableSandboxedEnvironment(" in text["chat_template.py"]
    assert not any(word in text["chat_template.py"] for word in (" Environment(", " Template(", "NativeEnvironment"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "load = torch.load",
        "eval('1')",
        "exec(text)",
        "subprocess.run('ls', shell=True)",
        "np.load('x', allow_pickle=True)",
        "from multiprocessing.connection import Client",
        "import yaml",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
    ],
)
def test_the_rule_sees_them(source: str) -> None:
    assert offences(source)
