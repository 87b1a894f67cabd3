"""The deployment files: linted by the field's own tools, and held to what the daemon really has."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings, flag_of

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
YAML_FILES = sorted(ROOT.glob("*.yml")) + sorted((ROOT / "deploy").rglob("*.y*ml"))
PORT = Settings().port
# Paths that the daemon answers without a key; tests/test_docs.py checks them against the real application.
PROBES = {"/health", "/ready", "/metrics"}


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a linter of the environment the tests run in."""
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"{name} has no build for this machine")
    return subprocess.run([program, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60)


def instructions(keyword: str) -> list[str]:
    """Arguments of every such instruction of the Dockerfile, continuation lines joined."""
    return re.findall(rf"(?m)^{keyword}\s+(.*)$", DOCKERFILE.replace("\\\n", ""))


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/k8s/latentd.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def check_command(words: list[str]) -> None:
    """`serve` with flags that exist; in a container it must not listen on loopback only."""
    assert words[0] == "serve"
    assert words[words.index("--host") + 1] == "0.0.0.0"
    flags = {flag_of(name) for name in Settings.model_fields} | {"--config"}
    assert {word for word in words if word.startswith("--")} <= flags


def check_environment(names: set[str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | {ENV_PREFIX + "CONFIG"}
    assert {name for name in names if name.startswith(ENV_PREFIX)} <= known


def test_hadolint() -> None:
    result = tool("hadolint", "--failure-threshold", "warning", "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_compose_schema() -> None:
    result = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert result.returncode == 0, result.stdout


def test_yamllint() -> None:
    result = tool("yamllint", "--strict", *[str(file.relative_to(ROOT)) for file in YAML_FILES])
    assert result.returncode == 0, result.stdout


def test_the_image_runs_the_daemon_as_a_user_without_rights() -> None:
    (entrypoint,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert yaml.safe_load(entrypoint) == ["latentd"]
    assert "latentd" in scripts
    check_command(yaml.safe_load(command))
    assert instructions("USER") == ["10001:10001"]
    assert instructions("EXPOSE") == [str(PORT)]
    assert 'CMD ["python", "-m", "server.healthcheck"]' in instructions("HEALTHCHECK")[0]
    assert {"cpu", "cuda"} <= {line.split(" AS ")[1] for line in instructions("FROM")}


def test_the_image_says_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"VERSION={project['version']}" in instructions("ARG")


def test_the_build_finds_its_files_and_only_those() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    sent = {line[1:] for line in ignore if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert sent == packages | {"constraints.txt", "pyproject.toml", project["project"]["readme"], "LICENSE"}
    assert all((ROOT / name).exists() for name in sent)
    assert "*" in ignore


def test_the_build_installs_every_dependency(tmp_path: Path) -> None:
    """Runs the step of the Dockerfile that takes the list of dependencies out of pyproject.toml."""
    (step,) = {line.split(" && ")[0].strip() for line in instructions("RUN") if "tomllib" in line}
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python, *rest = shlex.split(step.split(">")[0])
    assert python == "python"
    result = subprocess.run([sys.executable, *rest], cwd=tmp_path, text=True, capture_output=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert result.stdout.splitlines() == project["dependencies"]


@pytest.mark.parametrize("name", ["latentd", "latentd-gpu"])
def test_a_compose_service_is_locked_down_and_lets_answers_end(name: str) -> None:
    service = compose()["services"][name]
    check_environment(set(service["environment"]))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert service["build"]["target"] in {line.split(" AS ")[1] for line in instructions("FROM")}
    assert int(service["stop_grace_period"].removesuffix("s")) >= Settings().drain_timeout + 30
    assert service["healthcheck"]["test"][1:] == ["python", "-m", "server.healthcheck"]


def test_compose_starts_one_daemon_unless_asked_for_the_gpu() -> None:
    services = compose()["services"]
    assert [name for name, service in services.items() if "profiles" not in service] == ["latentd", "prometheus"]
    assert services["latentd-gpu"]["networks"]["default"]["aliases"] == ["latentd"]


def test_prometheus_scrapes_the_daemon_that_compose_starts() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": [f"latentd:{PORT}"]}]
    mounts = [volume.split(":")[0] for volume in compose()["services"]["prometheus"]["volumes"]]
    assert all((ROOT / mount).exists() for mount in mounts if mount.startswith("./"))


def test_kubernetes_probes_ports_and_time_to_end() -> None:
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["args"])
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    check_environment(set(environment))
    assert pod["enableServiceLinks"] is False  # else LATENTD_PORT becomes tcp://...
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["path"] for probe in probes} <= PROBES
    assert {probe["port"] for probe in probes} == {"http"}
    drain = float(environment["LATENTD_DRAIN_TIMEOUT"])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= drain + pause + 15
    labels = kubernetes()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kubernetes()["Service"]["spec"]["selector"].items() <= labels.items()
    assert kubernetes()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_systemd_unit() -> None:
    unit = (ROOT / "deploy/systemd/latentd.service").read_text(encoding="utf-8")
    assert "RestartPreventExitStatus=2" in unit
    stop = re.search(r"TimeoutStopSec=(\d+)", unit)
    assert stop is not None
    assert int(stop[1]) >= Settings().drain_timeout + 30
    check_environment(set(re.findall(rf"{ENV_PREFIX}\w+", unit)))


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = (ROOT / "deploy/systemd/latentd.service").read_text(encoding="utf-8")
    file = tmp_path / "latentd.service"
    file.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", unit), encoding="utf-8")
    drop_in = tmp_path / "latentd.service.d"
    shutil.copytree(ROOT / "deploy/systemd/latentd.service.d", drop_in)
    result = subprocess.run(["systemd-analyze", "verify", str(file)], text=True, capture_output=True, timeout=60)
    # It exits with 0 on unknown keys: whatever it says is a fault, unless it speaks of other units of the machine.
    said = [line for line in result.stderr.splitlines() if "latentd" in line]
    assert said == []
