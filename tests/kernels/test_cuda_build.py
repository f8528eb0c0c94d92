"""Finding, compiling and loading the CUDA kernels. What needs nvcc is skipped without it; nothing here needs a device."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_emulation import emulated_ops

from arsp import kernels
from arsp.errors import ResourceError
from arsp.kernels import build, cuda, nvcc

COMPILED_FOR = ("80", "90a")


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every file compiled for sm_80 and sm_90a: paths of the objects and what the compiler said."""
    try:
        nvcc.find_nvcc()
    except ResourceError as error:
        pytest.skip(error.message)
    folder = tmp_path_factory.mktemp("objects")
    sources = [path for path in nvcc.source_files() if path.suffix == ".cu"]
    targets = [folder / f"{path.stem}.o" for path in sources]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda source, target: nvcc.compile_object(source, COMPILED_FOR, target), sources, targets))
    return dict(zip(targets, said, strict=True))


@pytest.mark.slow
def test_every_kernel_compiles_without_warnings_and_keeps_its_values_in_registers(objects):
    """All kernels are hot: none may spill. The largest need is that of decode with several columns; 255 registers is the most there is."""
    report = [line for text in objects.values() for line in nvcc.resources(text)]
    assert {line["arch"] for line in report} == {f"sm_{arch}" for arch in COMPILED_FOR}
    spilled = [line for line in report if line["spill_stores"] or line["spill_loads"] or line["stack"]]
    assert not spilled, f"values leave the registers: {spilled}"
    warnings = [line for text in objects.values() for line in text.splitlines() if "warning" in line.lower()]
    assert not warnings, warnings


@pytest.mark.slow
def test_the_library_loads_without_a_device_and_has_every_launcher(objects, tmp_path):
    path = tmp_path / "cuda.so"
    subprocess.run([nvcc.find_nvcc(), "-shared", "-cudart=static", *objects, "-o", path], check=True)
    ops = cuda.CudaOps(path)
    assert all(hasattr(ops, name) for name in cuda.LAUNCHERS)
    assert b"invalid" in ops.library.arsp_error_string(1)
    undefined = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True).stdout
    assert "torch" not in undefined and "Py" not in undefined, "one library serves every torch and Python"


def test_the_table_of_launchers_is_that_of_the_sources():
    """Names and kinds of all parameters, read from the .cu files."""
    text = "".join(path.read_text() for path in nvcc.source_files())
    found = {}
    for name, parameters in re.findall(r"ARSP_EXPORT int arsp_(\w+)\(([^)]*)\)", text):
        kinds = ""
        for parameter in parameters.split(","):
            kind = parameter.strip().rsplit(" ", 1)[0]
            kinds += "p" if "*" in parameter or kind == "cudaStream_t" else {"int64_t": "l", "int": "i", "float": "f", "double": "d"}[kind]
        found[name] = kinds
    assert found == cuda.LAUNCHERS


def test_every_op_with_a_kernel_has_a_schema_and_says_where_it_is_used():
    assert set(cuda.LAUNCHERS) == set(cuda.LIMITS)
    for name in cuda.LAUNCHERS:
        assert hasattr(torch.ops.arsp, name)


def test_machine_code_for_the_named_architectures_and_ptx_for_newer_ones():
    options = nvcc.targets(nvcc.ARCHITECTURES, ptx=True)
    assert options[:4] == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "86", "89", "90a")]
    assert options[4] == "-gencode=arch=compute_90,code=compute_90"


def test_resources_are_read_from_what_the_compiler_says():
    text = """ptxas info    : Compiling entry function '_ZN7example6kernelEi' for 'sm_80'
ptxas info    : Function properties for _ZN7example6kernelEi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 1420 bytes smem, 464 bytes cmem[0]"""
    (line,) = nvcc.resources(text)
    assert line.pop("kernel") in ("example::kernel", "_ZN7example6kernelEi")
    assert line == {"arch": "sm_80", "registers": 128, "shared": 1420, "stack": 16, "spill_stores": 8, "spill_loads": 12}


def fake_nvcc(folder, release):
    script = folder / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    script.chmod(0o755)
    return script


def test_compilers_are_found_where_they_are_named_and_old_ones_refused(tmp_path, monkeypatch):
    for name in ("good", "old", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "good", "12.4")))
    assert nvcc.find_nvcc().parent.name == "good"
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "old", "11.8")))
    with pytest.raises(ResourceError, match="of CUDA 11.8"):
        nvcc.find_nvcc()
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    with pytest.raises(ResourceError, match="no CUDA compiler"):
        nvcc.find_nvcc()


def device(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), "80"), ((8, 6), "86"), ((8, 7), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "90a")]
)
def test_the_best_architecture_for_a_device_is_chosen(monkeypatch, capability, wanted):
    device(monkeypatch, capability)
    assert cuda.device_architecture() == wanted


def test_old_devices_are_left_to_torch(monkeypatch):
    device(monkeypatch, (7, 5))
    assert cuda.state() == (False, "the CUDA kernels need a device of compute capability 8.0, this one has 7.5")


def test_prebuilt_comes_first_then_the_cache_then_a_compiler_then_torch(tmp_path, monkeypatch):
    """The three ways in order, as arsp env words them."""
    (tmp_path / "empty").mkdir()
    device(monkeypatch, (8, 0))
    monkeypatch.setenv("ARSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvcc, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert cuda.state() == (False, "no CUDA compiler: nvcc is not on the PATH")
    with pytest.raises(ResourceError, match="no CUDA compiler"):
        cuda.find_library()
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path, "13.0")))
    assert "at the first use" in cuda.state()[1]
    target = cuda.cached_library("80")
    target.parent.mkdir(parents=True)
    target.touch()
    assert cuda.state() == (True, f"compiled for sm_80 into {build.cache_root()}") and cuda.find_library()[0] == target
    nvcc.PREBUILT.mkdir()
    nvcc.prebuilt_library().touch()
    assert cuda.state() == (True, "prebuilt in the package") and cuda.find_library()[0] == nvcc.prebuilt_library()


def test_a_compiler_that_fails_is_reported_with_its_first_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    script = fake_nvcc(tmp_path, "13.0")
    script.write_text(script.read_text() + "case $1 in --version) ;; *) echo 'x.cu(3): error: no such thing' >&2; exit 2;; esac\n")
    monkeypatch.setenv("CUDACXX", str(script))
    target = tmp_path / "out" / "cuda.so"
    with pytest.raises(ResourceError, match=r"nvcc exit 2\): x.cu\(3\): error: no such thing"):
        nvcc.compile_library(target, ("80",))
    assert os.listdir(target.parent) == []


def test_the_back_end_can_be_insisted_on_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        with pytest.raises(ResourceError, match="--kernels cuda: no CUDA device is available"):
            kernels.set_backend("cuda")
    finally:
        kernels.set_backend("auto")


def test_back_ends_of_a_machine_with_a_device_are_listed(monkeypatch):
    device(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "state", lambda: (True, "prebuilt in the package"))
    kernels.set_backend("auto")
    rows = {row["op"]: row for row in kernels.backends()}
    assert rows["verify (CUDA)"] == {"op": "verify (CUDA)", "backend": "cuda", "reason": "prebuilt in the package; always"}
    assert rows["small_linear (CUDA)"]["backend"] == "reference"


def test_launches_that_are_refused_say_why():
    ops = emulated_ops()
    nothing = dict.fromkeys("pilfd", 0) | {"p": None}
    arguments = [nothing[kind] for kind in cuda.LAUNCHERS["w4a8_linear"][:-1]]  # a group of 0 columns
    with pytest.raises(RuntimeError, match="w4a8_linear: CUDA error 1: arguments are refused"):
        ops._call("w4a8_linear", torch.zeros(1), *arguments)


@pytest.mark.gpu
def test_opcheck_accepts_the_ops_on_the_device():
    cuda.load_library()
    x, row = torch.randn(3, 64, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    torch.library.opcheck(torch.ops.arsp.quantize_per_token.default, (x,))
    torch.library.opcheck(torch.ops.arsp.keyed_argmax.default, (x, 1, row, row, 0))
    torch.library.opcheck(torch.ops.arsp.verify.default, (x, row, 1.0, 5, 0.9, 1, row, row, 0))
    noise, vectors = torch.randn(3, 8, device="cuda"), torch.randn(64, 8, device="cuda")
    arguments = (x.log_softmax(1), noise, vectors, torch.full((3,), 0.95, device="cuda"), "2m", 8, 0.02)
    torch.library.opcheck(torch.ops.arsp.flow_map.default, arguments)


@pytest.mark.gpu
def test_ops_are_captured_in_a_graph():
    cuda.load_library()
    x = torch.randn(4, 256, device="cuda")
    kernels.quantize_per_token(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = kernels.quantize_per_token(x)
    x.copy_(torch.randn(4, 256, device="cuda"))
    graph.replay()
    wanted = kernels.reference.quantize_per_token(x)
    assert torch.equal(codes, wanted[0]) and torch.equal(scales, wanted[1])
