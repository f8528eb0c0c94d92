"""Times every CUDA kernel beside its roofline and beside what torch offers: ``python benchmarks/gpu_kernels.py --out FILE.json``.

A case is a CUDA graph of CALLS calls that cycle through copies of its data, more than any second-level cache together, so operands come
from memory and launches cost what they cost inside a graph. Graphs of a case take turns; figures are medians over rounds, ratios medians
of the ratios within a round. Exit codes: 0, 5 without a CUDA device, 7 if a group of cases failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arsp import kernels
from arsp.bench.timing import measure, speedup
from arsp.decode.ar import decode_blocks
from arsp.distill.flow import keyed_noise, prepare_codebook, sample_through_map, stop_weights
from arsp.errors import EXIT_GATE, EXIT_OK, EXIT_RESOURCE
from arsp.kernels import cuda, reference
from arsp.kernels.reference import causal_mask, window_mask
from arsp.protocols import Request
from arsp.runs import environment, now, write_json
from arsp.stack import StackConfig, build

CALLS = 24  # of a graph
COLD_BYTES = 256 << 20  # operands of a graph together: several times the second-level cache of any device there is
REPEATS = 11
LAYERS = {  # (N, K) of layers whose weights are large enough to be worth a kernel of their own
    "LlamaGen-XL w1": (3584, 1280), "LlamaGen-XL w1 and w3": (7168, 1280), "LlamaGen-3B w1 and w3": (17408, 3200),
    "LlamaGen-3B w2": (3200, 8704), "VAR-d30 fc1": (7680, 1920),
}  # fmt: skip
LAYER_ROWS = (1, 2, 16, 64, 256, 2048)
GROUP = 128
GATED = "w1 and w3"  # layers of a SwiGLU, one behind the other
MANY_ROWS = 64  # more than these can be multiplied by wgmma
PRODUCERS = ((2, 3200), (512, 1920), (4096, 1920))  # rows, columns
SIDES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
ATTENTION = [(pixels, batch, r) for pixels in (256, 512) for batch in (8, 32) for r in (1, 2)]  # both guidance halves: twice the rows
HEADS, HEAD_DIM = 16, 64  # VAR-d16
FUSED = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")  # back ends of torch's attention
WINDOW, CODES, BATCHES = 16, 16384, (1, 8, 32)
DECODERS = {"LlamaGen-XL": (20, 64), "LlamaGen-3B": (32, 100)}  # heads and their width
DECODE = [  # model, batch (both guidance halves: twice the rows), slots of a cache, queries, whether rows hold different numbers of slots
    (model, batch, slots, queries, ragged)
    for model, batches in (("LlamaGen-XL", BATCHES), ("LlamaGen-3B", (8,)))
    for batch in batches for slots in (256, 1024) for queries in (1, WINDOW + 1) for ragged in (False, True)
]  # fmt: skip
LAWS = {"plain": (1.0, 0, 1.0), "top-k 2000": (1.0, 2000, 1.0), "top-k 2000, top-p 0.95": (1.0, 2000, 0.95)}
FLOWS = {"LlamaGen, batch 256": (256, 16384, 8, 8000), "VAR, 4096 rows": (4096, 4096, 32, 900)}  # rows, codes, width, top-k


class Bench:
    """Times calls on a device; on the CPU, where only tests use it, without graphs."""

    def __init__(self, device: str, calls: int = CALLS, cold_bytes: int = COLD_BYTES, repeats: int = REPEATS):
        self.device, self.calls, self.cold_bytes, self.repeats = device, calls, cold_bytes, repeats
        self.copy_bytes_per_s = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        source = torch.zeros(self.cold_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = measure({"copy": lambda: target.copy_(source)}, repeats=self.repeats, device=self.device, memory=False)["copy"]
        return 2 * self.cold_bytes / (timing.median_ms / 1e3)

    def copies(self, num_bytes: int, make: Callable[[], Any]) -> list[Any]:
        """As many of ``make()`` as are cold together, at most one a call."""
        return [make() for _ in range(min(self.calls, max(2, -(-self.cold_bytes // max(num_bytes, 1)))))]

    def graph(self, call: Callable[[Any], Any], data: list[Any], captured: bool = True) -> Callable[[], Any]:
        """A callable that makes all calls of a case, as a CUDA graph unless they cannot be captured."""

        def all_calls() -> None:
            for i in range(self.calls):
                call(data[i % len(data)])

        if self.device == "cpu" or not captured:
            return all_calls
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(data[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        return graph.replay

    def line(self, op: str, case: str, num_bytes: int, work: dict[str, Callable[[], Any]], **more: Any) -> dict[str, Any]:
        """One line: microseconds of the first of ``work``, the bytes it has to move and its share of the copy bandwidth, and how many
        times as long the fastest of the others takes."""
        ours, *others = work
        timings = measure(work, repeats=self.repeats, warmup=2, device=self.device, memory=False)
        micros = {name: timing.median_ms * 1e3 / self.calls for name, timing in timings.items()}
        roof_us = num_bytes / self.copy_bytes_per_s * 1e6
        entry = {
            "op": op,
            "case": case,
            "us": micros[ours],
            "bytes": num_bytes,
            "roof_us": roof_us,
            "share": roof_us / micros[ours],
            **more,
        }
        if others:
            best = min(others, key=micros.__getitem__)
            ratio = speedup(timings[ours], timings[best])
            entry |= {"others_us": {name: micros[name] for name in others}, "against": best}
            entry |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        return entry


def bench_linear(bench: Bench, layers: dict[str, tuple[int, int]] = LAYERS, rows: tuple[int, ...] = LAYER_ROWS) -> Iterator[dict[str, Any]]:
    """4- and 8-bit layers against torch's bfloat16 linear; bfloat16 out, the rows are 8-bit already. Many rows also by wgmma (that line is
    the other one again where the device has none), and layers of a SwiGLU as a gated product."""
    for name, (outputs, columns) in layers.items():
        weights = {
            bits: bench.copies(outputs * columns * bits // 8, partial(_weight, bench, outputs, columns, bits)) for bits in (4, 8, 16)
        }
        for num in rows:
            yield from _layer(bench, name, outputs, columns, num, weights)
            if name.endswith(GATED):
                yield from _gated(bench, name, outputs, columns, num, weights)


def _weight(bench: Bench, outputs: int, columns: int, bits: int) -> tuple[torch.Tensor, ...]:
    """A weight as the layer of these bits takes it."""
    tiles, groups, on = -(-outputs // kernels.TILE), columns // GROUP, {"device": bench.device}
    if bits == 16:
        return (torch.randn(outputs, columns, dtype=torch.bfloat16, **on),)
    packed = torch.randint(0, 256, (tiles, -(-columns * bits // 32), 4 * kernels.TILE), dtype=torch.uint8, **on)
    if bits == 8:
        return packed, torch.rand(outputs, **on)
    return packed, torch.rand(groups, outputs, **on).mT, torch.randint(0, 16, (groups, outputs), dtype=torch.uint8, **on).mT


def _layer(
    bench: Bench, name: str, outputs: int, columns: int, num: int, weights: dict[int, list[tuple[torch.Tensor, ...]]]
) -> Iterator[dict[str, Any]]:
    x = torch.randn(num, columns, device=bench.device, dtype=torch.bfloat16)
    rows = kernels.quantize_per_token(x)
    calls: dict[int, Callable[..., Any]] = {
        4: lambda w: kernels.w4a8_linear(*rows, *w, GROUP, dtype=torch.bfloat16),
        8: lambda w: kernels.w8a8_linear(*rows, *w, dtype=torch.bfloat16),
        16: lambda w: F.linear(x, *w),
    }
    work = {bits: bench.graph(call, weights[bits]) for bits, call in calls.items()}
    for bits, scales in ((4, 5 * outputs * columns // GROUP), (8, 4 * outputs)):
        moved = outputs * columns * bits // 8 + scales + num * (columns + 2 * outputs)
        taking_turns = {"kernel": work[bits], "bfloat16": work[16]}
        operations = 2 * num * outputs * columns
        yield bench.line(f"w{bits}a8_linear", f"{name}, {num} rows", moved, taking_turns, operations=operations)
        if num > MANY_ROWS:
            by_wgmma = {"wgmma": bench.graph(partial(_by_wgmma, calls[bits]), weights[bits]), "mma.sync": work[bits], "bfloat16": work[16]}
            yield bench.line(f"w{bits}a8_linear, wgmma", f"{name}, {num} rows", moved, by_wgmma, operations=operations)


def _by_wgmma(call: Callable[..., Any], *arguments: Any) -> Any:
    before, cuda.WGMMA = cuda.WGMMA, 1
    try:
        return call(*arguments)
    finally:
        cuda.WGMMA = before


def _gated(
    bench: Bench, name: str, outputs: int, columns: int, num: int, weights: dict[int, list[tuple[torch.Tensor, ...]]]
) -> Iterator[dict[str, Any]]:
    """Both halves of a SwiGLU to 8-bit rows of its result: the product gated inside, and gated by what quantises."""
    x = torch.randn(num, columns, device=bench.device, dtype=torch.bfloat16)
    rows, half = kernels.quantize_per_token(x), outputs // 2
    sides = lambda w: [[w[0][part.start // kernels.TILE : part.stop // kernels.TILE], *(t[part] for t in w[1:])] for part in parts]  # noqa: E731
    parts = (slice(0, half), slice(half, outputs))

    def inside(w: tuple[torch.Tensor, ...]) -> Any:
        gate, up = sides(w)
        return kernels.quantize_per_token(kernels.w4a8_swiglu(*rows, *gate, *up, GROUP, dtype=torch.bfloat16))

    def outside(w: tuple[torch.Tensor, ...]) -> Any:
        return kernels.swiglu_quantize(*(kernels.w4a8_linear(*rows, *side, GROUP, dtype=torch.bfloat16) for side in sides(w)))

    def floating(w: tuple[torch.Tensor, ...]) -> Any:
        gate, up = F.linear(x, *w).chunk(2, dim=-1)
        return F.silu(gate) * up

    work = {"inside": (inside, 4), "outside": (outside, 4), "bfloat16, not quantised": (floating, 16)}
    if num > MANY_ROWS:
        work = {"inside, wgmma": (partial(_by_wgmma, inside), 4), **work}
    moved = outputs * columns // 2 + 5 * outputs * columns // GROUP + num * (columns + half)
    graphs = {key: bench.graph(call, weights[bits]) for key, (call, bits) in work.items()}
    yield bench.line("w4a8_swiglu", f"{name}, {num} rows", moved, graphs, operations=2 * num * outputs * columns)


def bench_producers(bench: Bench, shapes: tuple[tuple[int, int], ...] = PRODUCERS) -> Iterator[dict[str, Any]]:
    """Rows to 8 bits with what precedes them fused, against the same in torch."""
    for num, columns in shapes:
        yield from _producers(bench, num, columns)


def _producers(bench: Bench, num: int, columns: int) -> Iterator[dict[str, Any]]:
    def make() -> torch.Tensor:
        return torch.randn(num, columns, device=bench.device, dtype=torch.bfloat16)

    size, weight, row = num * columns, make()[0], make()[:1, None]
    signs = torch.ones(columns, dtype=torch.int8, device=bench.device)
    one, two = bench.copies(2 * size, make), bench.copies(4 * size, lambda: (make(), make()))
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "quantize_per_token": lambda module, x: module.quantize_per_token(x),
        "quantize_per_token, rotated": lambda module, x: module.quantize_per_token(x, None, signs),
        "rms_norm_quantize": lambda module, x: module.rms_norm_quantize(x, weight, 1e-5),
        "modulate_quantize": lambda module, x: module.modulate_quantize(x[None], row, row, 1e-6),
        "swiglu_quantize": lambda module, x: module.swiglu_quantize(*x),
        "gelu_quantize": lambda module, x: module.gelu_quantize(x),
    }
    for op, call in calls.items():
        data, read = (two, 4) if op == "swiglu_quantize" else (one, 2)
        work = {name: bench.graph(partial(call, module), data) for name, module in (("kernel", kernels), ("torch", reference))}
        yield bench.line(op, f"{num} x {columns}", size * (read + 1) + 4 * num, work)


def bench_attention(bench: Bench, cases: list[tuple[int, int, int]] = ATTENTION) -> Iterator[dict[str, Any]]:
    """Attention of the last scale with windows of radius r everywhere, both guidance halves, against the fastest dense one of torch."""
    for pixels, batch, r in cases:
        yield _attention(bench, pixels, batch, r)


def _attention(bench: Bench, pixels: int, batch: int, r: int) -> dict[str, Any]:
    def make(num: int) -> torch.Tensor:
        return torch.randn(2 * batch, HEADS, num, HEAD_DIM, device=bench.device, dtype=torch.bfloat16)

    sides = SIDES[pixels]
    s, queries, total = len(sides) - 1, sides[-1] ** 2, sum(side * side for side in sides)
    size = 2 * 2 * batch * HEADS * HEAD_DIM * 2 * (queries + total)
    data = bench.copies(size, lambda: (make(queries) / 8, make(total), make(total)))
    windows = torch.full((HEADS, s + 1), r, dtype=torch.int32, device=bench.device)
    work = {"kernel": bench.graph(lambda x: kernels.windowed_scale_attention(*x, windows, sides, s), data)}
    work |= _dense(bench, lambda x: F.scaled_dot_product_attention(*x, scale=1.0), data, (*FUSED, "MATH"))
    kept = window_mask(windows[:1].cpu(), sides, s).float().mean().item()
    return bench.line("windowed_scale_attention", f"{pixels} px, batch {batch}, r = {r}", size, work, kept=kept)


def _dense(
    bench: Bench, call: Callable[[Any], Any], data: list[Any], back_ends: tuple[str, ...], more: str = ""
) -> dict[str, Callable[[], Any]]:
    """A call of torch's attention by each of these back ends."""
    work = {}
    for name in back_ends:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                work[name.lower() + more] = bench.graph(call, data)
        except RuntimeError:
            continue  # this build of torch or this device has no such back end, or not for these arguments
    return work


def bench_decode_attention(bench: Bench, cases: list[tuple[str, int, int, int, bool]] = DECODE) -> Iterator[dict[str, Any]]:
    """Storing the new keys and values and attending to a cache, against the same in torch: index_put and attention with a mask where rows
    differ; where they do not, a copy and attention without a mask, or with the causal one that flash has, too."""
    for case in cases:
        yield _decode_attention(bench, *case)


def _decode_attention(bench: Bench, model: str, batch: int, slots: int, queries: int, ragged: bool) -> dict[str, Any]:
    (heads, width), rows, on = DECODERS[model], 2 * batch, {"device": bench.device}
    start = slots - queries
    starts = torch.linspace(start // 2 if ragged else start, start, rows, **on).long()
    place, row = starts[:, None] + torch.arange(queries, **on), torch.arange(rows, **on)[:, None]
    mask = causal_mask(place, slots)
    causal = causal_lower_right(queries, slots) if queries > 1 else None

    def make() -> tuple[torch.Tensor, ...]:
        new = [torch.randn(rows, queries, heads, width, dtype=torch.bfloat16, **on).transpose(1, 2) for _ in range(3)]
        return *new, *(torch.randn(rows, heads, slots, width, dtype=torch.bfloat16, **on) for _ in range(2))

    def masked(x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        q, k, v, k_cache, v_cache = x
        k_cache[row, :, place], v_cache[row, :, place] = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask)

    def whole(x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        q, k, v, k_cache, v_cache = x
        k_cache[:, :, start:], v_cache[:, :, start:] = k, v
        return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=causal)

    step = 2 * heads * width  # bytes of a slot, keys or values
    size = 2 * step * int(starts.sum()) + 6 * step * rows * queries  # slots that rows hold; new ones in, stored; queries and results
    data = bench.copies(4 * rows * heads * slots * width, make)
    work = {"kernel": bench.graph(lambda x: kernels.cached_attention(*x, starts), data)}
    work |= _dense(bench, masked, data, FUSED, ", mask") | ({} if ragged else _dense(bench, whole, data, FUSED))
    case = f"{model}, batch {batch}, {slots} slots, {queries} queries, {'half to all of them held' if ragged else 'all held'}"
    return bench.line("cached_attention", case, size, work)


def bench_verify(bench: Bench, batches: tuple[int, ...] = BATCHES, codes: int = CODES) -> Iterator[dict[str, Any]]:
    """A window of 16 positions and one more of every row of a batch, against the reference in torch; the same from the two bfloat16 halves
    of guidance; and a draw from the residual for one of these positions a row, and for all of them."""
    for batch in batches:
        yield from _verify(bench, batch, codes)


def _verify(bench: Bench, batch: int, codes: int) -> Iterator[dict[str, Any]]:
    rows, on = batch * (WINDOW + 1), {"device": bench.device}
    ids, case = torch.arange(rows, **on), f"{batch} x {WINDOW + 1} rows of {codes}"
    drafts, size = ids % codes, 4 * rows * codes
    data = bench.copies(size, lambda: 2 * torch.randn(rows, codes, **on))
    halves = bench.copies(size, lambda: 2 * torch.randn(2, rows, codes, dtype=torch.bfloat16, **on))
    for name, law in LAWS.items():
        call = lambda module, x, law=law: module.verify(x, drafts, *law, 0, ids, ids, 0)  # noqa: E731
        work = {"kernel": bench.graph(partial(call, kernels), data)}
        work["torch, no graph"] = bench.graph(partial(call, reference), data, captured=False)  # it copies numbers to the device
        yield bench.line("verify", f"{case}, {name}", size + 52 * rows, work)
        guided = lambda x, law=law: kernels.verify(x[0], drafts, *law, 0, ids, ids, 0, 0, x[1], 1.5)  # noqa: E731
        yield bench.line("verify", f"{case}, guided bfloat16, {name}", size + 52 * rows, {"kernel": bench.graph(guided, halves)})
    draw = bench.graph(lambda x: kernels.keyed_argmax(x, 0, ids, ids, 0), data)
    yield bench.line("keyed_argmax", case, size + 24 * rows, {"kernel": draw})
    laws = [[x, None, None, *kernels.verify(x, drafts, 1.0, 0, 1.0, 0, ids, ids, 0)[2:]] for x in data]
    pairs = list(zip(laws, laws[1:] + laws[:1], strict=True))
    for name, at in (("one position of each", torch.where(ids % (WINDOW + 1) == 0, ids, -1)), ("every position", ids)):
        residual = partial(_residual, at, ids)
        wanted = int((at >= 0).sum())
        yield bench.line("draw_residual", f"{case}, {name}", 8 * wanted * codes, {"kernel": bench.graph(residual, pairs)})


def _residual(at: torch.Tensor, ids: torch.Tensor, laws: tuple[list[Any], list[Any]]) -> torch.Tensor:
    how = [1.0, 0.0, 1.0]
    return kernels.draw_residual(laws[0], how, at, laws[1], how, ids, ids, None, None, 0, ids, ids, 0)


def bench_flow_map(bench: Bench, cases: dict[str, tuple[int, int, int, int]] = FLOWS) -> Iterator[dict[str, Any]]:
    """The flow map of a whole batch with the default solver and early stop. The bytes are those of the laws, read once."""
    for name, case in cases.items():
        yield _flow_map(bench, name, *case)


def _flow_map(bench: Bench, name: str, rows: int, codes: int, width: int, top_k: int) -> dict[str, Any]:
    logits = 2 * torch.randn(rows, codes, device=bench.device)
    logp = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf).log_softmax(1)
    vectors = F.normalize(torch.randn(codes, width, device=bench.device), dim=1)
    arguments = (logp, torch.randn(rows, width, device=bench.device), vectors, stop_weights(logp, 0.95), "2m", 64, 0.02)
    evaluations = kernels.flow_map(*arguments)[3].mean().item()
    work = {"kernel": bench.graph(lambda _: kernels.flow_map(*arguments), [None])}
    return bench.line("flow_map", name, 4 * rows * codes, work, evaluations=evaluations)


def bench_trajectories(bench: Bench, model: str = "llamagen-b-256", rows: int = 256) -> Iterator[dict[str, Any]]:
    """Trajectories of distilled decoding with random weights, per code of the batch; the ratio is the teacher's share of their time. The
    bytes are the teacher's weights, read once a code. Random weights make flat laws, whose maps need more evaluations than trained ones."""
    stack = build(StackConfig(model=model, random_weights=True, graphs=bench.device != "cpu"), bench.device, torch.bfloat16)
    decoder, length = stack.generator.decoder, stack.model.source.layout.num_tokens
    ids = torch.arange(rows, device=bench.device)
    request = Request(ids, 0, labels_B=ids % stack.num_classes)
    book = prepare_codebook(stack.model.codebook_VE)
    noise = keyed_noise(request, book.vectors_EU.shape[0])
    counted: list[float] = []

    def through_map() -> None:
        counted.append(sample_through_map(decoder, request, noise, stack.pipeline, book).stats["flow_nfe"])

    def teacher_alone() -> None:
        decode_blocks(decoder, request, lambda logits, pipeline, positions: logits.float()[..., 0].long(), stack.pipeline)

    per_code = copy(bench)
    per_code.calls = length
    work = {"kernel": through_map, "teacher alone": teacher_alone}
    line = per_code.line("trajectories", f"{model}, batch {rows}", stack.model.weight_bytes(), work)
    yield line | {"evaluations": counted[-1]}


GROUPS = {
    "linear": bench_linear, "producers": bench_producers, "attention": bench_attention, "decode attention": bench_decode_attention,
    "verify": bench_verify, "flow_map": bench_flow_map, "trajectories": bench_trajectories,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    parser.add_argument("--seconds", type=float, default=200, help="no group of cases begins later than this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: gpu_kernels needs a CUDA device and torch sees none.", file=sys.stderr)
        return EXIT_RESOURCE
    kernels.set_backend("cuda")
    started = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "started": now(), "environment": environment("cuda:0"), "lines": [], "failed": {}}
    with torch.inference_mode():
        bench = Bench("cuda")
        result["copy_gb_per_s"] = bench.copy_bytes_per_s / 1e9
        for name, group in GROUPS.items():
            if time.monotonic() - started > options.seconds:
                result["failed"][name] = "not run: out of time"
                continue
            try:
                for line in group(bench):
                    result["lines"].append(line)
                    write_json(options.out, result)
            except Exception as error:  # one group must not take the others with it; the reason is recorded and the exit code says so
                result["failed"][name] = f"{type(error).__name__}: {error}"
            torch.cuda.empty_cache()
    write_json(options.out, result)
    return EXIT_GATE if result["failed"] else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
