"""Kernels: one public function per op. Each picks its back end once, and ``backends()`` says which and why.

``set_backend``: ``auto`` (default) uses a kernel where there is one and torch elsewhere; ``reference`` is torch everywhere;
``cpu`` insists on the compiled CPU kernels; ``cuda`` insists on CUDA kernels. The fast path and the fallback have the same
signature and differ in rounding only. ``$ARSP_KERNELS`` is the choice where ``set_backend`` was not called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arsp.errors import ConfigError, ResourceError, nearest
from arsp.kernels import build, cuda, ops, reference
from arsp.kernels.layouts import TILE, pack_w4_cpu, pack_w8_cpu

__all__ = [
    "BACKENDS", "GROUP_SIZES", "MAX_QUERIES", "MAX_ROWS", "OPS", "TILE", "accept_scan", "apply_rope", "backends", "cached_attention",
    "draw_residual", "flow_map", "fuses_noise", "gelu_quantize", "integrates_flow", "keyed_argmax", "modulate_quantize", "pack_w4_cpu",
    "pack_w8_cpu", "quantize_per_token", "reads_lengths", "rms_norm", "rms_norm_quantize", "set_backend", "skips_windows", "small_linear",
    "swiglu_quantize", "verify", "w4a8_linear", "w4a8_swiglu", "w8a8_linear", "w8a8_swiglu", "windowed_scale_attention",
]  # fmt: skip

BACKENDS = ("auto", "reference", "cpu", "cuda")
GROUP_SIZES = (32, 64, 128, -1)  # columns that share a scale in w4a8_linear; -1: all of a row
MAX_QUERIES = {"cpu": 32, "cuda": 64}  # a row: up to here cached_attention without a mask is not slower than torch's attention
MAX_ROWS = 16  # up to here the weights are what a linear layer waits for; beyond, torch's blocked product is better
OPS = {  # name -> where its compiled kernel is used
    "small_linear": f"float32 and bfloat16, up to {MAX_ROWS} rows on the CPU without gradient, torch otherwise",
    "rms_norm": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "apply_rope": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "cached_attention": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "windowed_scale_attention": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "keyed_argmax": "on the CPU without gradient, torch otherwise",
    "verify": "on the CPU without gradient, torch otherwise",
    "accept_scan": "on the CPU, torch otherwise",
    "draw_residual": "on the CPU without gradient, torch otherwise",
    "quantize_per_token": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "rms_norm_quantize": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "modulate_quantize": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "swiglu_quantize": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "gelu_quantize": "float32 and bfloat16 on the CPU without gradient, torch otherwise",
    "w8a8_linear": "on the CPU, torch otherwise",
    "w4a8_linear": "on the CPU, torch otherwise",
    "w8a8_swiglu": "on the CPU, torch otherwise",
    "w4a8_swiglu": "on the CPU, torch otherwise",
}

_DTYPES = (torch.float32, torch.bfloat16)
_wanted: str | None = None  # None: $ARSP_KERNELS, or auto
_compiled = False  # the library is loaded and to be used
_reason: str | None = None  # its instruction set, or why it is not used; None = not decided yet
_cuda_loaded = False  # the same for the CUDA library
_cuda_reason: str | None = None
_lock = threading.Lock()


def _decide() -> None:
    """Load the CPU kernels (compiling them if this machine has not yet), or note why they cannot be."""
    global _compiled, _reason
    if _wanted is None:
        set_backend(os.environ.get("ARSP_KERNELS") or "auto")
    with _lock:
        if _reason is not None:
            return
        if _wanted == "reference":
            _compiled, _reason = False, "chosen with --kernels reference"
            return
        try:
            _compiled, _reason = True, build.load_library()
        except ResourceError as error:
            _compiled, _reason = False, error.message


def _applies(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these floating-point tensors. The first time, this decides whether there are any."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor.dtype not in _DTYPES or (grad and tensor.requires_grad):
            return False
        if not tensor.is_cpu:
            return _applies_on_cuda(*tensors)
    if _reason is None and not torch.compiler.is_compiling():
        _decide()
    return _compiled


def _decide_on_cuda() -> None:
    """Load the CUDA kernels (compiling them if neither the package nor this machine has them), or note why they cannot be."""
    global _cuda_loaded, _cuda_reason
    if _wanted is None:
        set_backend(os.environ.get("ARSP_KERNELS") or "auto")
    with _lock:
        if _cuda_reason is not None:
            return
        if _wanted in ("reference", "cpu"):
            _cuda_loaded, _cuda_reason = False, f"chosen with --kernels {_wanted}"
            return
        try:
            _cuda_loaded, _cuda_reason = True, cuda.load_library()
        except ResourceError as error:
            _cuda_loaded, _cuda_reason = False, error.message


def _applies_on_cuda(*tensors: Tensor) -> bool:
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cuda or tensor.dtype not in _DTYPES or (grad and tensor.requires_grad):
            return False
    if _cuda_reason is None and not torch.compiler.is_compiling():
        _decide_on_cuda()
    return _cuda_loaded


def set_backend(name: str) -> None:
    """Choose among ``BACKENDS`` for this process. ConfigError: unknown. ResourceError: ``cpu`` or ``cuda`` was asked for and its
    kernels cannot be compiled, or there is no such device."""
    global _wanted, _compiled, _reason, _cuda_loaded, _cuda_reason
    if name not in BACKENDS:
        raise ConfigError(f"unknown kernel back end {name!r}", nearest(name, BACKENDS))
    with _lock:
        _wanted, _compiled, _reason = name, False, None
        _cuda_loaded, _cuda_reason = False, None
    for asked, decide in (("cpu", _decide), ("cuda", _decide_on_cuda)):
        if name == asked:
            decide()
            if not (_compiled or _cuda_loaded):
                raise ResourceError(f"--kernels {name}: {_cuda_reason or _reason}", "Use --kernels auto or --kernels reference.")


def backends() -> list[dict[str, str]]:
    """One ``{"op", "backend", "reason"}`` per op, and one more for CUDA tensors where there is a device. Compiles nothing: a library
    that is not there yet is announced."""
    if _wanted is None:
        set_backend(os.environ.get("ARSP_KERNELS") or "auto")
    return _cpu_backends() + (_cuda_backends() if torch.cuda.is_available() else [])


def _cpu_backends() -> list[dict[str, str]]:
    if _reason is None and _wanted in ("auto", "cuda"):
        try:
            if not build.library_path().exists():
                reason = f"compiled at the first use with {build.compiler_version()} into {build.cache_root()}"
                return [{"op": op, "backend": "cpu", "reason": reason} for op in OPS]
        except ResourceError:
            pass  # _decide meets the same error and words it
    _decide()
    if _compiled:
        return [{"op": op, "backend": "cpu", "reason": f"{_reason}; {where}"} for op, where in OPS.items()]
    return [{"op": op, "backend": "reference", "reason": str(_reason)} for op in OPS]


def _cuda_backends() -> list[dict[str, str]]:
    usable, reason = (_cuda_loaded, _cuda_reason) if _cuda_reason is not None or _wanted in ("reference", "cpu") else cuda.state()
    rows = []
    for op in dict.fromkeys((*OPS, *cuda.LIMITS)):
        backend = "cuda" if usable and op in cuda.LIMITS else "reference"
        why = f"{reason}; {cuda.LIMITS[op]}" if backend == "cuda" else "torch's own is used" if usable else reason
        rows.append({"op": f"{op} (CUDA)", "backend": backend, "reason": str(why or f"chosen with --kernels {_wanted}")})
    return rows


def small_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x weight^T`` for few rows: (..., K) and (N, K) -> (..., N), dtype of ``x``.

    Every weight is read once for all rows, and a row's result does not depend on the other rows. Where the kernel does not
    apply (more than ``MAX_ROWS`` rows, gradients, another device or dtype, no compiler) this is ``torch.nn.functional.linear``.
    """
    width = x_MK.shape[-1]
    if width == 0 or x_MK.numel() > MAX_ROWS * width or not (x_MK.is_cpu and weight_NK.is_contiguous() and _applies(x_MK, weight_NK)):
        return reference.small_linear(x_MK, weight_NK)
    if x_MK.dim() == 2:
        return ops.small_linear(x_MK, weight_NK)
    return ops.small_linear(x_MK.reshape(-1, width), weight_NK).view(*x_MK.shape[:-1], weight_NK.shape[0])


def rms_norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` with float32 inside, rounded to the dtype of x, then times the weight; x (..., K), weight (K)."""
    apply = ops.rms_norm if x.dtype == weight_K.dtype and _applies(x, weight_K) else reference.rms_norm
    return apply(x, weight_K, eps)


def apply_rope(x_BnHD: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (2j, 2j + 1), float32 inside: (B, n, H, D), dtype of x.

    ``table``: float32, cos and sin, ``(n, D / 2, 2)`` or ``(B, n, D / 2, 2)``. Heads may lie anywhere (last stride 1).
    """
    return (ops.apply_rope if _applies(x_BnHD) else reference.apply_rope)(x_BnHD, table)


def cached_attention(
    q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, k_cache: Tensor, v_cache: Tensor, start: int | Tensor,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of few queries to a cache that their own keys and values join first, (B, H, n, Dv).

    Args:
        q_BHnD, k_BHnD, v_BHnD: one dtype. k_cache, v_cache: (B or more, H, capacity, D) of that dtype; slots start .. start + n - 1 of the
            first B rows are written.
        start: of all rows, or int64 (B) on the device of the tensors: of each row. On a GPU the host need not know it.
        mask: bool (B or 1, 1, n, start + n), True = seen; for one start only. None: a query sees the slots up to its own.
        scale: of the products before the softmax; None: D^-0.5.

    float32 inside. A query that sees nothing gets NaN. Made for few queries: on the CPU every head is one thread's work.
    """
    applies = q_BHnD.dtype == k_cache.dtype and _applies(q_BHnD, k_BHnD, v_BHnD)
    apply = ops.cached_attention if applies else reference.cached_attention
    if isinstance(start, Tensor):
        return apply(q_BHnD, k_BHnD, v_BHnD, k_cache, v_cache, 0, mask, scale, start)
    return apply(q_BHnD, k_BHnD, v_BHnD, k_cache, v_cache, start, mask, scale)


def reads_lengths(k_cache: Tensor, queries: int) -> bool:
    """Whether :func:`cached_attention` without a mask is the way for so many queries a row: it reads what each row holds. The reference
    makes a mask in every layer, and for more queries torch's attention is better."""
    return queries <= MAX_QUERIES.get(k_cache.device.type, 0) and _applies(k_cache) and (k_cache.is_cpu or cuda.heads_fit(k_cache))


def windowed_scale_attention(
    q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int
) -> Tensor:
    """Attention of the queries of scale s = ``scale_index`` to windows in the maps of scales 0..s, each head with its own
    (2-D form of the windows of LiteVAR, arXiv 2411.17178).

    Args:
        q_BHnD: (B, H, n_s, D), already scaled: the softmax is of ``q k^T``.
        k_BHTD: (B, H, T, D), T = n_0 + ... + n_s, maps one after another in raster order.
        v_GHTD: (G B, H, T, Dv), G = 1 or 2: rows b and B + b are weighted with the attention map of row b, computed once.
        windows_Hs: int32 (H, s + 1). -1: every key of map u; 0: none; r >= 1: keys at |row - cy| <= r and |column - cx| <= r, where
            query (y, x) of side pn_s has its centre at cy = (y + 0.5) pn_u / pn_s - 0.5, cx alike.
        sides: pn_0 .. pn_s, or more.

    Returns (G B, H, n_s, Dv), dtype of q, exact softmax over the kept keys; NaN for a query that keeps none. float32 and bfloat16,
    float32 sums. Views of a cache are read in place (last stride 1). Where the kernel does not apply (gradients, another device or
    dtype, no compiler) the dense reference runs. ConfigError: shapes that do not fit together.
    """
    _check_windowed(q_BHnD, k_BHTD, v_GHTD, windows_Hs, sides, scale_index)
    apply = ops.windowed_scale_attention if _applies(q_BHnD, k_BHTD, v_GHTD) else reference.windowed_scale_attention
    return apply(q_BHnD, k_BHTD, v_GHTD, windows_Hs, sides, scale_index)


def skips_windows(q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor) -> bool:
    """Whether :func:`windowed_scale_attention` leaves out what the windows drop; the reference only masks it."""
    return _applies(q_BHnD, k_BHTD, v_GHTD) and (q_BHnD.is_cpu or cuda.windows_fit(q_BHnD, v_GHTD))


def _check_windowed(q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int) -> None:
    if not 0 <= scale_index < len(sides):
        raise ConfigError(f"windowed_scale_attention: no scale {scale_index} among {len(sides)} sides.", "Scales count from 0.")
    total, queries = sum(side * side for side in sides[: scale_index + 1]), sides[scale_index] ** 2
    batch, heads, width = q_BHnD.shape[0], q_BHnD.shape[1], q_BHnD.shape[-1]
    for name, tensor, allowed in (
        ("q", q_BHnD, [(batch, heads, queries, width)]),
        ("k", k_BHTD, [(batch, heads, total, width)]),
        ("v", v_GHTD, [(sets * batch, heads, total, v_GHTD.shape[-1]) for sets in (1, 2)]),
        ("windows", windows_Hs, [(heads, scale_index + 1)]),
    ):
        if tuple(tensor.shape) not in allowed:
            expected = " or ".join(str(shape) for shape in allowed)
            raise ConfigError(
                f"windowed_scale_attention: {name} has shape {tuple(tensor.shape)}, expected {expected}.",
                f"Scale {scale_index} of sides {tuple(sides)} has {queries} queries and {total} keys.",
            )
    if windows_Hs.dtype != torch.int32:
        raise ConfigError(f"windowed_scale_attention: windows are {windows_Hs.dtype}, expected torch.int32.")
    if not q_BHnD.dtype == k_BHTD.dtype == v_GHTD.dtype:
        raise ConfigError(f"windowed_scale_attention: q, k, v differ in type: {q_BHnD.dtype}, {k_BHTD.dtype}, {v_GHTD.dtype}.")


def keyed_argmax(log_w_RV: Tensor, seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0) -> Tensor:
    """Keyed Gumbel-argmax draws ``argmax_x(log w[x] + g(x))``, the smallest id on ties: int64 ``(R,)``.

    Args:
        log_w_RV: float32 logarithms of weights that need not sum to 1; -inf removes a code.
        seed, ids_R, positions_R, purpose, stream: the key of the noise. ``g = -log(-log u)``, ``u`` = ``arsp.rng.keyed_uniform`` bit for
            bit. ids and positions are int64 below 2^32, the seed has 64 bits.

    Returns -1 for a row whose maximum is not finite (a NaN, or every code removed). ConfigError: shapes that do not fit together.
    """
    _check_rows("keyed_argmax", log_w_RV, ids=ids_R, positions=positions_R)
    log_w_RV = log_w_RV.float()
    apply = ops.keyed_argmax if _applies(log_w_RV) else reference.keyed_argmax
    return apply(log_w_RV, _signed(seed), ids_R, positions_R, int(purpose), stream)


def fuses_noise(log_w: Tensor) -> bool:
    """Whether :func:`keyed_argmax` and :func:`verify` make the noise they need as they go; the reference makes whole tensors of it."""
    return _applies(log_w)


def verify(
    logits_RV: Tensor, drafts_R: Tensor, temperature: float, top_k: int, top_p: float,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
    uncond_RV: Tensor | None = None, scale: float = 1.0, ramp: bool = False, guided_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The law of every row of logits after guidance, temperature, top-k and top-p, a keyed draw from it, and the log-probability of a
    draft.

    Args:
        logits_RV: one law a row, of any float type; float32 and bfloat16 are read as they are. Rows may be views with any distance between
            them; the last stride should be 1.
        drafts_R: int64 codes to look up, negative where there is none.
        temperature, top_k, top_p: as in :class:`arsp.decode.filters.LogitsPipeline`; temperature 0 is greedy, top_k 0 or >= V and top_p 1
            keep everything. Logits are divided by max(temperature, 1e-5). Masses are summed in float64.
        seed, ids_R, positions_R, purpose, stream: the key of the noise, as in :func:`keyed_argmax`.
        uncond_RV: the unconditional half u of classifier-free guidance, beside the conditional c in ``logits_RV``; None: no guidance. What
            is below then means the guided logits ``u + scale (c - u)``, or with ``ramp`` ``(1 + scale) c - scale u``, in float32 with every
            operation rounded.
        guided_R: bool, rows where this is False keep c; None: all are guided.

    Returns, all ``(R,)``:
        codes: int64, :func:`keyed_argmax` of the law (the first best code when greedy).
        log_p: float32, log-probability of the draft, -inf where the filters removed it, 0 without a draft.
        lse, threshold: float32, last: int64. The law: ``log p(x) = logits[x] / temperature - lse`` where ``logits[x] / temperature`` is
            above ``threshold``, or equal to it and ``x <= last``; -inf elsewhere. ``last`` is V - 1 unless top-p cuts between equal logits.
            Greedy: temperature 1, lse = threshold = the maximum, last = its first code.

    A row without a finite maximum (a NaN, +inf, or every code at -inf) has codes = last = -1 and NaN elsewhere.
    ConfigError: shapes that do not fit together.
    """
    _check_rows("verify", logits_RV, drafts=drafts_R, ids=ids_R, positions=positions_R)
    key = (_signed(seed), ids_R, positions_R, int(purpose), stream)
    if uncond_RV is None:
        logits_RV = logits_RV if logits_RV.dtype in _DTYPES else logits_RV.float()
        apply = ops.verify if _applies(logits_RV) else reference.verify
        return apply(logits_RV, drafts_R, temperature, top_k, top_p, *key)
    if uncond_RV.shape != logits_RV.shape:
        raise ConfigError(f"verify: the halves have shapes {tuple(logits_RV.shape)} and {tuple(uncond_RV.shape)}.")
    if uncond_RV.dtype != logits_RV.dtype or logits_RV.dtype not in _DTYPES:
        logits_RV, uncond_RV = logits_RV.float(), uncond_RV.float()
    apply = ops.verify if _applies(logits_RV, uncond_RV) else reference.verify
    return apply(logits_RV, drafts_R, temperature, top_k, top_p, *key, uncond_RV, scale, ramp, guided_R)


def accept_scan(
    drafts_Bm: Tensor, drawn_Bm: Tensor, known_B: Tensor, ratio_Bm: Tensor | None = None, uniform_Bm: Tensor | None = None
) -> Tensor:
    """How many drafts of each row stand before the first that does not: int64 ``(B,)``.

    Args:
        drafts_Bm, drawn_Bm: int64. Without a ratio a draft stands where it is the code that was drawn.
        ratio_Bm, uniform_Bm: float32. With them it stands where the uniform number is below the ratio; NaN is not.
        known_B: int64, drafts at the front that are known already and stand anyway.
    """
    apply = reference.accept_scan if _wanted == "reference" else ops.accept_scan  # which is the reference where nothing is compiled
    return apply(drafts_Bm, drawn_Bm, known_B, ratio_Bm, uniform_Bm)


def draw_residual(
    p: Sequence[Tensor | None], p_how: Sequence[float], rows_R: Tensor, q: Sequence[Tensor | None], q_how: Sequence[float],
    sources_R: Tensor, drafts_R: Tensor, prior: Tensor | None, places_R: Tensor | None,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
) -> Tensor:  # fmt: skip
    """Keyed draws from what is left of a law where a draft from another one was rejected: int64 ``(R,)``.

    ``argmax_x(log max(0, p[x] - q[x]) + g(x))`` (arXiv 2211.17192), the smallest id on ties; p itself where the residual has a mass below
    1e-12. Probabilities and their difference are float32. Nothing of size V is made but on a row's way through a kernel.

    Args:
        p: target laws as :func:`verify` describes them: logits (P, V), uncond or None, guided or None, and lse, threshold, last, each (P).
        p_how: scale, ramp (0 or 1), temperature.
        rows_R: int64, which law of p a draw is from; negative: none is needed, and the result is 0.
        q, q_how: laws that drafts were drawn from, in the same form; empty where there are none.
        sources_R: int64, the law of a draft: its row in ``q``, or -1 (certain), -2 (all codes alike), -3 (row ``places_R`` of ``prior``).
        drafts_R: int64, the drafts, for source -1.
        prior, places_R: float32 probabilities (Y, V), and int64.
        seed, ids_R, positions_R, purpose, stream: the key of the noise, as in :func:`keyed_argmax`.

    Returns -1 where a law of p has no possible code.
    """
    applies = _applies(p[0], *q[:1])
    apply = ops.draw_residual if applies else reference.draw_residual
    return apply(
        p, p_how, rows_R, q, q_how, sources_R, drafts_R, prior, places_R, _signed(seed), ids_R, positions_R, int(purpose), stream
    )  # fmt: skip


def _signed(seed: int) -> int:
    """The 64-bit seed as operators take it."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _check_rows(op: str, logits_RV: Tensor, **rows: Tensor) -> None:
    if logits_RV.dim() != 2 or logits_RV.shape[1] == 0:
        raise ConfigError(f"{op}: expected one row of V >= 1 logits a law, got shape {tuple(logits_RV.shape)}.")
    for name, tensor in rows.items():
        if tensor.shape != logits_RV.shape[:1] or tensor.dtype != torch.int64:
            raise ConfigError(
                f"{op}: {name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, expected ({len(logits_RV)},) and torch.int64.",
                "There is one value for each row of logits.",
            )


def quantize_per_token(
    x: Tensor, smooth: Tensor | None = None, signs: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of every row: ``x ~ xq sx``, ``sx = absmax / 127``, to the nearest, ties to even.

    Args:
        x: (..., K), float32 or bfloat16.
        smooth: float32 (K), a factor for every column (one over the scale of SmoothQuant, arXiv 2211.10438).
        signs: int8 (K) of +-1. The row, after ``smooth``, is multiplied by them and by orthonormal Hadamard matrices as large as the
            largest power of two that divides K: :func:`arsp.kernels.reference.rotate` (QuaRot, arXiv 2404.00456).
        scale: float32, one number or one for each row: sx as calibrated. What does not fit saturates at +-127.

    Returns xq int8 (..., K) and sx float32 (...). A row of zeros has sx = 1. A row that is not finite has codes 0 and sx NaN or infinite,
    so products with it are NaN. ConfigError: shapes or types that do not fit together.
    """
    return _run(ops.quantize_per_token, reference.quantize_per_token, _check_per_token, _applies(x), x, smooth, signs, scale)


def rms_norm_quantize(
    x: Tensor, weight_K: Tensor, eps: float, smooth: Tensor | None = None, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``x / sqrt(mean(x^2) + eps) weight``, x (..., K); float32 inside, as all producers are."""
    applies = _applies(x, weight_K)
    return _run(ops.rms_norm_quantize, reference.rms_norm_quantize, _check_rms_norm, applies, x, weight_K, eps, smooth, signs)


def modulate_quantize(
    x_RnK: Tensor, scale_R1K: Tensor, shift_R1K: Tensor, eps: float, smooth: Tensor | None = None, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``LayerNorm(x) (1 + scale) + shift``, the input of a layer behind adaptive layer norm."""
    arguments = (x_RnK, scale_R1K, shift_R1K, eps, smooth, signs)
    return _run(ops.modulate_quantize, reference.modulate_quantize, _check_modulate, _applies(*arguments[:3]), *arguments)


def swiglu_quantize(a: Tensor, b: Tensor, smooth: Tensor | None = None, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``silu(a) b``, both (..., K). Halves of one matrix are read in place."""
    return _run(ops.swiglu_quantize, reference.swiglu_quantize, _check_swiglu, _applies(a, b), a, b, smooth, signs)


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU (tanh form) of x (..., K), whose values lie above -0.17, in all 256 codes of a row: ``gelu(x) ~ xq sx + offset``.

    Returns xq int8 (..., K), ``sx = (max gelu(x) + 0.17) / 255`` and ``offset = 128 sx - 0.17``, both float32 (...), for linear layers that
    are given the sums of their rows. A row that is not finite has codes 0 and sx and offset NaN. ConfigError: x is a number.
    """
    return _run(ops.gelu_quantize, reference.gelu_quantize, _check_rows_of, _applies(x), x)


def w8a8_linear(
    xq: Tensor, sx: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Linear layer of 8-bit codes, shape (..., N): ``y[m, n] = sx[m] scale[n] sum_k code[n, k] xq[m, k] + bias[n] + offset[m] rowsum[n]``,
    then ``residual + gain gelu(y)`` of what is given.

    Args:
        xq, sx: int8 (..., K) and float32 (...), of :func:`quantize_per_token` and those after it.
        weight: :func:`pack_w8_cpu` of the codes int8 (N, K).
        scale_N: float32, one scale a row.
        bias_N: (N,) or None. dtype: of the result, float32 or bfloat16.
        offset, rowsum_N: float32 (...) of :func:`gelu_quantize`, and the sums of the rows of the weight that codes and scales stand for.
        gelu: the tanh form. gain: (R, 1, N) for xq (R, n, K), one row of factors for n rows of x (AdaLN). residual: (..., N). Both
            float32 or bfloat16.

    The sum is exact (int32, K < 65536); outside, every operation rounds to float32 in the order scale, sx, bias, offset rowsum, GELU,
    gain, residual, so that all back ends give the same bits, with GELU those of its own rounding. Tiles of 16 rows are independent:
    ``weight[a:b]`` with ``scale_N[16 * a : 16 * b]`` is the layer of these rows, in place. ConfigError: shapes or types that do not fit
    together.
    """
    arguments = (xq, sx, weight, scale_N, bias_N, dtype, offset, rowsum_N)
    if not gelu and gain is None and residual is None:
        return _run(ops.w8a8_linear, reference.w8a8_linear, _check_w8a8, _applies(sx), *arguments)
    applies = _applies(*(tensor for tensor in (sx, gain, residual) if tensor is not None))
    return _run(ops.w8a8_linear, reference.w8a8_linear, _check_w8a8, applies, *arguments, gelu, gain, residual)


def w4a8_linear(
    xq: Tensor, sx: Tensor, weight: Tensor, scales_NG: Tensor, zeros_NG: Tensor, group_size: int,
    bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32, offset: Tensor | None = None, rowsum_N: Tensor | None = None,
    gelu: bool = False, gain: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Linear layer of 4-bit codes with a scale and a zero point per group of columns, shape (..., N):
    ``y[m, n] = sx[m] sum_g scale[n, g] sum_{k in g} (code[n, k] - zero[n, g]) xq[m, k] + bias[n] + offset[m] rowsum[n]``,
    then ``residual + gain gelu(y)`` of what is given.

    Args:
        weight: :func:`pack_w4_cpu` of the canonical words int32 (N, K / 8).
        scales_NG, zeros_NG: float32 and uint8 (N, G). Kept with ``.mT.contiguous().mT`` they are read in place, otherwise
            copied at every call.
        group_size: one of ``GROUP_SIZES``; K must be a multiple.
        others: as of :func:`w8a8_linear`.

    The inner sums are exact (int32, K < 65536); outside, every operation rounds to float32: groups in their order, then as in
    :func:`w8a8_linear`, to the same bits everywhere. Tiles are independent as there. ConfigError: shapes or types that do not
    fit together, a group size that is not offered or does not divide K.
    """
    if group_size not in GROUP_SIZES or group_size * scales_NG.shape[-1] not in (xq.shape[-1], -1):
        raise _no_groups("w4a8_linear", xq, scales_NG, group_size)
    arguments = (xq, sx, weight, scales_NG, zeros_NG, bias_N, dtype, offset, rowsum_N)
    if not gelu and gain is None and residual is None:
        return _run(ops.w4a8_linear, reference.w4a8_linear, _check_w4a8, _applies(sx), *arguments)
    applies = _applies(*(tensor for tensor in (sx, gain, residual) if tensor is not None))
    return _run(ops.w4a8_linear, reference.w4a8_linear, _check_w4a8, applies, *arguments, gelu, gain, residual)


def w8a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scale_N: Tensor, up: Tensor, up_scale_N: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """``silu(a) b`` of two layers of the same rows, a of the weight ``gate`` and b of ``up``: (..., N), rounded once, to ``dtype``.

    Weights and scales as of :func:`w8a8_linear`. Back ends differ by the rounding of silu. ConfigError: shapes or types that do not fit
    together.
    """
    arguments = (xq, sx, gate, gate_scale_N, up, up_scale_N, dtype)
    return _run(ops.w8a8_swiglu, reference.w8a8_swiglu, _check_w8a8_swiglu, _applies(sx), *arguments)


def w4a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scales_NG: Tensor, gate_zeros_NG: Tensor, up: Tensor, up_scales_NG: Tensor,
    up_zeros_NG: Tensor, group_size: int, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """:func:`w8a8_swiglu` of 4-bit codes; weights, scales and zero points as of :func:`w4a8_linear`, with one group size."""
    if group_size not in GROUP_SIZES or group_size * gate_scales_NG.shape[-1] not in (xq.shape[-1], -1):
        raise _no_groups("w4a8_swiglu", xq, gate_scales_NG, group_size)
    arguments = (xq, sx, gate, gate_scales_NG, gate_zeros_NG, up, up_scales_NG, up_zeros_NG, dtype)
    return _run(ops.w4a8_swiglu, reference.w4a8_swiglu, _check_w4a8_swiglu, _applies(sx), *arguments)


def _run(op: Callable[..., Any], plain: Callable[..., Any], check: Callable[..., None], applies: bool, *arguments: Any) -> Any:
    """The compiled op or the reference. The op checks its arguments itself; ``check`` says in our words what it refused."""
    if not applies:
        check(*arguments)
        return plain(*arguments)
    try:
        return op(*arguments)
    except RuntimeError:
        check(*arguments)
        raise


def _expect(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """A tensor that is there has this shape, and this type where it matters."""
    if tensor is not None and (tuple(tensor.shape) != tuple(shape) or (dtype is not None and tensor.dtype != dtype)):
        wanted = f"{'' if dtype is None else f'{dtype} '}{tuple(shape)}"
        raise ConfigError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted}.")


def _check_rows_of(x: Tensor, op: str = "gelu_quantize", smooth: Tensor | None = None, signs: Tensor | None = None) -> None:
    if x.dim() == 0:
        raise ConfigError(f"{op}: expected rows x (..., K), got a number.")
    _expect(op, "smooth", smooth, x.shape[-1:], torch.float32)
    _expect(op, "signs", signs, x.shape[-1:], torch.int8)


def _check_per_token(x: Tensor, smooth: Tensor | None, signs: Tensor | None, scale: Tensor | None) -> None:
    _check_rows_of(x, "quantize_per_token", smooth, signs)
    if scale is not None and scale.numel() != 1:
        _expect("quantize_per_token", "scale", scale, x.shape[:-1], torch.float32)


def _check_rms_norm(x: Tensor, weight_K: Tensor, eps: float, smooth: Tensor | None, signs: Tensor | None) -> None:
    _check_rows_of(x, "rms_norm_quantize", smooth, signs)
    _expect("rms_norm_quantize", "weight", weight_K, x.shape[-1:])


def _check_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, smooth: Tensor | None, signs: Tensor | None) -> None:
    if x.dim() != 3:
        raise ConfigError(f"modulate_quantize: expected x (R, n, K), got shape {tuple(x.shape)}.")
    _check_rows_of(x, "modulate_quantize", smooth, signs)
    _expect("modulate_quantize", "scale", scale, (x.shape[0], 1, x.shape[2]))
    _expect("modulate_quantize", "shift", shift, (x.shape[0], 1, x.shape[2]))


def _check_swiglu(a: Tensor, b: Tensor, smooth: Tensor | None, signs: Tensor | None) -> None:
    _check_rows_of(a, "swiglu_quantize", smooth, signs)
    _expect("swiglu_quantize", "b", b, a.shape)


def _check_w8a8(
    xq: Tensor, sx: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None, rowsum_N: Tensor | None, gelu: bool = False, gain: Tensor | None = None, residual: Tensor | None = None,
    op: str = "w8a8_linear",
) -> None:  # fmt: skip
    _expect(op, "scale", scale_N, (len(scale_N),), torch.float32)
    _check_linear(op, 4, xq, sx, weight, len(scale_N), bias_N, dtype, offset, rowsum_N, gain, residual)


def _check_w4a8(
    xq: Tensor, sx: Tensor, weight: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None, rowsum_N: Tensor | None, gelu: bool = False, gain: Tensor | None = None, residual: Tensor | None = None,
    op: str = "w4a8_linear",
) -> None:  # fmt: skip
    _expect(op, "scales", scales_NG, scales_NG.shape[:2], torch.float32)
    _expect(op, "zeros", zeros_NG, scales_NG.shape, torch.uint8)
    if xq.shape[-1] % 8:
        raise ConfigError(f"{op}: K = {xq.shape[-1]} is no multiple of 8.")
    _check_linear(op, 8, xq, sx, weight, len(scales_NG), bias_N, dtype, offset, rowsum_N, gain, residual)


def _check_w8a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scale_N: Tensor, up: Tensor, up_scale_N: Tensor, dtype: torch.dtype
) -> None:  # fmt: skip
    _expect("w8a8_swiglu", "scale of up", up_scale_N, gate_scale_N.shape)
    for weight in ((gate, gate_scale_N), (up, up_scale_N)):
        _check_w8a8(xq, sx, *weight, None, dtype, None, None, op="w8a8_swiglu")


def _check_w4a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scales_NG: Tensor, gate_zeros_NG: Tensor,
    up: Tensor, up_scales_NG: Tensor, up_zeros_NG: Tensor, dtype: torch.dtype,
) -> None:  # fmt: skip
    _expect("w4a8_swiglu", "scales of up", up_scales_NG, gate_scales_NG.shape)
    for weight in ((gate, gate_scales_NG, gate_zeros_NG), (up, up_scales_NG, up_zeros_NG)):
        _check_w4a8(xq, sx, *weight, None, dtype, None, None, op="w4a8_swiglu")


def _no_groups(op: str, xq: Tensor, scales_NG: Tensor, group_size: int) -> ConfigError:
    return ConfigError(
        f"{op}: groups of {group_size} do not fit K = {xq.shape[-1]} and scales of shape {tuple(scales_NG.shape)}.",
        f"Group sizes are {GROUP_SIZES} (-1: one group a row); scales are (N, K / group size).",
    )


def _check_linear(
    op: str, step: int, xq: Tensor, sx: Tensor, weight: Tensor, outputs: int, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None, rowsum_N: Tensor | None, gain: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    if xq.dim() == 0 or xq.dtype != torch.int8 or sx.shape != xq.shape[:-1] or sx.dtype != torch.float32:
        found = f"{xq.dtype} {tuple(xq.shape)} and {sx.dtype} {tuple(sx.shape)}"
        raise ConfigError(f"{op}: expected xq int8 (..., K) and sx float32 (...), got {found}.", "Both are of kernels.quantize_per_token.")
    columns = xq.shape[-1]
    if columns >= 1 << 16:
        raise ConfigError(f"{op}: K = {columns} is too large for exact sums.", "K is below 65536.")
    if weight.dtype != torch.uint8 or weight.shape != (-(-outputs // TILE), -(-columns // step), 4 * TILE):
        raise ConfigError(
            f"{op}: weight {weight.dtype} {tuple(weight.shape)} is not the layout of {outputs} rows and K = {columns}.",
            f"Pack it with kernels.pack_{op[:2]}_cpu.",
        )
    _expect(op, "bias", bias_N, (outputs,))
    if dtype not in _DTYPES:
        raise ConfigError(f"{op}: no results in {dtype}.", "float32 and bfloat16 are offered.")
    if (offset is None) != (rowsum_N is None):
        raise ConfigError(f"{op}: offset and rowsum come together.", "The offset is of kernels.gelu_quantize.")
    _expect(op, "offset", offset, sx.shape, torch.float32)
    _expect(op, "rowsum", rowsum_N, (outputs,), torch.float32)
    if gain is not None and xq.dim() != 3:
        raise ConfigError(f"{op}: a gain (R, 1, N) is for xq (R, n, K), not {tuple(xq.shape)}.")
    _expect(op, "gain", gain, (xq.shape[0], 1, outputs))
    _expect(op, "residual", residual, (*xq.shape[:-1], outputs))


def integrates_flow(logp_NU: Tensor, noise_NE: Tensor) -> bool:
    """Whether there is a kernel of :func:`flow_map` for these tensors: float32 on CUDA, vectors of up to 32 numbers."""
    return logp_NU.is_cuda and logp_NU.dtype == torch.float32 and noise_NE.shape[1] <= cuda.MAX_WIDTH and _applies(logp_NU, noise_NE)


def flow_map(
    logp_NU: Tensor, noise_NE: Tensor, vectors_UE: Tensor, stop_at_N: Tensor, solver: str, steps: int, t_end: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The flow map of distilled decoding (arXiv 2412.17153) for a batch of rows, all steps at once.

    Args:
        logp_NU: float32 log-probabilities of U distinct vectors, normalised; -inf removes one.
        noise_NE, vectors_UE: float32. stop_at_N: posterior weight at which a row ends; above 1: never.
        solver: ``euler``, ``2m`` or ``midpoint``. steps: of a grid uniform in t from 1 to ``t_end``.

    Returns, all ``(N,)``: the likeliest vector where the row ends (int64), t there, its weight, posterior evaluations; and x there (N, E).
    """
    apply = ops.flow_map if integrates_flow(logp_NU, noise_NE) else reference.flow_map
    return apply(logp_NU, noise_NE, vectors_UE, stop_at_N, solver, steps, t_end)
