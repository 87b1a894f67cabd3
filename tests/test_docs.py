"""The documents say what the code does: generated parts are fresh, and nothing that a reader looks for is missing."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from server.middleware import OPEN_PATHS
from server.settings import ENV_PREFIX, Settings, flag_of
from server.supervisor import Supervisor
from tools.parameters import CHAT, COMPLETIONS, rows
from tools.write_docs import FILES, PARTS, ROOT, updated

README = (ROOT / "README.md").read_text(encoding="utf-8")
STRUCTURE = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
DOCUMENTS = (*FILES, ROOT / "CHANGELOG.md", ROOT / "tools/builtin_model/README.md")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_generated_parts_are_fresh(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text == updated(text), "run `make docs`"


def test_every_generated_part_is_in_a_document() -> None:
    used = re.findall(r"<!-- generated: (\w+) -->", "".join(file.read_text(encoding="utf-8") for file in FILES))
    assert set(used) == set(PARTS)


def test_every_option_is_documented() -> None:
    configuration = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        assert f"`{ENV_PREFIX}{name.upper()}`" in configuration
        assert name == "model" or f"`{flag_of(name)}`" in README


def test_every_flag_of_a_document_exists() -> None:
    known = {flag_of(name) for name in Settings.model_fields}
    known |= {"--config", "--print-config", "--json", "--device-memory", "--max-num-batched-tokens"}
    text = README + (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--"} <= known


def test_endpoints_and_metrics_are_documented() -> None:
    for path in (*OPEN_PATHS, "/v1/chat/completions", "/v1/completions", "/v1/models", "/openapi.json"):
        assert path in API, path
    metrics = Metrics("m", Supervisor(Settings().to_engine_config()))
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert f"`{family.name}" in API


def test_every_parameter_has_a_status() -> None:
    """`rows` raises for a name without one; here, that the table is whole and knows all three."""
    listed = {name.strip("`"): (chat, completions) for name, chat, completions in rows()}
    assert listed.keys() == {*CHAT, *COMPLETIONS}
    assert {status for pair in listed.values() for status in pair} == {"honoured", "refused", "ignored", "-"}
    assert all(f"| `{name}` | {' | '.join(pair)} |" in API for name, pair in listed.items())


def test_every_file_has_its_sentence() -> None:
    for package in ("server", "scheduler", "model"):
        _, _, section = STRUCTURE.partition(f"`{package}/`, ")
        table = section.partition("\n\n|")[2].partition("\n\n")[0]
        rows = dict(re.findall(r"(?m)^\| `([\w/.]+)` \| (.+) \|$", table))
        files = {
            str(file.relative_to(ROOT / package))
            for file in (ROOT / package).rglob("*.py")
            if file.name != "__init__.py"
        }
        assert files == {name for name in rows if name.endswith(".py")}


def test_every_path_a_document_names_exists() -> None:
    for file in DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (file.parent / link).exists(), f"{file.name}: {link}"
        for path in re.findall(r"`((?:server|scheduler|model|tests|tools|docs|deploy|benchmarks)/[\w/.-]*)`", text):
            assert (ROOT / path).exists(), f"{file.name}: {path}"


def test_make_targets_a_document_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for file in DOCUMENTS:
        for target in re.findall(r"(?m)(?:^|`)make ([a-z0-9-]+)", file.read_text(encoding="utf-8")):
            assert re.search(rf"(?m)^{target}:", makefile), f"{file.name}: make {target}"


def test_the_changelog_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"(?m)^\.PHONY: (.*)$", makefile)
    assert phony is not None
    assert {line.split()[0] for line in shown.splitlines()} == set(phony[1].split())
