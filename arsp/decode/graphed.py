"""Decoders on a GPU without their launches: passes are captured once as CUDA graphs and replayed.

A graph needs the same memory every time, so what a state holds is made once a batch size and lent to one state after another.

- Raster: codes and lengths are copied into fixed tensors. One graph for every (codes a row, guided): plain sampling needs one, a mode of
  the verify family one for every width of its window. Where attention cannot read the lengths on the device
  (:func:`arsp.kernels.reads_lengths`), a pass sees a fixed number of slots, rounded up to ``SLOTS``, under a mask, with a graph for each.
  The condition, captions and passes over trees run without a graph.
- Next-scale: one graph a scale, from the codes of the scale before to the logits. The first image of a batch size runs as it always
  does, and its passes are captured beside it.
- Students: one graph a batch size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arsp.decode.decoder import RasterDecoder, RasterState, ragged_mask
from arsp.decode.guidance import Guidance, Guided, Logits
from arsp.decode.next_scale import NextScaleDecoder, ScaleState
from arsp.errors import ConfigError
from arsp.kernels import reads_lengths
from arsp.models.attention import AttentionContext, DensePolicy, KVCache
from arsp.models.llamagen import GPT
from arsp.protocols import Nodes, Request

SLOTS = 64  # a pass with a mask reads the cache up to a multiple of this


Capture = Callable[..., Callable[..., Any]]  # (work, inputs, warm) -> what replays it


class CudaGraph:
    """``work(*inputs)``, captured; a call copies other inputs of the same shapes into place and replays it. The result is overwritten by
    the next call."""

    def __init__(self, work: Callable[..., Any], inputs: tuple[Tensor, ...], warm: bool = False):
        """``warm``: the same work has run before. Otherwise it runs once here, so that libraries are ready before the capture."""
        self.inputs = tuple(x.clone() for x in inputs)
        if not warm:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given)
        self.graph.replay()
        return self.result


class GraphedDecoder(RasterDecoder):
    """:class:`RasterDecoder` with replayed passes; the same logits up to rounding. ``capture``: what makes a graph of a pass.

    One state at a time holds the fixed cache: while an earlier one is still in use, a new one works without graphs.
    """

    def __init__(
        self, model: GPT, guidance: Guidance | None = None, policy: DensePolicy | None = None,
        capture: Capture = CudaGraph,
    ):  # fmt: skip
        super().__init__(model, guidance, policy)
        _check_device(model.device, capture)
        self._capture = capture
        self._cache: KVCache | None = None
        self._holder: Callable[[], RasterState | None] = lambda: None
        self._graphs: dict[tuple[int, int, bool], Callable[..., tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def start(self, request: Request, capacity: int | None = None) -> RasterState:
        state = super().start(request, capacity)
        if self._holder() is not None:
            return state
        if self._cache is not None and self._cache.k[0].shape == state.cache.k[0].shape:
            state.cache = self._cache
        else:
            self._cache, self._graphs = state.cache, {}
        self._holder = weakref.ref(state)
        return state

    @torch.inference_mode()
    def step(self, state: RasterState, codes_Bn: Tensor | None, nodes: Nodes | None = None) -> Tensor:
        return own_float(self.step_apart(state, codes_Bn, nodes))

    def _extend(self, state: RasterState, codes_Bn: Tensor) -> Logits:
        if self._holder() is not state or state.caption_mask_RP is not None:
            return super()._extend(state, codes_Bn)
        P, n = self.model.config.cls_token_num, codes_Bn.shape[1]
        longest = max(state.lengths)
        self._room(state, longest + n)
        total = state.cache.capacity
        if not reads_lengths(state.cache.k[0], n):
            total = min(-(-(P + longest + n) // SLOTS) * SLOTS, total)
        guided = self.guidance.active and min(state.lengths) + 1 <= self.guidance.last_guided
        key, inputs = (n, total, guided), (codes_Bn, state.lengths_B)
        if key not in self._graphs:
            self._graphs[key] = self._capture(lambda codes, lengths: self._replayed(codes, lengths, total, guided), inputs)
        logits_RnV, tokens_Bn = self._graphs[key](*inputs)
        state.passes += 1
        state.peak_kv_bytes = max(state.peak_kv_bytes, state.cache.bytes(P + longest + n))
        state.grow(n)
        return self._guide(logits_RnV, guided, tokens_Bn)

    def _replayed(self, codes_Bn: Tensor, lengths_B: Tensor, total: int, guided: bool) -> tuple[Tensor, Tensor]:
        """The pass of a graph and the tokens that it predicts: nothing in it depends on a value that the host would have to read."""
        tokens_Bn = lengths_B[:, None] + torch.arange(codes_Bn.shape[1], device=codes_Bn.device)
        positions_Rn = (self.model.config.cls_token_num + tokens_Bn).repeat(2 if guided else 1, 1)
        rope = self.model.rope_table(codes_Bn.device)[positions_Rn]
        by_length = reads_lengths(self._cache.k[0], codes_Bn.shape[1])
        mask = None if by_length else ragged_mask(None, positions_Rn, total)
        ctx = AttentionContext(total=total, mask=mask, cache=self._cache, positions_Bn=positions_Rn, by_length=by_length)
        h = self.model.backbone(self._embed(codes_Bn, guided), rope, ctx, self.policy)
        return self.model.raw_logits(h), tokens_Bn + 1


class GraphedScales:
    """A :class:`NextScaleDecoder` with replayed passes, the very same work in the same order. Whatever is not here is the plain decoder's.

    Graphs serve states that are fed scale by scale. One state at a time works with them, as with :class:`GraphedDecoder`.
    """

    def __init__(self, decoder: NextScaleDecoder, capture: Capture = CudaGraph):
        self.plain, self._capture = decoder, capture
        _check_device(decoder.quantizer.embedding.weight.device, capture)
        self._labels_B: Tensor | None = None
        self._inner: ScaleState | None = None  # what the graphs work on
        self._holder: Callable[[], ScaleState | None] = lambda: None
        self._graphs: list[Callable[..., Tensor]] = []
        self._counters: list[dict[str, int]] = []  # of a state behind every scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    @torch.inference_mode()
    def start(self, request: Request, capacity: int | None = None) -> ScaleState:
        state = self.plain.start(request, capacity)
        if self._holder() is not None:
            return state
        if self._labels_B is None or len(self._labels_B) != state.batch_size or len(self._graphs) < len(self.plain.steps):
            self._labels_B, self._graphs, self._counters = state.labels_B.clone(), [], []
        self._labels_B.copy_(state.labels_B)
        self._holder = weakref.ref(state)
        return state

    @torch.inference_mode()
    def step(self, state: ScaleState, codes_Bn: Tensor | None, vectors_BnE: Tensor | None = None) -> Tensor:
        return own_float(self.step_apart(state, codes_Bn, vectors_BnE))

    @torch.inference_mode()
    def step_apart(self, state: ScaleState, codes_Bn: Tensor | None, vectors_BnE: Tensor | None = None) -> Logits:
        scale = state.known + (codes_Bn is not None)
        fed = 0 if codes_Bn is None else codes_Bn.shape[1]
        one_scale = vectors_BnE is None and fed == (len(self.plain.layout.blocks[scale - 1]) if scale else 0)
        if self._holder() is not state or not one_scale or scale > len(self._graphs):
            if self._holder() is state:
                self._holder = lambda: None
            return self.plain.step_apart(state, codes_Bn, vectors_BnE)
        inputs = () if codes_Bn is None else (codes_Bn,)
        if scale < len(self._graphs):
            for name, value in self._counters[scale].items():
                setattr(state, name, value)
            return self.plain.apart(self._graphs[scale](*inputs), scale)
        logits_BnV = self.plain.step_apart(state, codes_Bn)
        self._graphs.append(self._capture(self._first if scale == 0 else self._next, inputs, warm=True))
        self._counters.append({name: getattr(state, name) for name in ("known", "consumed", "passes", "peak_kv_bytes", "last_kv_bytes")})
        return logits_BnV

    def _first(self) -> Tensor:
        self._inner = self.plain.start(Request(torch.arange(len(self._labels_B)), 0, labels_B=self._labels_B))
        return self.plain.step_raw(self._inner, None)

    def _next(self, codes_Bn: Tensor) -> Tensor:
        return self.plain.step_raw(self._inner, codes_Bn)


class GraphedStudent:
    """The pass of a few-step student, ``student(labels_B, x_BLE, known_B)``, as one CUDA graph a batch size."""

    def __init__(self, student: Callable[..., tuple[Tensor, Tensor]], device: torch.device, capture: Capture = CudaGraph):
        _check_device(device, capture)
        self._student, self._capture = student, capture
        self._graphs: dict[torch.Size, Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shape = inputs[1].shape
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(self._student, inputs)
        return tuple(x.clone() for x in self._graphs[shape](*inputs))


def own_float(logits: Logits) -> Tensor:
    """Guided float32 logits that no later pass overwrites."""
    return logits.float() if isinstance(logits, Guided) else logits.to(torch.float32, copy=True)


def _check_device(device: torch.device, capture: Capture) -> None:
    if capture is CudaGraph and device.type != "cuda":
        raise ConfigError(f"CUDA graphs: the model is on {device}.", "Use --device cuda, or drop graphs=true.")
