"""small_linear against float64, on every instruction set of this machine, and what happens without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.errors import ConfigError, ResourceError
from arsp.kernels import build, ops, reference

ROWS = (1, 2, 3, 5, 6, 7, 8, 9, 16, 37)
COLUMNS = (1, 8, 40, 97, 1025)
OUTPUTS = (1, 5, 113)
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]


def draw(rows, columns, outputs, x_dtype, w_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(x_dtype)
    return x, torch.randn(outputs, columns, generator=generator).to(w_dtype)


def assert_close_enough(pairs, what):
    """The rule of the project over all results of ``pairs`` (x, weight): at most twice the largest error of plain torch in the
    same precision, plus one float32 rounding of a typical result."""
    ours = theirs = tiny = 0.0
    for x, weight in pairs:
        exact, kernel = x.double() @ weight.double().T, ops.small_linear(x, weight)
        assert kernel.dtype == x.dtype and kernel.shape == exact.shape, f"{what}: {kernel.dtype} {tuple(kernel.shape)}"
        ours = max(ours, (kernel.double() - exact).abs().max().item())
        theirs = max(theirs, (reference.small_linear(x, weight).double() - exact).abs().max().item())
        tiny = max(tiny, torch.finfo(torch.float32).eps * exact.abs().max().item())
    assert ours <= 2 * theirs + tiny, f"{what}: error {ours:.3e} > twice that of plain torch, {theirs:.3e}, plus {tiny:.1e}"


@pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_error_is_at_most_twice_that_of_torch_at_awkward_shapes(compiled, isa, dtypes):
    if compiled.use_isa(isa) != build.ISA[isa]:
        pytest.skip(f"this processor has no {build.ISA[isa]}")
    x_dtype, w_dtype = (getattr(torch, name) for name in dtypes)
    for rows in ROWS:
        for columns in COLUMNS:
            for outputs in OUTPUTS:
                draws = range(1 + 200 // (rows * outputs))  # few results: torch's largest error may be small by luck
                pairs = [draw(rows, columns, outputs, x_dtype, w_dtype, seed) for seed in draws]
                assert_close_enough(pairs, f"M={rows} K={columns} N={outputs} {dtypes} {build.ISA[isa]}")


def test_non_contiguous_and_misaligned_inputs_are_read_correctly(compiled):
    compiled.use_isa(-1)
    wide, weight = draw(3, 196, 50, torch.float32, torch.float32)
    x = wide[:, 1::2]
    assert_close_enough([(x, weight[:, :98].contiguous())], "strided x")
    assert_close_enough([(x, weight[:, :98])], "strided weight")
    shifted = torch.empty(50 * 98 + 1)[1:].view(50, 98).copy_(weight[:, :98])
    assert_close_enough([(x, shifted)], "weight off its 64-byte alignment")


@pytest.mark.parametrize("shape", [(0, 8, 5), (2, 0, 5), (2, 8, 0)])
def test_empty_sizes_give_what_torch_gives(compiled, shape):
    rows, columns, outputs = shape
    x, weight = torch.randn(rows, columns), torch.randn(outputs, columns)
    assert torch.equal(ops.small_linear(x, weight), F.linear(x, weight)), shape
    assert torch.equal(kernels.small_linear(x, weight), F.linear(x, weight)), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_of_a_row_depends_on_neither_the_other_rows_nor_the_threads(compiled, dtype):
    compiled.use_isa(-1)
    x, weight = draw(16, 1025, 301, dtype, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = ops.small_linear(x, weight)
        for num in range(1, 17):
            assert torch.equal(ops.small_linear(x[:num], weight), together[:num]), f"{num} rows differ from 16"
        torch.set_num_threads(1)
        assert torch.equal(ops.small_linear(x, weight), together), "1 thread differs from 2"
    finally:
        torch.set_num_threads(threads)


def test_wrong_shapes_and_dtypes_are_refused_by_name(compiled):
    with pytest.raises(RuntimeError, match=r"expected x \(M, K\) and weight \(N, K\), got \[2, 3\] and \[5, 4\]"):
        ops.small_linear(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16"):
        ops.small_linear(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_op(compiled, dtype):
    torch.library.opcheck(ops.small_linear, draw(2, 40, 5, dtype, dtype))


def test_compiled_graphs_contain_the_op(compiled):
    x, weight = draw(2, 40, 5, torch.float32, torch.float32)
    kernels.small_linear(x, weight)  # back ends are chosen outside the graph
    graph = torch.compile(kernels.small_linear, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(graph(x, weight), kernels.small_linear(x, weight))


def test_public_function_takes_leading_dimensions_and_leaves_training_to_torch(compiled):
    x, weight = draw(6, 40, 5, torch.float32, torch.float32)
    flat = kernels.small_linear(x, weight)
    assert torch.equal(kernels.small_linear(x.view(2, 3, 40), weight), flat.view(2, 3, 5))
    many = torch.randn(4, 30, 40)
    assert torch.equal(kernels.small_linear(many, weight), F.linear(many, weight)), "more than MAX_ROWS rows must be torch's"
    weight.requires_grad_()
    kernels.small_linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(5, 40)), "gradient of the weight"


def test_backend_can_be_chosen_and_is_reported(compiled):
    x, weight = draw(2, 97, 13, torch.float32, torch.float32)
    try:
        kernels.set_backend("reference")
        assert torch.equal(kernels.small_linear(x, weight), F.linear(x, weight))
        assert kernels.backends() == [{"op": op, "backend": "reference", "reason": "chosen with --kernels reference"} for op in kernels.OPS]
        kernels.set_backend("cpu")
        assert torch.equal(kernels.small_linear(x, weight), ops.small_linear(x, weight))
        rows = kernels.backends()
        assert [row["op"] for row in rows] == list(kernels.OPS)
        for row in rows:
            assert row["backend"] == "cpu" and any(row["reason"].startswith(name) for name in build.ISA), row
        with pytest.raises(ConfigError) as caught:
            kernels.set_backend("refrence")
        assert "Did you mean: reference" in caught.value.hint
    finally:
        kernels.set_backend("auto")


def test_cuda_is_refused_rather_than_ignored():
    with pytest.raises((ResourceError, ConfigError), match="--kernels cuda"):
        kernels.set_backend("cuda")


PROBE = """
import json, sys, torch
from arsp import kernels
from arsp.errors import ArspError
before = kernels.backends()
x, w = torch.randn(2, 40), torch.randn(5, 40)
same = torch.equal(kernels.small_linear(x, w), torch.nn.functional.linear(x, w))
code = 0
try:
    kernels.set_backend("cpu")
except ArspError as error:
    code = error.exit_code
print(json.dumps({"before": before, "after": kernels.backends(), "same": same, "code": code}))
"""


def probe(tmp_path, **environment):
    import json

    env = {**os.environ, "ARSP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **environment}
    root = Path(kernels.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_compiler_torch_is_used_and_the_reason_is_reported(tmp_path):
    seen = probe(tmp_path, PATH=str(tmp_path), CXX="")
    assert seen["same"], "the fallback is torch's linear"
    assert seen["code"] == 5, "--kernels cpu insists: exit code 5 (resources)"
    for when in ("before", "after"):
        for row in seen[when]:
            assert row["backend"] == "reference" and "g++ is not on the PATH" in row["reason"], f"{when}: {row}"


def test_failing_compiler_is_reported_with_its_first_error_and_leaves_nothing_behind(tmp_path):
    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'g++ fake 1.0' && exit 0\necho 'x.cpp:1: error: out of ideas' >&2\nexit 1\n")
    fake.chmod(0o755)
    seen = probe(tmp_path, PATH=f"{fake.parent}:{os.environ['PATH']}", CXX="")
    assert seen["same"] and "g++ fake 1.0" in seen["before"][0]["reason"], seen
    for row in seen["after"]:
        assert row["backend"] == "reference" and "error: out of ideas" in row["reason"], row
    left = [path.name for path in (tmp_path / "cache" / "kernels").iterdir() if path.suffix != ".lock"]
    assert left == [], f"left in the cache: {left}"


def test_importing_the_package_compiles_nothing(tmp_path):
    env = {**os.environ, "ARSP_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import arsp.kernels"], env=env, check=True, cwd=Path(kernels.__file__).parents[2])
    assert list(tmp_path.iterdir()) == []


def test_library_name_follows_the_sources(tmp_path, monkeypatch, compiled):
    before = build.library_path()
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.library_path() == before
    (tmp_path / "small_linear.cpp").write_text("// changed\n")
    assert build.library_path() != before
