"""Packs libett_kernels.so and its header into the package, in this order of preference: the file that
ETT_KERNELS_LIBRARY names, what kernels/Makefile builds if there is an nvcc, an earlier build. Without any of them the package
installs all the same and looks for the library when it is imported."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "kernels"


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), ROOT / ".cuda/nvidia/cu13", "/usr/local/cuda"]  # as in the Makefile
    named = [os.environ.get("NVCC", "nvcc"), *(str(Path(home, "bin/nvcc")) for home in homes if home)]
    return any(shutil.which(path) for path in named)


def find_library():
    named = os.environ.get("ETT_KERNELS_LIBRARY")
    if named:
        return Path(named)
    if KERNELS.is_dir() and find_nvcc():
        subprocess.run(["make", "-C", KERNELS, "-j", str(os.cpu_count()), "build/libett_kernels.so"], check=True)
    built = KERNELS / "build/libett_kernels.so"
    return built if built.is_file() else None


class BuildKernels(build_py):
    def run(self):
        super().run()
        library = find_library()
        if library is None:
            self.warn("no nvcc and no libett_kernels.so: ETT_KERNELS_LIBRARY has to name one when ett_kernels is imported")
        elif not self.editable_mode:
            header = Path(os.environ.get("ETT_KERNELS_HEADER") or KERNELS / "include/ett_kernels.h")
            for file, variable in ((library, "ETT_KERNELS_LIBRARY"), (header, "ETT_KERNELS_HEADER")):
                if not file.is_file():
                    raise SystemExit(f"{file} is not a file: {variable} has to name one")
            folder = Path(self.build_lib, "ett_kernels/lib")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, folder / "libett_kernels.so")
            shutil.copy2(header, folder / "ett_kernels.h")


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, but not on the version of Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel})
