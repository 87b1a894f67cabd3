"""Everything else is in pyproject.toml; here, that the CPU kernels are compiled, and that they are optional."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = Path("model/ops/cpu")


class BuildKernels(build_ext):
    """One library for all versions of Python, made by the same recipe as `python -m model.ops.cpu.build`."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        recipe = runpy.run_path(str(CPU / "build.py"))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            recipe["build"](library)
        except recipe["BuildError"] as error:
            library.unlink(missing_ok=True)
            raise CompileError(f"{error}\nlatentd works without its CPU kernels, but several times slower") from error


class Wheel(bdist_wheel):
    """The library knows nothing of Python, so that one wheel serves all its versions on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "model.ops.cpu.libkernels",
    sources=sorted(str(file) for file in CPU.glob("kernels/*.cpp")),
    depends=sorted(str(file) for file in CPU.glob("kernels/*.h")),
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
