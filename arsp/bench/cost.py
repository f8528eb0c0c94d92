"""What a decode must do, counted from the model's sizes: passes, multiply-accumulates, bytes of weights and cache; and the
least time the machine could need for it (roofline).

Counting rules. One MAC = one multiplication and one addition. Linear layers: rows x outputs x inputs; a lookup, a norm, the
rotation, the softmax and sampling count nothing. Attention: 2 D MACs per head for every (query, visible key) pair; the query at
sequence position p sees the p + 1 slots 0..p (prefix first, then raster order). ``rows`` counts both halves of guidance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from arsp.bench.timing import synchronize
from arsp.models.llamagen import GPTConfig


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches: bytes per second of a large copy (read plus written) and float32 MACs per second of a large product."""

    bytes_per_s: float
    macs_per_s: float

    def seconds(self, num_bytes: float, macs: float) -> float:
        """Least time for work that must move ``num_bytes`` and do ``macs``, were the two perfectly overlapped."""
        return max(num_bytes / self.bytes_per_s, macs / self.macs_per_s)


def layer_weights(config: GPTConfig) -> int:
    """Matrix entries of one block: wqkv, wo, w1, w3, w2."""
    return 4 * config.dim**2 + 3 * config.dim * config.ffn_dim


def decode_weight_bytes(config: GPTConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of weights that every decode step reads once: all blocks with their norms, the final norm, the head."""
    norms = (2 * config.n_layer + 1) * config.dim
    return (config.n_layer * layer_weights(config) + norms + config.vocab_size * config.dim) * dtype.itemsize


def kv_bytes(config: GPTConfig, length: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of ``length`` valid cache slots of ``rows`` sequences: keys and values of all layers."""
    return 2 * config.n_layer * config.dim * length * rows * dtype.itemsize


def pass_macs(config: GPTConfig, *, start: int, num: int, num_logits: int, rows: int = 1) -> int:
    """MACs of one cached pass that feeds ``num`` positions ``start .. start + num - 1`` and makes logits for ``num_logits`` of them."""
    pairs = sum(position + 1 for position in range(start, start + num))
    linear = num * config.n_layer * layer_weights(config) + num_logits * config.vocab_size * config.dim
    return rows * (linear + config.n_layer * 2 * config.dim * pairs)


def decode_macs(config: GPTConfig, *, num_tokens: int | None = None, rows: int = 1) -> int:
    """MACs of sampling one raster sequence: the prefix in one pass, then every code but the last in one pass each."""
    prefix = config.cls_token_num
    total = pass_macs(config, start=0, num=prefix, num_logits=1, rows=rows)
    if config.model_type == "t2i":
        total += rows * prefix * (config.caption_dim * config.dim + config.dim**2)
    steps = (config.block_size if num_tokens is None else num_tokens) - 1
    return total + sum(pass_macs(config, start=prefix + i, num=1, num_logits=1, rows=rows) for i in range(steps))


def decode_bytes(config: GPTConfig, *, rows: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that sampling one raster sequence must at least move: the weights once a pass, the valid cache read once a pass."""
    prefix, steps = config.cls_token_num, config.block_size - 1
    cache = sum(kv_bytes(config, prefix + i + 1, rows, dtype) for i in range(steps))
    return (steps + 1) * decode_weight_bytes(config, dtype) + cache


def measure_roofline(device: torch.device | str = "cpu", *, megabytes: int = 256, size: int = 1536, repeats: int = 5) -> Roofline:
    """Best of ``repeats``: a copy far larger than the caches, and a float32 matrix product of ``size`` cubed."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    a = torch.ones(size, size, device=device)
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(repeats))
    product = min(_seconds(lambda: a @ a, device) for _ in range(repeats))
    return Roofline(2 * source.numel() * 4 / copy, size**3 / product)


def _seconds(work: Callable[[], object], device: torch.device | str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
