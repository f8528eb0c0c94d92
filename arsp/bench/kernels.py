"""Each kernel against torch where it is used: layers of LlamaGen GPT-B with weights streamed from memory as in decoding one
image, attention of the last scale of VAR-d16, and the draws of a window of 16 tokens of LlamaGen and one more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.bench.timing import measure, speedup
from arsp.kernels import reference
from arsp.kernels.reference import window_mask
from arsp.rng import Purpose

SHAPES = {"wqkv": (2304, 768), "wo": (768, 768), "w1": (2048, 768), "w2": (768, 2048), "output": (16384, 768)}  # (N, K) of GPT-B
STREAM_BYTES = 96 << 20  # copies of a weight that are cycled through: more than the last-level cache of most processors
MAPS = {  # official sides of VAR by pixels
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
HEADS, HEAD_DIM = 16, 64  # VAR-d16
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
