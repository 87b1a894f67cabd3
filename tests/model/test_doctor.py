"""What `latentd doctor` finds: on this machine, and where something is missing."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from model import doctor
from model.ops.cpu import library


def found() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_every_part_of_the_machine_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main()
    names = [line[6:20].strip() for line in capsys.readouterr().out.splitlines()]
    assert [name for name in names if name != "instructions"] == [
        *("latentd", "python", "torch", "gpu", "cpu", "kernels", "memory", "open files")
    ]


def test_the_chosen_instruction_set_stays_chosen() -> None:
    kernels = library.library()
    if kernels is None:
        pytest.skip("the kernels are not built")
    chosen = kernels.isa
    text = found()["instructions"].text
    assert text.startswith(f"{chosen} (chosen)")
    assert text.endswith("portable") or chosen == "portable"
    assert kernels.isa == chosen


def test_without_kernels_a_line_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libkernels.so")
    assert doctor.main() == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AMISS")]
    assert "kernels" in line
    assert "several times slower" in line


def test_without_torch_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert found()["torch"].amiss


@pytest.mark.parametrize(("limit", "amiss"), [(256, True), (1024, False), (resource.RLIM_INFINITY, False)])
def test_few_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, amiss: bool) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert found()["open files"].amiss is amiss
