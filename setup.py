"""Builds the compiled module mfwm_kernels._native with CMake; everything else is in pyproject.toml.

Environment: MFWM_CUDA=ON|OFF|AUTO (AUTO: on if nvcc is found), CMAKE_ARGS (more arguments for CMake).
The build needs neither a GPU nor torch, and does not link torch.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def is_stale(cache: Path) -> bool:
    """Whether a build tree is of another environment, as pip's isolated builds are, whose programs may be gone."""
    if not cache.exists():
        return False
    cached = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    here = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    programs = [cached.get("CMAKE_MAKE_PROGRAM", ""), cached.get("CMAKE_CXX_COMPILER", "")]
    return any(cached.get(name) != value for name, value in here.items()) or not all(map(os.path.exists, programs))


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # Use the programs of the build requirements, even if their environment is not activated.
        path = os.pathsep.join([cmake.CMAKE_BIN_DIR, ninja.BIN_DIR, os.environ.get("PATH", "")])
        configure = [
            "cmake",
            *(["--fresh"] if is_stale(build / "CMakeCache.txt") else []),
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMFWM_CUDA={os.environ.get('MFWM_CUDA', 'AUTO').upper()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = {**os.environ, "PATH": path}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


setup(ext_modules=[Extension("mfwm_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
