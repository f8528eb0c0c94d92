"""The CUDA kernels compiled for the CPU: csrc/cuda/*.cu with emulate.h in place of the device."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

from arsp.kernels import build, cuda, nvcc

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden",
    "-DARSP_EMULATE", f"-I{HERE}",
)  # fmt: skip


def emulated_ops() -> cuda.CudaOps:
    """The ops on CPU tensors, compiled once per state of the sources. Skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    sources = [path for path in nvcc.source_files() if path.suffix == ".cu"] + [HERE / "emulate.cpp"]
    digest = hashlib.sha256(" ".join(FLAGS).encode() + build.compiler_version().encode())
    for path in (*nvcc.source_files(), HERE / "emulate.h", HERE / "emulate.cpp"):
        digest.update(path.read_bytes())

    def make(target: Path) -> None:
        objects = []
        for source in sources:
            objects.append(target.with_name(f"{target.stem}-{source.stem}.o"))
            subprocess.run([compiler, "-x", "c++", *FLAGS, "-c", str(source), "-o", str(objects[-1])], check=True)
        subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(target.with_suffix(".tmp"))], check=True)
        target.with_suffix(".tmp").rename(target)
        for path in objects:
            path.unlink()

    return cuda.CudaOps(build.cached(build.cache_root() / "kernels" / f"emulated-{digest.hexdigest()[:20]}.so", make), emulated=True)


class Target:
    """Where a test runs an op: ``target(name, *arguments)`` with CPU tensors in and out. What the op writes to starts as NaN or 77."""

    def __init__(self, order: int | None):
        self.order = order
        if order is None:
            cuda.load_library()
        else:
            self.ops = emulated_ops()

    def __call__(self, name, *arguments):
        if self.order is not None:
            self.ops.library.arsp_emulate_order(self.order)
            return getattr(self.ops, name)(*arguments)
        moved = [tree_map_only(torch.Tensor, torch.Tensor.cuda, value) for value in arguments]
        op = getattr(torch.ops.arsp, name).default
        found = op(*moved)
        for value, there, argument in zip(arguments, moved, op._schema.arguments, strict=False):
            if argument.alias_info is not None:  # the op writes to it
                value.copy_(there)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(x.cpu() for x in found)


@pytest.fixture
def target(request, monkeypatch):
    plain = cuda.empty

    def poisoned(shape, dtype, like):
        return plain(shape, dtype, like).fill_(torch.nan if dtype.is_floating_point else 77)

    monkeypatch.setattr(cuda, "empty", poisoned)
    return Target(request.param)


TARGETS = pytest.mark.parametrize(
    "target",
    [pytest.param(0, id="emulated"), pytest.param(1, id="backwards"), pytest.param(None, id="cuda", marks=pytest.mark.gpu)],
    indirect=True,
)  # the emulated device runs the threads of a block in their order, or backwards


def close_codes(found, wanted, what, exact=False):
    """8-bit rows that are equal; or scales within 2e-6 and codes that differ by single steps in one entry of a hundred, because sums in
    another order move ties."""
    rtol, atol, step = (0, 0, 0) if exact else (2e-6, 1e-9, 1)
    torch.testing.assert_close(found[1], wanted[1], rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}, scales: {m}")
    apart = (found[0].int() - wanted[0].int()).abs()
    few = apart.count_nonzero() <= step * max(1, apart.numel() // 100)
    assert few and apart.max() <= step, f"{what}: {apart.count_nonzero()} codes of {apart.numel()} differ, by {apart.max()}"
