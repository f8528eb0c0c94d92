"""``arsp env``: the block to paste in an issue, and which back end each operator uses and why."""

from __future__ import annotations

from typing import Any

from arsp.cli.options import CommandContext, command, make_table
from arsp.errors import ResourceError

OPTIONAL = ("torchvision", "torch-fidelity", "scipy", "matplotlib", "pillow", "safetensors", "huggingface_hub", "transformers", "pytest")


def kernel_backends() -> list[dict[str, Any]]:
    """``{op, backend, reason}`` of every operator."""
    from arsp import kernels

    return [dict(row) for row in kernels.backends()]


def cuda_kernels() -> str:
    """Which CUDA kernels the package brings, this machine can compile, and whether a device uses them."""
    from arsp.kernels import cuda, nvcc

    usable, reason = cuda.state()
    if usable:
        return reason
    try:
        found = nvcc.find_nvcc()
        compiler = f"{found} ({'.'.join(map(str, nvcc.nvcc_version(str(found))))})"
    except ResourceError as error:
        compiler = error.message
    prebuilt = "in the package" if nvcc.prebuilt_library().exists() else "none"
    return f"not used: {reason}; prebuilt: {prebuilt}; compiler: {compiler}"


def collect(device: str) -> dict[str, Any]:
    """The environment with torch imported, packages and operators."""
    import torch

    from arsp.runs import environment, package_version, runs_root

    block = environment(device)
    block["cuda_devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    block["cuda_kernels"] = cuda_kernels()
    block["runs"] = str(runs_root().resolve())
    block["packages"] = {name: package_version(name) for name in OPTIONAL}
    block["kernels"] = kernel_backends()
    return block


@command(examples=["arsp env", "arsp env --json"], overrides=False, shared=("device", "threads", "kernels"))
def env(ctx: CommandContext) -> None:
    """Show versions, devices and the back end of each operator."""
    ctx.plan("import torch, look for devices and compiled operators, print what is found")
    block = collect(str(ctx.setup_torch()))
    if ctx.opts.json:
        ctx.emit(block)
        return
    from rich.console import Group

    plain = [(key, str(value)) for key, value in block.items() if key not in ("packages", "kernels")]
    packages = [(name, version or "not installed") for name, version in block["packages"].items()]
    kernels = [(row["op"], row["backend"], row["reason"]) for row in block["kernels"]]
    tables = [make_table(None, ("environment", ""), plain), make_table(None, ("package", "version"), packages)]
    tables += [make_table(None, ("operator", "back end", "why"), kernels)] if kernels else []
    ctx.emit(block, Group(*tables))
