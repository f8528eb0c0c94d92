"""Compiles csrc/cpu once per machine with plain g++ and loads it. Installing arsp needs no compiler; nothing happens at import.

The library lies in ``$ARSP_CACHE/kernels`` (default ~/.cache/arsp/kernels) under a name made of everything that decides its
bytes: sources, flags, compiler version, torch version, architecture. A lock file lets one process compile while others wait;
the result appears by a rename, so it is complete or absent.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from arsp.errors import ResourceError

SOURCES = Path(__file__).parent / "csrc" / "cpu"
ISA = ("portable", "AVX2", "AVX-512", "AVX-512 with VNNI", "AVX-512 with BF16")  # what arsp_use_isa of the library returns
COMPILE_FLAGS = ("-std=gnu++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp", "-Wno-psabi", "-Wno-attributes")
COMPILE_SECONDS = 300  # give up after this long

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """``$ARSP_CACHE``, or ~/.cache/arsp."""
    return Path(os.environ.get("ARSP_CACHE") or Path.home() / ".cache" / "arsp")


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, or g++ on the PATH. ResourceError where there is none."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise ResourceError(f"no C++ compiler: {command[0]} is not on the PATH", "Install g++, or set CXX to a C++20 compiler.")
    return command


@lru_cache
def _compiler_version(command: tuple[str, ...], path: str) -> str:
    """First line of ``--version``. ``path`` is $PATH: the same name may be another program after it changes."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ResourceError(f"the C++ compiler {command[0]} does not run: {error}") from error


def compiler_version() -> str:
    return _compiler_version(tuple(compiler()), os.environ.get("PATH", ""))


def _source_files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))


def library_path() -> Path:
    """Where the library of this machine's compiler, torch and sources is, or will be."""
    digest = hashlib.sha256()
    for part in (torch.__version__, compiler_version(), " ".join(COMPILE_FLAGS), platform.machine()):
        digest.update(part.encode() + b"\0")
    for path in _source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache_root() / "kernels" / f"cpu-{digest.hexdigest()[:20]}.so"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; the system drops it when the process ends."""
    try:
        import fcntl
    except ImportError as error:
        raise ResourceError("kernels are compiled on Linux and macOS only") from error
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"compiling the kernels failed: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines() or ["no message"]
        raise ResourceError(f"compiling the kernels failed ({command[0]} exit {done.returncode}): {lines[0].strip()[:300]}")


def _compile(target: Path) -> None:
    """Compile and link every source into ``target``.

    OpenMP is used when compiling but not linked: the symbols then come from the copy that torch has loaded, and there is one
    pool of threads, the one that ``torch.set_num_threads`` sizes.
    """
    package = Path(torch.__file__).parent
    work = target.with_suffix(".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        objects = {str(path): str(work / f"{path.stem}.o") for path in _source_files() if path.suffix == ".cpp"}
        command = [*compiler(), *COMPILE_FLAGS, "-I", str(package / "include"), "-c"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: _run([*command, source, "-o", objects[source]]), objects))
        libraries = ["-L", str(package / "lib"), "-ltorch_cpu", "-lc10"]
        _run([*compiler(), "-shared", *objects.values(), *libraries, "-o", str(work / "library.so")])
        os.replace(work / "library.so", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cached(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made now by ``make(target)`` if it is missing, while other processes wait. ResourceError: the cache is not writable."""
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                make(target)
    except OSError as error:
        message = f"cannot write the kernel cache {target.parent}: {error.strerror}"
        raise ResourceError(message, "Set ARSP_CACHE to a writable folder.") from error
    return target


def ensure_library() -> Path:
    """Path of the library, compiled now if this machine has none. ResourceError says why it cannot be."""

    def make(target: Path) -> None:
        log.warning("compiling the CPU kernels with %s, once (10 to 30 s)", compiler_version())
        started = time.perf_counter()
        _compile(target)
        log.info("compiled %s in %.1f s", target, time.perf_counter() - started)

    return cached(library_path(), make)


_loaded: dict[Path, ctypes.CDLL] = {}


def load_library() -> str:
    """Compile if needed, load, and return the instruction set in use (an element of ``ISA``)."""
    if not _loaded:
        import arsp.kernels.ops  # noqa: F401  the schemas come first

        path = ensure_library()
        try:
            torch.ops.load_library(str(path))
            _loaded[path] = ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"{path} does not load: {error}", "Delete it; it is compiled again at the next use.") from error
    return use_isa(-1)


def use_isa(index: int) -> str:
    """Make the loaded library use ``ISA[index]`` (or the best one below it that the processor has; -1: the best). For tests."""
    (library,) = _loaded.values()
    return ISA[library.arsp_use_isa(index)]


def require_compiler(device: torch.device | str, option: str) -> None:
    """ResourceError where torch.compile does not work, that is without a C++ compiler or, for CUDA, without Triton. ``option``: what asks
    for it."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"{option}: torch.compile does not work here: {reason}", "Drop it, or install a C++ compiler.") from error
