"""The raster decoder on a GPU without its launches: passes are captured once as CUDA graphs and replayed.

A graph needs the same memory every time. So the cache is made once a batch size and lent to one state after another, codes and lengths are
copied into fixed tensors, and a pass sees a fixed number of slots, rounded up to ``SLOTS``, of which a mask hides what is not known yet.
One graph for every (codes a row, slots, guided): plain sampling needs one for every SLOTS positions, a mode of the verify family one for
every width of its window beside them. The condition itself, captions and passes over trees run without a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from arsp.decode.decoder import RasterDecoder, RasterState, ragged_mask
from arsp.decode.guidance import Guidance
from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy, KVCache
from arsp.models.llamagen import GPT
from arsp.protocols import Request

SLOTS = 64  # a pass reads the cache up to a multiple of this


class CudaGraph:
    """``work(*inputs)``, captured; a call copies other inputs of the same shapes into place and replays it. The result is overwritten by
    the next call."""

    def __init__(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.inputs = tuple(x.clone() for x in inputs)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            work(*self.inputs)  # libraries and kernels are made ready outside the capture
        torch.cuda.current_stream().wait_stream(warm)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
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
        capture: Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Callable[..., Tensor]] = CudaGraph,
    ):  # fmt: skip
        super().__init__(model, guidance, policy)
        if capture is CudaGraph and model.device.type != "cuda":
            raise ConfigError(f"CUDA graphs: the model is on {model.device}.", "Use --device cuda, or drop graphs=true.")
        self._capture = capture
        self._cache: KVCache | None = None
        self._holder: Callable[[], RasterState | None] = lambda: None
        self._graphs: dict[tuple[int, int, bool], Callable[..., Tensor]] = {}

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

    def _extend(self, state: RasterState, codes_Bn: Tensor) -> Tensor:
        if self._holder() is not state or state.caption_mask_RP is not None:
            return super()._extend(state, codes_Bn)
        P, n = self.model.config.cls_token_num, codes_Bn.shape[1]
        longest = state.uniform if state.uniform is not None else int(state.lengths_B.max())
        lowest = longest if state.uniform is not None else int(state.lengths_B.min())
        self._room(state, longest + n)
        total = min(-(-(P + longest + n) // SLOTS) * SLOTS, state.cache.capacity)
        guided = self.guidance.active and lowest + 1 <= self.guidance.last_guided
        key, inputs = (n, total, guided), (codes_Bn, state.lengths_B)
        if key not in self._graphs:
            self._graphs[key] = self._capture(lambda codes, lengths: self._replayed(codes, lengths, total, guided), inputs)
        logits_BnV = self._graphs[key](*inputs).clone()
        state.passes += 1
        state.peak_kv_bytes = max(state.peak_kv_bytes, state.cache.bytes(P + longest + n))
        state.uniform = None if state.uniform is None else state.uniform + n
        state.lengths_B = state.lengths_B + n
        return logits_BnV

    def _replayed(self, codes_Bn: Tensor, lengths_B: Tensor, total: int, guided: bool) -> Tensor:
        """The pass of a graph: nothing in it depends on a value that the host would have to read."""
        tokens_Bn = lengths_B[:, None] + torch.arange(codes_Bn.shape[1], device=codes_Bn.device)
        positions_Rn = (self.model.config.cls_token_num + tokens_Bn).repeat(2 if guided else 1, 1)
        rope = self.model.rope_table(codes_Bn.device)[positions_Rn]
        ctx = AttentionContext(total=total, mask=ragged_mask(None, positions_Rn, total), cache=self._cache, positions_Bn=positions_Rn)
        h = self.model.backbone(self._embed(codes_Bn, guided), rope, ctx, self.policy)
        return self._guide(self.model.head(h), guided, tokens_Bn + 1)
