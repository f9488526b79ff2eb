"""Compile the kernels, and tag the wheel by what it holds. All else is in pyproject.toml."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.extension import Extension

WINDOWS = sys.platform == "win32"


class BuildKernels(build_ext):
    """A plain shared library, compiled by gcc or clang: onnxruntime loads it, not Python.

    So neither Python's headers nor its compiler flags are used. The environment variable CC names
    the compiler, which may be one for another CPU.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path below the build folder."""
        return str(Path(*fullname.split("."))) + (".dll" if WINDOWS else ".so")

    def build_extension(self, ext: Extension) -> None:
        """Compile and link in one step.

        Raises:
            CompileError: There is no compiler, or it fails. The extension is optional, so
                setuptools prints a warning and builds the package without the library.
        """
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an earlier build's, if this one fails
        # Linkers for Windows leave other files beside the library.
        made = Path(self.build_temp, target.name)
        made.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC") or ("clang" if WINDOWS else "cc")
        flags = [*ext.extra_compile_args, *([] if WINDOWS else ["-fPIC"]), "-shared"]
        words = [*flags, "-o", str(made), *ext.sources]
        if WINDOWS:  # its own rules: a backslash is no quote
            command = f"{compiler} {subprocess.list2cmdline(words)}"
        else:
            command = [*shlex.split(compiler), *words]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)


class TagWheel(bdist_wheel):
    """One wheel serves every Python on a platform; without the library, on every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of Python, ABI and platform."""
        (library,) = self.get_finalized_command("build_ext").get_outputs()
        if not Path(library).is_file():
            return "py3", "none", "any"
        # Python for macOS may serve two CPUs; the compiler makes code for one.
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


setup(cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel})
