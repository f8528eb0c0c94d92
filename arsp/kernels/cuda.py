"""The CUDA implementations of the ops: checks, allocates and calls the launchers of csrc/cuda through ctypes.

:func:`load_library` finds or makes the library and registers the functions of :class:`CudaOps` under the dispatch key CUDA, so
``torch.ops.arsp.*`` runs them on CUDA tensors, inside CUDA graphs and under ``torch.compile``, too. Nothing waits for the device.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arsp.errors import ConfigError, ResourceError
from arsp.kernels import build, nvcc, ops, reference

# The launchers' parameters: p pointer, i int, l int64, f float, d double. All return 0 or a cudaError_t; the last one is the stream.
LAUNCHERS = {
    "quantize_per_token": "pilllpppippp",
    "rms_norm_quantize": "pilpifllppppp",
    "modulate_quantize": "pilppilllfllppppp",
    "swiglu_quantize": "plplillppppp",
    "gelu_quantize": "pilllpppp",
    "w4a8_linear": "plppllpllpllipippipillpipillip",
    "w8a8_linear": "plppllplpippipillpipillip",
    "w4a8_swiglu": "plppllpllpllpppipillip",
    "w8a8_swiglu": "plppllplpppillip",
    "windowed_scale_attention": "pppplllllllllppiillp",
    "cached_attention": "pppppppplllllllllllllllpllfliiiiiiip",
    "flow_map": "pppppiillipppppppp",
    "keyed_argmax": "pllllpplpp",
    "verify": "pllpildlpplpppppp",
    "accept_scan": "plplplplpllpp",
    "draw_residual": "pppppppllllpplpp",
}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type of device.cuh
MAX_COLUMNS = 16384  # of a row that is quantised
_QUANTISING = f"float32 and bfloat16, up to {MAX_COLUMNS} columns, torch otherwise"
LIMITS = {  # op -> where its kernel is used
    "quantize_per_token": _QUANTISING,
    "rms_norm_quantize": _QUANTISING,
    "modulate_quantize": _QUANTISING,
    "swiglu_quantize": _QUANTISING,
    "gelu_quantize": _QUANTISING,
    "w8a8_linear": "always",
    "w4a8_linear": "groups of 32, 64, 128 or all columns",
    "w8a8_swiglu": "always",
    "w4a8_swiglu": "groups of 32, 64, 128 or all columns",
    "windowed_scale_attention": "bfloat16, heads of 64, up to 24 scales, torch otherwise",
    "cached_attention": "bfloat16, heads of up to 128 in multiples of 4, without a mask, torch otherwise",
    "flow_map": "float32, vectors of up to 32 numbers",
    "keyed_argmax": "always",
    "verify": "always",
    "accept_scan": "always",
    "draw_residual": "always",
}
WGMMA = int(os.environ.get("ARSP_WGMMA") == "1")  # products of more than 64 rows on sm_90a; not measured yet, so it has to be chosen
ALIGNMENT = 16
WIDTHS = (8, 16, 32)  # of the vectors of flow_map; others are filled up with zeros
MAX_WIDTH = WIDTHS[-1]
SCRATCH_CODES = 1 << 24  # rows x codes that flow_map lists at once
HEAD, MAX_SCALES = 64, 24  # of windowed_scale_attention
MAX_HEAD = 128  # of cached_attention
QUERIES = 64  # that a block of cached_attention takes
PART_SLOTS = 320  # least share of a cache that is worth a part of its own: below, the launch that merges parts costs more than they save
EMULATED_PROCESSORS = 132  # what the emulated device is taken to have

log = logging.getLogger(__name__)


class CudaOps:
    """The ops of a loaded library, each with the signature of its reference. ``emulated``: the library that tests build for the CPU."""

    def __init__(self, path: Path, emulated: bool = False):
        self.library = ctypes.CDLL(str(path))
        self.emulated = emulated
        for name, parameters in LAUNCHERS.items():
            function = getattr(self.library, f"arsp_{name}")
            function.argtypes = [_C_TYPES[kind] for kind in parameters]
        self.library.arsp_error_string.restype = ctypes.c_char_p

    def _call(self, name: str, like: Tensor, *arguments: Tensor | float | None) -> None:
        """Launch on the current stream of the device of ``like``. RuntimeError: CUDA refused it."""
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        function = getattr(self.library, f"arsp_{name}")
        if self.emulated:
            status = function(*values, None)
        elif like.get_device() == torch.cuda.current_device():
            status = function(*values, torch.cuda.current_stream().cuda_stream)
        else:
            with torch.cuda.device(like.device):
                status = function(*values, torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}: {self.library.arsp_error_string(status).decode()}")

    # ---- rows to 8 bits

    def quantize_per_token(
        self, x: Tensor, smooth_K: Tensor | None = None, signs_K: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not _quantisable(x):
            return reference.quantize_per_token(x, smooth_K, signs_K, scale)
        rows, xq, sx = _rows(x), empty(x.shape, torch.int8, x), empty(x.shape[:-1], torch.float32, x)
        given = None if scale is None else scale.float().contiguous()
        step = int(given is not None and given.numel() > 1)
        self._call("quantize_per_token", x, *_matrix(rows), *rows.shape, *_balance(smooth_K, signs_K), given, step, xq, sx)
        return xq, sx

    def rms_norm_quantize(
        self, x: Tensor, weight_K: Tensor, eps: float, smooth_K: Tensor | None = None, signs_K: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not _quantisable(x, weight_K):
            return reference.rms_norm_quantize(x, weight_K, eps, smooth_K, signs_K)
        rows, xq, sx = _rows(x), empty(x.shape, torch.int8, x), empty(x.shape[:-1], torch.float32, x)
        weight_K = weight_K.contiguous()
        balance = _balance(smooth_K, signs_K)
        self._call("rms_norm_quantize", x, *_matrix(rows), weight_K, _TYPES[weight_K.dtype], eps, *rows.shape, *balance, xq, sx)
        return xq, sx

    def modulate_quantize(
        self, x_RnK: Tensor, scale_R1K: Tensor, shift_R1K: Tensor, eps: float, smooth_K: Tensor | None = None, signs_K: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shared = scale_R1K.dim() == 3 and scale_R1K.shape[1] == 1 and scale_R1K.shape == shift_R1K.shape
        if not (_quantisable(x_RnK, scale_R1K) and shared and scale_R1K.dtype == shift_R1K.dtype):
            return reference.modulate_quantize(x_RnK, scale_R1K, shift_R1K, eps, smooth_K, signs_K)
        rows, xq, sx = _rows(x_RnK), empty(x_RnK.shape, torch.int8, x_RnK), empty(x_RnK.shape[:-1], torch.float32, x_RnK)
        scale, shift = (_rows(by.expand(x_RnK.shape[0], -1, -1)) for by in (scale_R1K, shift_R1K))
        strides = (scale.stride(0), shift.stride(0))
        balance = _balance(smooth_K, signs_K)
        self._call(
            "modulate_quantize", x_RnK, *_matrix(rows), scale, shift, _TYPES[scale.dtype], *strides, x_RnK.shape[1], eps,
            *rows.shape, *balance, xq, sx,
        )  # fmt: skip
        return xq, sx

    def swiglu_quantize(self, a: Tensor, b: Tensor, smooth_K: Tensor | None = None, signs_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not _quantisable(a, b) or a.dtype != b.dtype:
            return reference.swiglu_quantize(a, b, smooth_K, signs_K)
        gate, up, xq, sx = _rows(a), _rows(b), empty(a.shape, torch.int8, a), empty(a.shape[:-1], torch.float32, a)
        balance = _balance(smooth_K, signs_K)
        self._call("swiglu_quantize", a, gate, gate.stride(0), up, up.stride(0), _TYPES[a.dtype], *gate.shape, *balance, xq, sx)
        return xq, sx

    def gelu_quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _quantisable(x):
            return reference.gelu_quantize(x)
        rows, xq = _rows(x), empty(x.shape, torch.int8, x)
        sx, offset = (empty(x.shape[:-1], torch.float32, x) for _ in range(2))
        self._call("gelu_quantize", x, *_matrix(rows), *rows.shape, xq, sx, offset)
        return xq, sx, offset

    # ---- linear layers

    def w8a8_linear(
        self, xq: Tensor, sx: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
        offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        codes, y = _codes(xq), empty((*xq.shape[:-1], len(scale_N)), dtype, xq)
        scales = (scale_N, scale_N.stride(0))
        end = _epilogue(bias_N, offset, rowsum_N, gelu, gain, residual, y)
        sizes = (len(codes), len(scale_N), WGMMA)
        self._call("w8a8_linear", xq, codes, codes.shape[1], sx.contiguous(), *_weight(weight), *scales, *end, *sizes)
        return y

    def w4a8_linear(
        self, xq: Tensor, sx: Tensor, weight: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
        offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        num, group = len(scales_NG), _group("w4a8_linear", xq, scales_NG)
        codes, y = _codes(xq), empty((*xq.shape[:-1], num), dtype, xq)
        scales = (scales_NG, *scales_NG.stride(), zeros_NG, *zeros_NG.stride(), group)
        end = _epilogue(bias_N, offset, rowsum_N, gelu, gain, residual, y)
        sizes = (len(codes), num, WGMMA)
        self._call("w4a8_linear", xq, codes, codes.shape[1], sx.contiguous(), *_weight(weight), *scales, *end, *sizes)
        return y

    def w8a8_swiglu(
        self, xq: Tensor, sx: Tensor, gate: Tensor, gate_scale_N: Tensor, up: Tensor, up_scale_N: Tensor, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        codes, y = _codes(xq), empty((*xq.shape[:-1], len(gate_scale_N)), dtype, xq)
        gate_scale_N, up_scale_N = gate_scale_N.contiguous(), up_scale_N.contiguous()
        weights = (*_weight(gate), gate_scale_N, 1, up.contiguous(), up_scale_N)
        sizes = (len(codes), y.shape[-1], WGMMA)
        self._call("w8a8_swiglu", xq, codes, codes.shape[1], sx.contiguous(), *weights, y, _TYPES[dtype], *sizes)
        return y

    def w4a8_swiglu(
        self, xq: Tensor, sx: Tensor, gate: Tensor, gate_scales_NG: Tensor, gate_zeros_NG: Tensor,
        up: Tensor, up_scales_NG: Tensor, up_zeros_NG: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        group = _group("w4a8_swiglu", xq, gate_scales_NG)
        codes, y = _codes(xq), empty((*xq.shape[:-1], len(gate_scales_NG)), dtype, xq)
        gate_scales_NG, up_scales_NG = _one_layout(gate_scales_NG, up_scales_NG)
        gate_zeros_NG, up_zeros_NG = _one_layout(gate_zeros_NG, up_zeros_NG)
        scales = (gate_scales_NG, *gate_scales_NG.stride(), gate_zeros_NG, *gate_zeros_NG.stride())
        weights = (*_weight(gate), *scales, up.contiguous(), up_scales_NG, up_zeros_NG, group)
        sizes = (len(codes), y.shape[-1], WGMMA)
        self._call("w4a8_swiglu", xq, codes, codes.shape[1], sx.contiguous(), *weights, y, _TYPES[dtype], *sizes)
        return y

    # ---- draws

    def keyed_argmax(self, log_w_RV: Tensor, seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0) -> Tensor:
        rows, codes = _rows(log_w_RV), empty(ids_R.shape, torch.int64, log_w_RV)
        key = (seed, ids_R.contiguous(), positions_R.contiguous(), purpose | stream << 8)
        self._call("keyed_argmax", rows, rows, rows.stride(0), *rows.shape, *key, codes)
        return codes

    def verify(
        self, logits_RV: Tensor, drafts_R: Tensor, temperature: float, top_k: int, top_p: float,
        seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
        uncond_RV: Tensor | None = None, scale: float = 1.0, ramp: bool = False, guided_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        codes, last = (empty(drafts_R.shape, torch.int64, logits_RV) for _ in range(2))
        log_p, lse, threshold = (empty(drafts_R.shape, torch.float32, logits_RV) for _ in range(3))
        divisor = max(temperature, reference.MIN_TEMPERATURE) if temperature else 1.0
        logits = _Logits(logits_RV, uncond_RV, scale, ramp, guided_R, divisor, self.emulated)
        law, key = (int(temperature == 0), top_k, top_p), (seed, ids_R.contiguous(), positions_R.contiguous(), purpose | stream << 8)
        results = (codes, log_p, lse, threshold, last)
        self._call("verify", logits_RV, ctypes.addressof(logits), *logits_RV.shape, drafts_R.contiguous(), *law, *key, *results)
        return results

    def accept_scan(
        self, drafts_Bm: Tensor, drawn_Bm: Tensor, known_B: Tensor, ratio_Bm: Tensor | None = None, uniform_Bm: Tensor | None = None
    ) -> Tensor:
        counts, given = empty(known_B.shape, torch.int64, known_B), (drafts_Bm, drawn_Bm, ratio_Bm, uniform_Bm)
        rows = [None if x is None else _rows(x) for x in given]
        strided = [value for x in rows for value in (x, 0 if x is None else x.stride(0))]
        self._call("accept_scan", known_B, *strided, known_B.contiguous(), *drafts_Bm.shape, counts)
        return counts

    def draw_residual(
        self, p: Sequence[Tensor | None], p_how: Sequence[float], rows_R: Tensor, q: Sequence[Tensor | None], q_how: Sequence[float],
        sources_R: Tensor, drafts_R: Tensor, prior: Tensor | None, places_R: Tensor | None,
        seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
    ) -> Tensor:  # fmt: skip
        codes = empty(rows_R.shape, torch.int64, rows_R)
        target, recorded = _Laws(p, p_how, self.emulated), _Laws(q, q_how, self.emulated) if q else None
        given = [None if x is None else x.contiguous() for x in (rows_R, sources_R, drafts_R, prior, places_R, ids_R, positions_R)]
        laws = (ctypes.addressof(target), None if recorded is None else ctypes.addressof(recorded))
        key = (seed, *given[5:], purpose | stream << 8)
        self._call("draw_residual", rows_R, *laws, *given[:5], 0 if prior is None else len(prior), len(rows_R), p[0].shape[1], *key, codes)
        return codes

    # ---- attention

    def windowed_scale_attention(
        self, q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int
    ) -> Tensor:
        if not windows_fit(q_BHnD, v_GHTD, scale_index):
            return reference.windowed_scale_attention(q_BHnD, k_BHTD, v_GHTD, windows_Hs, sides, scale_index)
        out = empty((*v_GHTD.shape[:2], q_BHnD.shape[2], HEAD), q_BHnD.dtype, q_BHnD)
        q, k, v = (_aligned(tensor) for tensor in (q_BHnD, k_BHTD, v_GHTD))
        strides = [stride for tensor in (q, k, v) for stride in tensor.stride()[:3]]
        maps = (ctypes.c_int * (scale_index + 1))(*sides[: scale_index + 1])
        rows, heads = q.shape[:2]
        self._call(
            "windowed_scale_attention", q, q, k, v, out, *strides, windows_Hs.contiguous(), maps, scale_index,
            v.shape[0] // max(rows, 1), rows, heads,
        )  # fmt: skip
        return out

    def cached_attention(
        self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, k_cache: Tensor, v_cache: Tensor, start: int,
        mask: Tensor | None = None, scale: float | None = None, starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        (rows, heads, n, width), capacity = q_BHnD.shape, k_cache.shape[2]
        piece = 8 if width % 8 == 0 and _fits(k_cache, ALIGNMENT) and _fits(v_cache, ALIGNMENT) else 4
        fits = mask is None and n > 0 and heads_fit(k_cache, piece) and heads_fit(v_cache, piece) and k_cache.shape == v_cache.shape
        fits &= all(x.dtype == torch.bfloat16 and x.shape == q_BHnD.shape for x in (q_BHnD, k_BHnD, v_BHnD)) and width == k_cache.shape[3]
        if starts is None:
            fits &= 0 <= start <= capacity - n
        else:
            fits &= starts.dtype == torch.int64 and starts.shape == (rows,) and starts.device == q_BHnD.device
        if not fits or len(k_cache) < rows:
            return reference.cached_attention(q_BHnD, k_BHnD, v_BHnD, k_cache, v_cache, start, mask, scale, starts)
        out = empty((rows, n, heads, width), q_BHnD.dtype, q_BHnD)
        q, k, v = (_aligned(x, 2 * piece) for x in (q_BHnD, k_BHnD, v_BHnD))
        parts, warps = _shares(rows * heads * -(-n // QUERIES), width, capacity, _processors(q.device))
        values = empty((rows, heads, parts, n, width), torch.float32, q) if parts > 1 else None
        most = empty((rows, heads, parts, n, 2), torch.float32, q) if parts > 1 else None
        strides = [stride for x in (q, k, v, k_cache, v_cache) for stride in x.stride()[:3]]
        self._call(
            "cached_attention", q, q, k, v, k_cache, v_cache, out, values, most, *strides,
            starts, 0 if starts is None else starts.stride(0), start, width**-0.5 if scale is None else scale,
            rows, heads, n, width, capacity, parts, warps, piece,
        )  # fmt: skip
        return out.transpose(1, 2)

    # ---- flow map

    def flow_map(
        self, logp_NU: Tensor, noise_NE: Tensor, vectors_UE: Tensor, stop_at_N: Tensor, solver: str, steps: int, t_end: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        (num, codes), dim = logp_NU.shape, noise_NE.shape[1]
        if dim > MAX_WIDTH or logp_NU.dtype != torch.float32 or noise_NE.dtype != torch.float32:
            return reference.flow_map(logp_NU, noise_NE, vectors_UE, stop_at_N, solver, steps, t_end)
        width = next(width for width in WIDTHS if width >= dim)
        noise, vectors = (F.pad(x.float(), (0, width - dim)).contiguous() for x in (noise_NE, vectors_UE))
        logp, stop_at = logp_NU.contiguous(), stop_at_N.float().contiguous()
        grid = _flow_grid(solver, steps, t_end, logp.device)
        group, state = empty((num,), torch.int64, logp), empty((num, width), torch.float32, logp)
        stop_t, weight, evaluations = (empty((num,), torch.float32, logp) for _ in range(3))
        chunk = max(1, SCRATCH_CODES // codes)
        listed, logs = (empty((min(chunk, num), codes), dtype, logp) for dtype in (torch.int32, torch.float32))
        for start in range(0, num, chunk):
            part = slice(start, start + chunk)
            self._call(
                "flow_map", logp, logp[part], noise[part], vectors, stop_at[part], grid, ("euler", "2m", "midpoint").index(solver), steps,
                len(logp[part]), codes, width, listed, logs, group[part], stop_t[part], weight[part], evaluations[part], state[part],
            )  # fmt: skip
        return group, stop_t, weight, evaluations, state[:, :dim].contiguous()


@lru_cache(maxsize=16)
def _flow_grid(solver: str, steps: int, t_end: float, device: torch.device) -> Tensor:
    return torch.tensor(reference.flow_grid(solver, steps, t_end), dtype=torch.float32, device=device)


def windows_fit(q_BHnD: Tensor, v_GHTD: Tensor, scale_index: int = 0) -> bool:
    """Whether windowed_scale_attention has a kernel for these tensors."""
    heads_fit = q_BHnD.shape[-1] == HEAD and v_GHTD.shape[-1] == HEAD
    return q_BHnD.dtype == torch.bfloat16 and heads_fit and q_BHnD.shape[0] > 0 and scale_index < MAX_SCALES


def heads_fit(cache: Tensor, piece: int = 4) -> bool:
    """Whether cached_attention has a kernel for a cache (B, H, capacity, D), read ``piece`` dimensions at a time."""
    return cache.dtype == torch.bfloat16 and cache.shape[3] % piece == 0 and 0 < cache.shape[3] <= MAX_HEAD and _fits(cache, 2 * piece)


def _shares(blocks: int, width: int, capacity: int, processors: int) -> tuple[int, int]:
    """Parts that the slots of a row are divided into, and warps of a block: few blocks are made more and larger."""
    parts = max(1, min(processors // max(blocks, 1), capacity // PART_SLOTS))
    return parts, 16 if width <= 64 and blocks * parts <= processors else 8


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else EMULATED_PROCESSORS


def _fits(x: Tensor, alignment: int) -> bool:
    """Whether rows of neighbouring values begin at multiples of so many bytes."""
    return x.stride(-1) == 1 and x.data_ptr() % alignment == 0 and all(s * x.element_size() % alignment == 0 for s in x.stride()[:-1])


def _aligned(x: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """``x`` with rows that begin at multiples of so many bytes, in place where they do."""
    return x if _fits(x, alignment) else x.clone(memory_format=torch.contiguous_format)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """What kernels write their results to."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def _quantisable(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in _TYPES and 0 < x.shape[-1] <= MAX_COLUMNS and all(other.dtype in _TYPES for other in others)


def _rows(x: Tensor) -> Tensor:
    """``x`` as a matrix with neighbouring columns, in place where its strides allow."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


class _Logits(ctypes.Structure):
    """Logits as a model made them, and what comes before filters: ``struct Logits`` of verify.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cond", "uncond", "guided")),
        *((name, ctypes.c_int64) for name in ("cond_stride", "uncond_stride")),
        *((name, ctypes.c_int) for name in ("type", "ramp")),
        *((name, ctypes.c_float) for name in ("scale", "gain", "divisor", "inverse")),
    )  # fmt: skip

    def __init__(
        self, cond_RV: Tensor, uncond_RV: Tensor | None, scale: float, ramp: bool, guided_R: Tensor | None, divisor: float, emulated: bool
    ):
        cond, uncond = _rows(cond_RV), None if uncond_RV is None else _rows(uncond_RV)
        guided = None if guided_R is None else guided_R.contiguous()
        self.tensors = (cond, uncond, guided)  # alive until the launch
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self.tensors]
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (cond, uncond)]
        # torch divides by a number on the CPU and multiplies by its inverse on CUDA; Law, which is torch, has to find the same values
        inverse = 0.0 if emulated else 1 / ctypes.c_float(divisor).value
        super().__init__(*pointers, *strides, _TYPES[cond.dtype], int(ramp), scale, 1 + scale, divisor, inverse)


class _Laws(ctypes.Structure):
    """Laws as draw_residual takes them: ``struct Laws`` of verify.cu."""

    _fields_ = (("logits", _Logits), *((name, ctypes.c_void_p) for name in ("lse", "threshold", "last")), ("num", ctypes.c_int64))

    def __init__(self, law: Sequence[Tensor | None], how: Sequence[float], emulated: bool):
        cond, uncond, guided, *numbers = law
        self.rows = _Logits(cond, uncond, how[0], bool(how[1]), guided, how[2], emulated)
        self.tensors = [x.contiguous() for x in numbers]  # alive until the launch, as what the rows hold
        super().__init__(self.rows, *(x.data_ptr() for x in self.tensors), len(cond))


def _matrix(rows: Tensor) -> tuple[Tensor, int, int]:
    return rows, _TYPES[rows.dtype], rows.stride(0)


def _balance(smooth_K: Tensor | None, signs_K: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if smooth_K is None else smooth_K.float().contiguous(), None if signs_K is None else signs_K.contiguous()


def _codes(xq: Tensor) -> Tensor:
    """Rows of codes that begin at multiples of 16 bytes, filled up with zeros."""
    codes = xq.flatten(0, -2) if xq.dim() > 1 else xq[None]
    codes = F.pad(codes, (0, -codes.shape[1] % ALIGNMENT)).contiguous()
    return codes if codes.data_ptr() % ALIGNMENT == 0 else codes.clone()


def _weight(weight: Tensor) -> tuple[Tensor, int, int]:
    """Packed weight, tiles and pieces a tile."""
    weight = weight.contiguous()
    return weight, weight.shape[0], weight.shape[1]


def _group(op: str, xq: Tensor, scales_NG: Tensor) -> int:
    """Columns that share a scale, -1 for all of them. ConfigError: no kernel has such groups."""
    groups = scales_NG.shape[1]
    group = -1 if groups == 1 else xq.shape[-1] // groups
    if group not in (32, 64, 128, -1):
        raise ConfigError(f"{op}: no CUDA kernel for groups of {group} columns.", "32, 64, 128 or all columns are offered.")
    return group


def _one_layout(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a, b) if a.stride() == b.stride() else (a.contiguous(), b.contiguous())


def _numbers(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Numbers that a kernel reads, and their type."""
    if x is None:
        return None, 0
    x = x if x.dtype in _TYPES else x.float()
    return x, _TYPES[x.dtype]


def _epilogue(
    bias_N: Tensor | None, offset: Tensor | None, rowsum_N: Tensor | None, gelu: bool, gain: Tensor | None, residual: Tensor | None,
    y: Tensor,
) -> tuple[Tensor | int | None, ...]:  # fmt: skip
    """What follows the sum over columns, and where its result goes."""
    shifted = offset is not None and rowsum_N is not None
    bias_N, offset, rowsum_N, residual = (
        None if t is None else t.contiguous() for t in (bias_N, offset if shifted else None, rowsum_N if shifted else None, residual)
    )
    rows = 1
    if gain is not None:  # (R, 1, N), of the n rows each of y (R, n, N)
        gain, rows = _rows(gain), y.shape[1]
    gains = (*_numbers(gain), 0 if gain is None else gain.stride(0), max(rows, 1))
    return *_numbers(bias_N), offset, rowsum_N, int(gelu), *gains, *_numbers(residual), y, _TYPES[y.dtype]


# ---- finding or making the library


def device_architecture() -> str:
    """What of :data:`nvcc.ARCHITECTURES` serves the current device best. ResourceError: no device, or one older than sm_80."""
    if not torch.cuda.is_available():
        raise ResourceError("no CUDA device is available")
    major, minor = torch.cuda.get_device_capability()
    fitting = [arch for arch in nvcc.ARCHITECTURES if (int(arch.rstrip("a")) // 10, int(arch.rstrip("a")) % 10) <= (major, minor)]
    if not fitting:
        raise ResourceError(f"the CUDA kernels need a device of compute capability 8.0, this one has {major}.{minor}")
    return fitting[-1]


def cached_library(architecture: str) -> Path:
    """Where the library that this machine's nvcc compiles for an architecture is, or will be."""
    version = ".".join(map(str, nvcc.nvcc_version(str(nvcc.find_nvcc()))))
    return build.cache_root() / "kernels" / f"cuda-{nvcc.source_digest()}-{version}-sm{architecture}.so"


def state() -> tuple[bool, str]:
    """Whether CUDA tensors would get kernels, and which library or why not. Compiles nothing."""
    try:
        architecture = device_architecture()
        prebuilt = nvcc.prebuilt_library()
        if prebuilt.exists():
            return True, "prebuilt in the package"
        if cached_library(architecture).exists():
            return True, f"compiled for sm_{architecture} into {build.cache_root()}"
        return True, f"compiled for sm_{architecture} at the first use with {nvcc.find_nvcc()} into {build.cache_root()}"
    except ResourceError as error:
        return False, error.message


def find_library() -> tuple[Path, str]:
    """The library for the current device, and where it comes from: the package, or compiled now if it was not. ResourceError: no
    device, no nvcc, or compiling failed."""
    architecture = device_architecture()
    prebuilt = nvcc.prebuilt_library()
    if prebuilt.exists():
        return prebuilt, "prebuilt in the package"
    target = cached_library(architecture)
    # a newer device than all named ones gets PTX, which its driver compiles
    newer = torch.cuda.get_device_capability() > (9, 0)

    def make(path: Path) -> None:
        log.warning("compiling the CUDA kernels for sm_%s with %s, once (20 s or more)", architecture, nvcc.find_nvcc())
        started = time.perf_counter()
        nvcc.compile_library(path, () if newer else (architecture,), ptx=newer)
        log.info("compiled %s in %.1f s", path, time.perf_counter() - started)

    return build.cached(target, make), f"compiled for sm_{architecture} into {build.cache_root()}"


_loaded: list[tuple[CudaOps, str]] = []


def load_library() -> str:
    """Find or compile the library and register it, once; returns where it comes from. ResourceError: there is none."""
    if not _loaded:
        path, origin = find_library()
        try:
            kernels = CudaOps(path)
        except (OSError, AttributeError) as error:
            raise ResourceError(f"{path} does not load: {error}", "Delete it; it is compiled again at the next use.") from error
        for name in LAUNCHERS:
            torch.library.impl(f"arsp::{name}", "CUDA", getattr(kernels, name))
        _loaded.append((kernels, origin))
    return _loaded[0][1]


assert ops  # the schemas come first
