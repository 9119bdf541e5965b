"""Builds the compiled module mfwm_kernels._native with CMake; everything else stands in pyproject.toml.

Environment: MFWM_CUDA=ON|OFF|AUTO (AUTO: where nvcc is found), CMAKE_ARGS (more arguments for CMake).
No GPU is looked for, and torch is neither needed nor linked.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(Path(__file__).resolve().parent),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMFWM_CUDA={os.environ.get('MFWM_CUDA', 'AUTO').upper()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[CMakeExtension("mfwm_kernels._native")], cmdclass={"build_ext": CMakeBuild})
