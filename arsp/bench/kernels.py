"""Each kernel against torch where it is used: layers of LlamaGen GPT-B with weights streamed from memory as in decoding one
image, attention of the last scale of VAR-d16, the draws of a window of 16 tokens of LlamaGen and one more, and quantised layers of
the smallest and largest models of both families that fit a CPU, with cold weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.bench.timing import measure, speedup
from arsp.kernels import reference
from arsp.kernels.reference import window_mask
from arsp.quant.balance import rotation_signs
from arsp.rng import Purpose

SHAPES = {"wqkv": (2304, 768), "wo": (768, 768), "w1": (2048, 768), "w2": (768, 2048), "output": (16384, 768)}  # (N, K) of GPT-B
ROWS = (1, 2, 4, 8, 16)
QUANTISED_SHAPES = {  # (N, K)
    f"{model} {layer}": shape
    for model, width, hidden in (("B", 768, 2048), ("XL", 1280, 3584), ("d16", 1024, 4096), ("d30", 1920, 7680))
    for layer, shape in {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}.items()
}
QUANTISED_ROWS = (1, 16)
GROUP_SIZE = 128
MAX_INT4_ROWS = 16  # torch's product of 4-bit weights is meant for few rows
CALLS = 50  # of a small operator in a timed region
HEADS, HEAD_DIM = 16, 64  # VAR-d16; heads of LlamaGen are as wide
ROW_OPS: dict[str, Callable[[torch.Tensor], tuple[Any, ...]]] = {  # x (rows, width) -> arguments
    "quantize_per_token": lambda x: (x,),
    "rms_norm_quantize": lambda x: (x, x[0], 1e-5),
    "modulate_quantize": lambda x: (x[None], x[:1, None], x[:1, None], 1e-6),
    "swiglu_quantize": lambda x: (x, x),
    "gelu_quantize": lambda x: (x,),
    "rms_norm": lambda x: (x, x[0], 1e-5),
    "apply_rope": lambda x: (x.view(len(x), 1, -1, HEAD_DIM), torch.ones(1, HEAD_DIM // 2, 2)),
}
STREAM_BYTES = 96 << 20  # copies of a weight that are cycled through: more than the last-level cache of most processors
MAPS = {  # official sides of VAR by pixels
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
WINDOWS = (1, 2, 3)
WINDOW_ROWS, CODES = 17, 16384
LAWS = {"plain": (1.0, 0, 1.0), "top-k 2000, top-p 0.95": (1.0, 2000, 0.95)}  # temperature, top_k, top_p


def bench_small_linear(
    rows: list[int], dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One line per (shape, rows): microseconds of both, weight bandwidth of ours, ratio > 1 = the kernel is faster."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for name, (outputs, columns) in SHAPES.items():
        size = outputs * columns * dtype.itemsize
        weights = [torch.randn(outputs, columns, generator=generator).to(dtype) for _ in range(max(2, STREAM_BYTES // size))]
        for num in rows:
            x = torch.randn(num, columns, generator=generator).to(dtype)
            lines.append(_line(name, x, weights, repeats))
            if progress:
                progress(1)
    return lines


@torch.inference_mode()
def _line(name: str, x_MK: torch.Tensor, weights: list[torch.Tensor], repeats: int) -> dict[str, Any]:
    work = {
        "kernel": lambda: [kernels.small_linear(x_MK, weight) for weight in weights],
        "torch": lambda: [F.linear(x_MK, weight) for weight in weights],
    }
    timings = measure(work, repeats=repeats, memory=False)
    ratio = speedup(timings["kernel"], timings["torch"])
    kernel_us, torch_us = (timings[key].median_ms * 1e3 / len(weights) for key in ("kernel", "torch"))
    outputs, columns = weights[0].shape
    return {
        "layer": name, "outputs": outputs, "columns": columns, "rows": x_MK.shape[0], "kernel_us": kernel_us, "torch_us": torch_us,
        "weight_gb_per_s": weights[0].numel() * weights[0].element_size() / kernel_us / 1e3,
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
    }  # fmt: skip


@torch.inference_mode()
def bench_windowed_scale_attention(
    dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One line per (map, window): the last scale of VAR-d16, one guided image (two rows), every head and map with that window, against
    torch's dense attention on the same tensors. ``kept`` is the share of query-key pairs that the window keeps."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for pixels, sides in MAPS.items():
        s, total = len(sides) - 1, sum(side * side for side in sides)
        q, k, v = (torch.randn(2, HEADS, n, HEAD_DIM, generator=generator).to(dtype) for n in (sides[-1] ** 2, total, total))
        q *= HEAD_DIM**-0.5
        windows = {r: torch.full((HEADS, s + 1), r, dtype=torch.int32) for r in WINDOWS}
        work = {f"window {r}": partial(kernels.windowed_scale_attention, q, k, v, windows[r], sides, s) for r in WINDOWS}
        work["torch"] = partial(F.scaled_dot_product_attention, q, k, v, scale=1.0)
        timings = measure(work, repeats=repeats, memory=False)
        for r in WINDOWS:
            timing = timings[f"window {r}"]
            ratio = speedup(timing, timings["torch"])
            lines.append({
                "map": f"d16 {pixels} px", "queries": sides[-1] ** 2, "keys": total, "window": r, "rows": 2,
                "kept": window_mask(windows[r][:1], sides, s).float().mean().item(),
                "kernel_us": timing.median_ms * 1e3, "torch_us": timings["torch"].median_ms * 1e3,
                "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
            })  # fmt: skip
        if progress:
            progress(1)
    return lines


@torch.inference_mode()
def bench_keyed_argmax(dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
    """One line: draws from every row of normal logits of deviation 2, against the same in torch."""
    logits, ids = _rows(dtype)
    return [_draw_line("plain", kernels.keyed_argmax, reference.keyed_argmax, (logits, 0, ids, ids, Purpose.TOKEN), repeats, progress)]


@torch.inference_mode()
def bench_verify(dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
    """One line a setting of the filters, on the rows of :func:`bench_keyed_argmax`."""
    logits, ids = _rows(dtype)
    return [
        _draw_line(name, kernels.verify, reference.verify, (logits, ids, *law, 0, ids, ids, Purpose.TOKEN), repeats, progress)
        for name, law in LAWS.items()
    ]


def _rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(WINDOW_ROWS, CODES, generator=torch.Generator().manual_seed(0))
    return logits.to(dtype), torch.arange(WINDOW_ROWS)


def _draw_line(
    name: str, kernel: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...], repeats: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:  # fmt: skip
    timings = measure({"kernel": partial(kernel, *arguments), "torch": partial(plain, *arguments)}, repeats=repeats, memory=False)
    ratio = speedup(timings["kernel"], timings["torch"])
    if progress:
        progress(1)
    rows, codes = arguments[0].shape
    return {
        "law": name, "rows": rows, "codes": codes,
        "kernel_us": timings["kernel"].median_ms * 1e3, "torch_us": timings["torch"].median_ms * 1e3,
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
    }  # fmt: skip


@torch.inference_mode()
def bench_rows(
    op: str, rows: list[int], dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One line per (width, rows) of an operator of ``ROW_OPS``, against the same in torch; ``quantize_per_token`` rotated too."""
    lines = []
    for columns in sorted({columns for _, columns in QUANTISED_SHAPES.values()}):
        forms = {"": ()} | ({", rotated": (None, rotation_signs(columns, 0))} if op == "quantize_per_token" else {})
        for num, (form, more) in itertools.product(rows, forms.items()):
            x = torch.randn(num, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
            work = (partial(getattr(module, op), *ROW_OPS[op](x), *more) for module in (kernels, reference))
            lines.append({"layer": f"width {columns}{form}", "columns": columns, "rows": num, **_against_torch(*work, repeats)})
        if progress:
            progress(len(rows))
    return lines


@torch.inference_mode()
def bench_cached_attention(dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
    """One line per (model, slots): one token of two rows, with a cache of its own for every call, against torch."""
    lines = []
    for model, heads, slots in (("B", 12, 64), ("B", 12, 256), ("XL", 20, 576)):
        q, k, v = (torch.randn(2, heads, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3))
        caches = [[torch.zeros(2, heads, slots, HEAD_DIM, dtype=dtype) for _ in range(2)] for _ in range(CALLS)]
        work = (partial(_through, module.cached_attention, (q, k, v), caches, slots - 1) for module in (kernels, reference))
        lines.append({"layer": f"{model}, {slots} slots", "heads": heads, "rows": 2, **_against_torch(*work, repeats, calls=1, each=CALLS)})
        if progress:
            progress(1)
    return lines


def _through(function: Callable[..., Any], x: tuple[torch.Tensor, ...], caches: list[list[torch.Tensor]], start: int) -> None:
    for cache in caches:
        function(*x, *cache, start)


def _against_torch(
    kernel: Callable[[], Any], plain: Callable[[], Any], repeats: int, calls: int = CALLS, each: int = 1
) -> dict[str, float]:  # fmt: skip
    """Microseconds of both and their ratio; a timed region makes ``calls`` calls of ``each`` operators."""
    timings = measure({"kernel": partial(_many, kernel, calls), "torch": partial(_many, plain, calls)}, repeats=repeats, memory=False)
    ratio = speedup(timings["kernel"], timings["torch"])
    kernel_us, torch_us = (timings[name].median_ms * 1e3 / calls / each for name in ("kernel", "torch"))
    return {"kernel_us": kernel_us, "torch_us": torch_us, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}


def _many(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        function()


@torch.inference_mode()
def bench_quantised_linear(
    bits: int, rows: list[int], dtype: torch.dtype, *, repeats: int = 9, progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One line per (layer, rows): quantising the input and the product, against torch's linear in ``dtype`` and against the fastest
    integer product of this torch that runs here (``peer``: None where there is none). Every callable cycles
    through its own copies of the weight."""
    lines = []
    for name, (outputs, columns) in QUANTISED_SHAPES.items():
        copies = max(2, STREAM_BYTES * 8 // (outputs * columns * bits))
        weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0))
        layers = {"kernel": _quantised(bits, weight), "torch": (F.linear, (weight.to(dtype),)), **_peers(weight)}
        stored = {key: (call, [_copied(arguments) for _ in range(copies)]) for key, (call, arguments) in layers.items()}
        for num in rows:
            x = torch.randn(num, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            inputs = dict.fromkeys(stored, x) | {"dynamic int8": x.float(), "int4 weight": x.bfloat16()}
            work = {key: partial(_cycle, call, inputs[key], weights) for key, (call, weights) in stored.items()}
            if num > MAX_INT4_ROWS:
                work.pop("int4 weight", None)
            timings = measure(work, repeats=repeats, memory=False)
            microseconds = {key: timing.median_ms * 1e3 / copies for key, timing in timings.items()}
            peer = min(timings.keys() - {"kernel", "torch"}, key=microseconds.__getitem__, default=None)
            ratio = speedup(timings["kernel"], timings["torch"])
            lines.append({
                "layer": name, "outputs": outputs, "columns": columns, "rows": num,
                "kernel_us": microseconds["kernel"], "torch_us": microseconds["torch"],
                "peer": peer, "peer_ratio": speedup(timings["kernel"], timings[peer]).value if peer else None,
                "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
            })  # fmt: skip
            if progress:
                progress(1)
    return lines


def _cycle(call: Callable[..., Any], x: torch.Tensor, weights: list[tuple[Any, ...]]) -> None:
    for arguments in weights:
        call(x, *arguments)


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(copy.deepcopy(argument) for argument in arguments)


def _quantised(bits: int, weight_NK: torch.Tensor) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The layer from float to float, and its weight. Codes are random: only their number matters here."""
    outputs, columns = weight_NK.shape
    if bits == 8:

        def layer(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return kernels.w8a8_linear(*kernels.quantize_per_token(x), packed, scale, dtype=x.dtype)

        return layer, (kernels.pack_w8_cpu(weight_NK.mul(30).clamp(-127, 127).to(torch.int8)), torch.ones(outputs))
    group = GROUP_SIZE if columns % GROUP_SIZE == 0 else -1
    groups = columns // GROUP_SIZE if group > 0 else 1

    def layer(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        return kernels.w4a8_linear(*kernels.quantize_per_token(x), packed, scales, zeros, group, dtype=x.dtype)

    words = weight_NK.view(torch.int32)[:, : columns // 8]
    return layer, (kernels.pack_w4_cpu(words), torch.ones(groups, outputs).mT, torch.full((groups, outputs), 8, dtype=torch.uint8).mT)


def _peers(weight_NK: torch.Tensor) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Integer products of this torch that run on this machine: dynamic 8 bits (float32 in and out) and 4-bit weights with groups
    (bfloat16 in and out)."""
    outputs, columns = weight_NK.shape
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    with contextlib.suppress(AttributeError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that these functions are to go: a torch without them has no such peer
        scales, zeros = torch.full((outputs,), 0.03, dtype=torch.float64), torch.zeros(outputs, dtype=torch.int64)
        codes = torch.quantize_per_channel(weight_NK, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(codes, None)
        torch.ops.quantized.linear_dynamic(torch.zeros(1, columns), packed, True)
        found["dynamic int8"] = (lambda x, packed: torch.ops.quantized.linear_dynamic(x, packed, True)), (packed,)
    with contextlib.suppress(AttributeError, RuntimeError):
        codes_NK = (weight_NK * 4 + 8).clamp(0, 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
        scales = torch.ones(columns // GROUP_SIZE, outputs, 2, dtype=torch.bfloat16)
        torch.ops.aten._weight_int4pack_mm_for_cpu(torch.zeros(1, columns, dtype=torch.bfloat16), packed, GROUP_SIZE, scales)
        call = lambda x, packed, scales: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales)  # noqa: E731
        found["int4 weight"] = call, (packed, scales)
    return found
