"""The raster Decoder: a LlamaGen GPT bound to its guidance, with a key-value cache outside the module.

Cache slot p holds sequence position p = conditioning prefix, then codes; only slots of known tokens are ever read. Rows of a
batch may stand at different lengths. With guidance the batch is [conditional rows ; unconditional rows]; from the first token
on that no row guides (``cfg_interval``), the unconditional half is not run at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arsp.decode.guidance import Guidance
from arsp.errors import ConfigError, UsageError
from arsp.models.attention import AttentionContext, DensePolicy, KVCache
from arsp.models.llamagen import GPT, prefix_mask
from arsp.protocols import Capabilities, Layout, Request


@dataclass
class RasterState:
    """Where each row stands. ``lengths_B`` counts known (fed) codes; ``uniform`` is their common value, or None."""

    prefix_RPC: Tensor  # R = B rows, or 2B with guidance
    caption_mask_RP: Tensor | None
    cache: KVCache
    lengths_B: Tensor
    uniform: int | None = 0
    prefilled: bool = False
    passes: int = 0
    peak_kv_bytes: int = 0

    @property
    def batch_size(self) -> int:
        return int(self.lengths_B.shape[0])


class RasterDecoder:
    """Implements :class:`arsp.protocols.Decoder` for a class- or text-conditional :class:`GPT`."""

    def __init__(self, model: GPT, guidance: Guidance | None = None, policy: DensePolicy | None = None):
        self.model, self.guidance, self.policy = model, guidance or Guidance(), policy or DensePolicy()
        config = model.config
        self.layout = Layout.raster(config.side, config.side)
        self.vocab_size = config.vocab_size
        condition = "class" if config.model_type == "c2i" else "text"
        self.capabilities = Capabilities(order="raster", conditions=frozenset({condition}), rewind=True, codebook=True)
        if self.guidance.active and condition == "class" and config.class_dropout_prob == 0:
            raise ConfigError("this model was trained without class dropout: it has no null class and cannot be guided.", "Use --cfg 1.")

    # -- the protocol ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def start(self, request: Request, capacity: int | None = None) -> RasterState:
        """An empty state. ``capacity`` = most codes that will be fed (default L - 1: the last code predicts nothing)."""
        cfg = self.model.config
        most = cfg.block_size - 1
        capacity = most if capacity is None else min(capacity, most)
        condition, mask = self._condition(request)
        weight = self.model.output.weight
        prefix = self.model.cls_embedding(condition)
        slots = cfg.cls_token_num + capacity
        cache = KVCache(cfg.n_layer, prefix.shape[0], cfg.n_head, slots, cfg.head_dim, dtype=weight.dtype, device=weight.device)
        lengths = torch.zeros(request.batch_size, dtype=torch.int64, device=weight.device)
        return RasterState(prefix, mask, cache, lengths)

    @torch.inference_mode()
    def step(self, state: RasterState, codes_Bn: Tensor | None) -> Tensor:
        """Feed n codes a row (None: the condition alone) -> guided float32 ``logits_BmV`` of the m positions that follow them."""
        if codes_Bn is None:
            if state.prefilled:
                raise UsageError("step(None) is the first call on a state; this one already holds its condition.")
            return self._prefill(state)
        if not state.prefilled:
            self._prefill(state)
        return self._extend(state, codes_Bn)

    def rewind(self, state: RasterState, lengths_B: Tensor) -> None:
        """Forget codes at positions >= ``lengths_B[b]``; their cache slots are overwritten by the next pass."""
        lengths_B = lengths_B.to(state.lengths_B)
        if bool((lengths_B > state.lengths_B).any()) or bool((lengths_B < 0).any()):
            raise UsageError(f"rewind to {lengths_B.tolist()}: rows hold {state.lengths_B.tolist()} codes.")
        state.lengths_B = lengths_B.clone()
        state.uniform = int(lengths_B[0]) if bool((lengths_B == lengths_B[0]).all()) else None

    def select(self, state: RasterState, rows: Tensor) -> RasterState:
        """A state of these rows only (both guidance halves)."""
        B = state.batch_size
        halves = torch.cat((rows, rows + B)) if state.prefix_RPC.shape[0] == 2 * B else rows
        lengths = state.lengths_B[rows]
        same = len(lengths) > 0 and bool((lengths == lengths[0]).all())
        return replace(
            state,
            prefix_RPC=state.prefix_RPC[halves],
            cache=state.cache.select(rows, B),
            lengths_B=lengths,
            uniform=int(lengths[0]) if same else None,
            caption_mask_RP=None if state.caption_mask_RP is None else state.caption_mask_RP[halves],
        )

    @torch.inference_mode()
    def teacher_forced(self, request: Request, codes_BL: Tensor) -> Tensor:
        """Guided float32 ``logits_BLV`` of all positions in one pass without a cache."""
        condition, mask = self._condition(request)
        doubled = condition.shape[0] // codes_BL.shape[0]
        logits = self.model(codes_BL[:, :-1].repeat(doubled, 1), condition, mask)
        return self._guide(logits, doubled == 2, torch.arange(codes_BL.shape[1], device=logits.device))

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _condition(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Conditional rows, then unconditional rows when guidance is on."""
        cfg, device = self.model.config, self.model.output.weight.device
        if cfg.model_type == "c2i":
            if request.labels_B is None:
                raise ConfigError("this model is class-conditional: the request carries no labels.", "Give --class.")
            labels = request.labels_B.to(device)
            return (torch.cat((labels, torch.full_like(labels, cfg.num_classes))) if self.guidance.active else labels), None
        if request.captions_BPE is None:
            raise ConfigError("this model is text-conditional: the request carries no caption features.")
        captions = request.captions_BPE.to(self.model.output.weight)
        mask = None if request.caption_mask_BP is None else request.caption_mask_BP.to(device)
        if self.guidance.active:  # note: the official sampler gives the null half the same caption mask
            null = self.model.cls_embedding.uncond_embedding.to(captions).expand_as(captions)
            captions, mask = torch.cat((captions, null)), None if mask is None else torch.cat((mask, mask))
        return captions, mask

    def _prefill(self, state: RasterState) -> Tensor:
        P = self.model.config.cls_token_num
        h = self._pass(state, state.prefix_RPC, start=0, positions_Bn=None)
        state.prefilled = True
        return self._guide(self.model.head(h[:, P - 1 :]), self.guidance.active, torch.zeros(1, dtype=torch.int64, device=h.device))

    def _extend(self, state: RasterState, codes_Bn: Tensor) -> Tensor:
        P, n, B = self.model.config.cls_token_num, codes_Bn.shape[1], state.batch_size
        longest = state.uniform if state.uniform is not None else int(state.lengths_B.max())
        if P + longest + n > state.cache.capacity:
            room = state.cache.capacity - P - longest
            raise UsageError(f"step: {n} codes do not fit, {room} more positions are left (capacity {state.cache.capacity - P} codes).")
        offsets = torch.arange(n, device=codes_Bn.device)
        tokens = (longest if state.uniform is not None else state.lengths_B[:, None]) + offsets + 1  # indices of the predicted tokens
        lowest = longest if state.uniform is not None else int(state.lengths_B.min())
        guided = self.guidance.active and lowest + 1 <= self.guidance.last_guided
        h = self.model.tok_embeddings(codes_Bn)
        h = torch.cat((h, h)) if guided else h
        if state.uniform is not None:
            h = self._pass(state, h, start=P + longest, positions_Bn=None)
            state.uniform += n
        else:
            positions = (P + state.lengths_B[:, None] + offsets).repeat(h.shape[0] // B, 1)
            h = self._pass(state, h, start=None, positions_Bn=positions)
        state.lengths_B = state.lengths_B + n
        return self._guide(self.model.head(h), guided, tokens)

    def _pass(self, state: RasterState, h_RnC: Tensor, *, start: int | None, positions_Bn: Tensor | None) -> Tensor:
        R, n = h_RnC.shape[:2]
        table = self.model.rope_table(h_RnC.device)
        if start is not None:
            total, rope = start + n, table[start : start + n]
            mask = _uniform_mask(state.caption_mask_RP, R, n, start, h_RnC.device)
        else:
            total, rope = int(positions_Bn.max()) + 1, table[positions_Bn]
            mask = _ragged_mask(state.caption_mask_RP, positions_Bn, total)
        ctx = AttentionContext(
            total=total, mask=mask, is_causal=mask is None and n > 1, cache=state.cache, start=start, positions_Bn=positions_Bn
        )
        state.passes += 1
        state.peak_kv_bytes = max(state.peak_kv_bytes, state.cache.bytes(total))
        return self.model.backbone(h_RnC, rope, ctx, self.policy)

    def _guide(self, logits_RmV: Tensor, both: bool, tokens: Tensor) -> Tensor:
        if not both:
            return logits_RmV
        cond, uncond = logits_RmV.chunk(2)
        return self.guidance.combine(cond, uncond, tokens)


def _uniform_mask(caption_mask_RP: Tensor | None, rows: int, n: int, start: int, device: torch.device) -> Tensor | None:
    """None where plain causal or full attention is meant; otherwise boolean ``(R | 1, 1, n, start + n)``."""
    if caption_mask_RP is not None:
        return prefix_mask(caption_mask_RP[:rows], start + n)[:, :, start:]
    if n == 1 or start == 0:
        return None
    return torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)[None, None]


def _ragged_mask(caption_mask_RP: Tensor | None, positions_Rn: Tensor, total: int) -> Tensor:
    slots = torch.arange(total, device=positions_Rn.device)
    mask = slots <= positions_Rn.unsqueeze(-1)
    if caption_mask_RP is not None:
        P = caption_mask_RP.shape[1]
        mask[:, :, :P] &= caption_mask_RP[: mask.shape[0], None].bool()
    return mask.unsqueeze(1)
