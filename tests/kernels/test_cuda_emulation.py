"""The emulated device itself: it runs right kernels rightly and notices wrong ones."""

import ctypes
import subprocess

import pytest
import torch
from cuda_emulation import FLAGS, HERE

from arsp.errors import ResourceError
from arsp.kernels import build, nvcc


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    try:
        compiler = build.compiler()
    except ResourceError as error:
        pytest.skip(error.message)
    path = tmp_path_factory.mktemp("examples") / "examples.so"
    subprocess.run([*compiler, *FLAGS, f"-I{nvcc.SOURCES}", "-shared", str(HERE / "examples.cpp"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.what.restype = ctypes.c_char_p

    def run(name, *arguments):
        values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        return getattr(library, f"{name}_example")(*values), library.what().decode()

    return run


@pytest.mark.parametrize("order", [0, 1])
def test_a_missing_barrier_shows_in_one_order_of_the_threads_or_another(examples, order):
    wanted, found = (torch.arange(64) + 1) % 64, torch.full((64,), -7, dtype=torch.int32)
    assert examples("rotate", found, 1, order)[0] == 0 and torch.equal(found.long(), wanted)
    assert examples("rotate", found, 0, order)[0] == 0 and not torch.equal(found.long(), wanted)


def test_barriers_that_only_some_threads_reach_are_an_error(examples):
    for name, arguments in (("half_a_barrier", ()), ("half_a_warp", (torch.zeros(32, dtype=torch.int32),))):
        status, message = examples(name, *arguments)
        assert status == 999 and "not reached by all" in message, name
    found = torch.zeros(64, dtype=torch.int32)
    assert examples("rotate", found, 1, 0)[0] == 0 and found[0] == 1, "the next launch runs again"


def test_asynchronous_copies_arrive_at_the_wait_and_not_before(examples):
    data, found = torch.randint(100, (32, 4), dtype=torch.int32), torch.empty(32, 4, dtype=torch.int32)
    examples("copied", data, found, 1)
    assert torch.equal(found[::2], data[::2]) and not found[1::2].any(), "zeros where the copy is not valid"
    examples("copied", data, found, 0)
    assert (found == -1431655766).all(), "bytes of 0xaa"


def test_shared_memory_starts_as_nan_in_every_block(examples):
    found = torch.zeros(32)
    examples("unwritten", found)
    assert found.isnan().all()


def test_reductions_and_counts_reach_all_threads(examples):
    x = torch.randn(96)
    found, count = torch.empty(96), torch.empty(96, dtype=torch.int32)
    examples("sums", x, found, count)
    assert (found == found[0]).all() and torch.allclose(found[0], x.sum(), atol=1e-5)
    assert (count == (x > 0).sum() + 1000 * (x > 1).sum()).all()


def test_the_product_of_bytes_is_that_of_the_fragments_of_ptx(examples):
    a, b = torch.randint(-128, 128, (16, 32), dtype=torch.int8), torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    found = torch.empty(16, 8, dtype=torch.int32)
    examples("product", a, b, found)
    assert torch.equal(found.long(), a.long() @ b.long())
