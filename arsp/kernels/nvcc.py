"""Compiles csrc/cuda with nvcc. No header of torch is used and nothing of Python, so one library serves every torch from 2.9 on.

Loaded by setup.py where torch may be missing: this file imports the standard library and :mod:`arsp.errors` alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from arsp.errors import ResourceError

SOURCES = Path(__file__).parent / "csrc" / "cuda"
PREBUILT = Path(__file__).parent / "prebuilt"  # libraries that ARSP_BUILD_EXT=1 puts into the package
ARCHITECTURES = ("80", "86", "89", "90a")  # with machine code of their own; newer devices compile PTX of 90 when it is loaded
PTX = "90"
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden")
LEAST_VERSION = (12, 4)
RESOURCES = ("registers", "shared", "stack", "spill_stores", "spill_loads")  # of a kernel; all but the first in bytes
COMPILE_SECONDS = 900  # for one file and all architectures


def find_nvcc() -> Path:
    """``$CUDACXX``, ``$CUDA_HOME/bin/nvcc``, nvcc on the PATH or in /usr/local/cuda. ResourceError: none, or older than CUDA 12.4."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for command in (os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME") and f"{home}/bin/nvcc", "nvcc", f"{home}/bin/nvcc"):
        found = shutil.which(command) if command else None
        if found:
            version = nvcc_version(found)
            if version < LEAST_VERSION:
                raise ResourceError(f"{found} is of CUDA {version[0]}.{version[1]}", "CUDA 12.4 or later compiles the kernels.")
            return Path(found)
    raise ResourceError("no CUDA compiler: nvcc is not on the PATH", "Install the CUDA toolkit, or set CUDA_HOME.")


@lru_cache
def nvcc_version(path: str) -> tuple[int, int]:
    """The CUDA release of an nvcc."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError(f"{path} does not run: {error}") from error
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise ResourceError(f"{path} --version names no release")
    return int(release[1]), int(release[2])


def source_files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh"))


def source_digest() -> str:
    """Hash of sources and flags."""
    digest = hashlib.sha256(" ".join((*FLAGS, *ARCHITECTURES, PTX)).encode())
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def prebuilt_library() -> Path:
    """Where the library of these sources is in a package that was built with one."""
    return PREBUILT / f"cuda-{source_digest()}-{platform.machine()}.so"


def targets(architectures: Sequence[str], ptx: bool) -> list[str]:
    """The -gencode options of nvcc."""
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return [*options, f"-gencode=arch=compute_{PTX},code=compute_{PTX}"] if ptx else options


def compile_object(source: Path, architectures: Sequence[str], target: Path, ptx: bool = False) -> str:
    """Compile one file; returns what the compiler said (registers and spills of every kernel). ResourceError: it failed."""
    command = [str(find_nvcc()), *FLAGS, *targets(architectures, ptx), "-c", str(source), "-o", str(target)]
    return _run(command)


def compile_library(target: Path, architectures: Sequence[str] = ARCHITECTURES, ptx: bool = True) -> None:
    """Compile and link all kernels; ``target`` appears whole, by a rename. ResourceError: no nvcc, or it failed."""
    nvcc = str(find_nvcc())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}.") as work:
        sources = [path for path in source_files() if path.suffix == ".cu"]
        objects = [Path(work) / f"{path.stem}.o" for path in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source, path: compile_object(source, architectures, path, ptx), sources, objects))
        library = Path(work) / "library.so"
        _run([nvcc, "-shared", "-cudart=static", *map(str, objects), "-o", str(library)])
        os.replace(library, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"compiling the CUDA kernels failed: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines() or ["no message"]
        raise ResourceError(f"compiling the CUDA kernels failed (nvcc exit {done.returncode}): {lines[0].strip()[:300]}")
    return done.stderr


def resources(text: str) -> list[dict[str, str | int]]:
    """What ``-Xptxas -v`` says, one line a kernel and architecture: registers and bytes of static shared memory, stack and spills."""
    found: list[dict[str, str | int]] = []
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            found.append(
                {"kernel": entry[1], "arch": entry[2], "registers": 0, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
            )
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[-1] |= {"stack": int(frame[1]), "spill_stores": int(frame[2]), "spill_loads": int(frame[3])}
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1] |= {"registers": int(used[1]), "shared": int(shared[1]) if shared else 0}
    for entry, name in zip(found, _readable([str(entry["kernel"]) for entry in found]), strict=True):
        entry["kernel"] = name
    return found


def _readable(symbols: list[str]) -> list[str]:
    """Names of kernels without namespaces and parameters, where c++filt is there; else the symbols."""
    if shutil.which("c++filt") is None or not symbols:
        return symbols
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    plain = [re.sub(r"\(anonymous namespace\)::|\((?:bool|int)\)|^void ", "", line) for line in text.splitlines()]
    return [line.split("(")[0] for line in plain]
