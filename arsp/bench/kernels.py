"""Each kernel against torch on the shapes of LlamaGen GPT-B, weights streamed from memory as in decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from arsp import kernels
from arsp.bench.timing import measure, speedup

SHAPES = {"wqkv": (2304, 768), "wo": (768, 768), "w1": (2048, 768), "w2": (768, 2048), "output": (16384, 768)}  # (N, K) of GPT-B
STREAM_BYTES = 96 << 20  # copies of a weight that are cycled through: more than the last-level cache of most processors


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
