"""Everything static is in pyproject.toml. With ARSP_BUILD_EXT=1 the CUDA kernels are compiled into the package, for all architectures;
without it nothing is compiled, and installing needs no compiler."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WITH_KERNELS = os.environ.get("ARSP_BUILD_EXT") == "1"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        sys.path.insert(0, str(ROOT))  # arsp.errors; the package of the kernels itself needs torch
        spec = importlib.util.spec_from_file_location("nvcc", ROOT / "arsp" / "kernels" / "nvcc.py")
        nvcc = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nvcc)
        target = nvcc.prebuilt_library()
        if not self.editable_mode:
            target = Path(self.build_lib) / target.relative_to(ROOT)
        nvcc.compile_library(target)


class WithBinary(Distribution):
    def has_ext_modules(self) -> bool:  # the wheel is one for this platform
        return True


if WITH_KERNELS:
    setup(cmdclass={"build_py": BuildWithKernels}, distclass=WithBinary)
else:
    setup()
