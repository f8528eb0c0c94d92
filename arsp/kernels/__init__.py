"""Kernels: one public function per op. Each picks its back end once, and ``backends()`` says which and why.

``set_backend``: ``auto`` (default) uses a kernel where there is one and torch elsewhere; ``reference`` is torch everywhere;
``cpu`` insists on the compiled CPU kernels; ``cuda`` insists on CUDA kernels. The fast path and the fallback have the same
signature and differ in rounding only. ``$ARSP_KERNELS`` is the choice where ``set_backend`` was not called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from arsp.errors import ConfigError, ResourceError, nearest
from arsp.kernels import build, ops, reference

__all__ = ["BACKENDS", "MAX_ROWS", "backends", "set_backend", "small_linear"]

BACKENDS = ("auto", "reference", "cpu", "cuda")
MAX_ROWS = 16  # up to here the weights are what a linear layer waits for; beyond, torch's blocked product is better

_DTYPES = (torch.float32, torch.bfloat16)
_wanted: str | None = None  # None: $ARSP_KERNELS, or auto
_kernel: Callable | None = None  # the compiled op once it is loaded
_reason: str | None = None  # why _kernel is what it is; None = not decided yet
_lock = threading.Lock()


def _decide() -> None:
    """Load the CPU kernels (compiling them if this machine has not yet), or note why they cannot be."""
    global _kernel, _reason
    if _wanted is None:
        set_backend(os.environ.get("ARSP_KERNELS") or "auto")
    with _lock:
        if _reason is not None:
            return
        if _wanted == "reference":
            _kernel, _reason = None, "chosen with --kernels reference"
            return
        try:
            isa = build.load_library()
        except ResourceError as error:
            _kernel, _reason = None, error.message
            return
        _kernel = ops.small_linear
        _reason = f"{isa}; float32 and bfloat16, up to {MAX_ROWS} rows on the CPU without gradient, torch otherwise"


def set_backend(name: str) -> None:
    """Choose among ``BACKENDS`` for this process. ConfigError: unknown, or no op has such a kernel. ResourceError: ``cpu`` was
    asked for and the kernels cannot be compiled, or ``cuda`` and there is no such device."""
    global _wanted, _kernel, _reason
    if name not in BACKENDS:
        raise ConfigError(f"unknown kernel back end {name!r}", nearest(name, BACKENDS))
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError("--kernels cuda: no CUDA device is available", "Use --kernels auto.")
        raise ConfigError("--kernels cuda: no op has a CUDA kernel; torch's own are used on the GPU", "Use --kernels auto.")
    with _lock:
        _wanted, _kernel, _reason = name, None, None
    if name == "cpu":
        _decide()
        if _kernel is None:
            raise ResourceError(f"--kernels cpu: {_reason}", "Use --kernels auto or --kernels reference.")


def backends() -> list[dict[str, str]]:
    """One ``{"op", "backend", "reason"}`` per op. Compiles nothing: a library that is not there yet is announced."""
    if _wanted is None:
        set_backend(os.environ.get("ARSP_KERNELS") or "auto")
    if _reason is None and _wanted == "auto":
        try:
            if not build.library_path().exists():
                reason = f"compiled at the first use with {build.compiler_version()} into {build.cache_root()}"
                return [{"op": "small_linear", "backend": "cpu", "reason": reason}]
        except ResourceError:
            pass  # _decide meets the same error and words it
    _decide()
    return [{"op": "small_linear", "backend": "reference" if _kernel is None else "cpu", "reason": str(_reason)}]


def small_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x weight^T`` for few rows: (..., K) and (N, K) -> (..., N), dtype of ``x``.

    Every weight is read once for all rows, and a row's result does not depend on the other rows. Where the kernel does not
    apply (more than ``MAX_ROWS`` rows, gradients, another device or dtype, no compiler) this is ``torch.nn.functional.linear``.
    """
    if not x_MK.is_cpu or (torch.is_grad_enabled() and (x_MK.requires_grad or weight_NK.requires_grad)):
        return reference.small_linear(x_MK, weight_NK)
    if _reason is None and not torch.compiler.is_compiling():
        _decide()
    if _kernel is None or x_MK.dtype not in _DTYPES or weight_NK.dtype not in _DTYPES or not weight_NK.is_contiguous():
        return reference.small_linear(x_MK, weight_NK)
    if x_MK.dim() == 2:
        return _kernel(x_MK, weight_NK) if x_MK.shape[0] <= MAX_ROWS else reference.small_linear(x_MK, weight_NK)
    width = x_MK.shape[-1]
    if width == 0 or x_MK.numel() > MAX_ROWS * width:
        return reference.small_linear(x_MK, weight_NK)
    return _kernel(x_MK.reshape(-1, width), weight_NK).view(*x_MK.shape[:-1], weight_NK.shape[0])
