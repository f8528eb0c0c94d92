"""The raster Decoder: a LlamaGen GPT bound to its guidance, with a key-value cache outside the module.

Cache slot p holds sequence position p = conditioning prefix, then codes; only slots of known tokens are ever read. Rows of a
batch may stand at different lengths. With guidance the batch is [conditional rows ; unconditional rows]; from the first token
on that no row guides (``cfg_interval``), the unconditional half is not run at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arsp.decode.guidance import Guidance, Logits
from arsp.errors import ConfigError, UsageError
from arsp.kernels import reads_lengths
from arsp.models.attention import AttentionContext, DensePolicy, KVCache
from arsp.models.llamagen import GPT, prefix_mask
from arsp.protocols import Capabilities, Layout, Nodes, Request


@dataclass
class RasterState:
    """Where each row stands. ``lengths_B`` counts known (fed) codes, ``lengths`` are the same numbers on the host."""

    prefix_RPC: Tensor  # R = B rows, or 2B with guidance
    caption_mask_RP: Tensor | None
    cache: KVCache
    lengths_B: Tensor
    lengths: list[int]
    prefilled: bool = False
    passes: int = 0
    peak_kv_bytes: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> int | None:
        """The length of all rows, None where they differ."""
        return self.lengths[0] if self.lengths and self.lengths.count(self.lengths[0]) == len(self.lengths) else None

    def grow(self, num: int) -> None:
        """Every row holds ``num`` codes more."""
        self.lengths_B, self.lengths = self.lengths_B + num, [length + num for length in self.lengths]


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
        """An empty state. ``capacity`` = cache slots for codes (default L - 1: the last code predicts nothing; trees take more)."""
        cfg = self.model.config
        capacity = cfg.block_size - 1 if capacity is None else capacity
        condition, mask = self._condition(request)
        dtype, device = self.model.dtype, self.model.device
        prefix = self.model.cls_embedding(condition)
        slots = cfg.cls_token_num + capacity
        cache = KVCache(cfg.n_layer, prefix.shape[0], cfg.n_head, slots, cfg.head_dim, dtype=dtype, device=device)
        lengths = torch.zeros(request.batch_size, dtype=torch.int64, device=device)
        return RasterState(prefix, mask, cache, lengths, [0] * request.batch_size)

    @torch.inference_mode()
    def step(self, state: RasterState, codes_Bn: Tensor | None, nodes: Nodes | None = None) -> Tensor:
        """Feed n codes a row -> guided float32 ``logits_BmV`` of the positions that follow them. The first pass on a state also feeds the
        condition, and its first logits are those of position 0 (m = n + 1; the condition alone for None).

        With ``nodes`` the codes stand where these say; lengths stay as they are until :meth:`keep`.
        """
        return self.step_apart(state, codes_Bn, nodes).float()

    @torch.inference_mode()
    def step_apart(self, state: RasterState, codes_Bn: Tensor | None, nodes: Nodes | None = None) -> Logits:
        """:meth:`step` before the halves of guidance are combined (:class:`arsp.decode.guidance.Guided`), in the type of the model."""
        if codes_Bn is None and state.prefilled:
            raise UsageError("step(None) is the first call on a state; this one already holds its condition.")
        if nodes is not None:
            return self._step_nodes(state, codes_Bn, nodes)
        return self._extend(state, codes_Bn) if state.prefilled else self._prefill(state, codes_Bn)

    @torch.inference_mode()
    def keep(self, state: RasterState, slots_Bk: Tensor, start_B: Tensor, count_B: Tensor) -> None:
        """After a pass with nodes: the codes at the first ``count_B[b]`` of the slots ``slots_Bk[b]`` become positions ``start_B[b]`` and
        on; row b then holds ``start_B + count_B`` codes."""
        P = self.model.config.cls_token_num
        target = start_B[:, None] + torch.arange(slots_Bk.shape[1], device=slots_Bk.device)
        state.cache.move(P + slots_Bk, P + target)
        lengths_B = start_B + count_B
        self._stand_at(state, lengths_B, lengths_B.tolist())

    def rewind(self, state: RasterState, lengths_B: Tensor) -> None:
        """Forget codes at positions >= ``lengths_B[b]``; their cache slots are overwritten by the next pass. Numbers that lie on the CPU
        keep the host from waiting for the device."""
        lengths = lengths_B.tolist()
        if any(not 0 <= to <= at for to, at in zip(lengths, state.lengths, strict=True)):
            raise UsageError(f"rewind to {lengths}: rows hold {state.lengths} codes.")
        if lengths != state.lengths:
            self._stand_at(state, lengths_B, lengths)

    def select(self, state: RasterState, rows: Tensor) -> RasterState:
        """A state of these rows only (both guidance halves)."""
        B, kept = state.batch_size, rows.tolist()
        rows = rows.to(state.lengths_B.device)
        halves = torch.cat((rows, rows + B)) if state.prefix_RPC.shape[0] == 2 * B else rows
        return replace(
            state,
            prefix_RPC=state.prefix_RPC[halves],
            cache=state.cache.select(rows, B),
            lengths_B=state.lengths_B[rows],
            lengths=[state.lengths[row] for row in kept],
            caption_mask_RP=None if state.caption_mask_RP is None else state.caption_mask_RP[halves],
        )

    @torch.inference_mode()
    def teacher_forced(self, request: Request, codes_BL: Tensor) -> Tensor:
        """Guided float32 ``logits_BLV`` of all positions in one pass without a cache."""
        condition, mask = self._condition(request)
        doubled = condition.shape[0] // codes_BL.shape[0]
        logits = self.model(codes_BL[:, :-1].repeat(doubled, 1), condition, mask)
        return self._guide(logits, doubled == 2, torch.arange(codes_BL.shape[1], device=logits.device)).float()

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _condition(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Conditional rows, then unconditional rows when guidance is on."""
        cfg, device = self.model.config, self.model.device
        if cfg.model_type == "c2i":
            if request.labels_B is None:
                raise ConfigError("this model is class-conditional: the request carries no labels.", "Give --class.")
            labels = request.labels_B.to(device)
            return (torch.cat((labels, torch.full_like(labels, cfg.num_classes))) if self.guidance.active else labels), None
        if request.captions_BPE is None:
            raise ConfigError("this model is text-conditional: the request carries no caption features.")
        captions = request.captions_BPE.to(device, self.model.dtype)
        mask = None if request.caption_mask_BP is None else request.caption_mask_BP.to(device)
        if self.guidance.active:  # note: the official sampler gives the null half the same caption mask
            null = self.model.cls_embedding.uncond_embedding.to(captions).expand_as(captions)
            captions, mask = torch.cat((captions, null)), None if mask is None else torch.cat((mask, mask))
        return captions, mask

    def _stand_at(self, state: RasterState, lengths_B: Tensor, lengths: list[int]) -> None:
        state.lengths_B = lengths_B.to(state.lengths_B, non_blocking=True, copy=True)
        state.lengths = lengths

    def _embed(self, codes_Bn: Tensor, guided: bool) -> Tensor:
        h = self.model.tok_embeddings(codes_Bn)
        return torch.cat((h, h)) if guided else h

    def _room(self, state: RasterState, slots: int) -> None:
        P = self.model.config.cls_token_num
        if P + slots > state.cache.capacity:
            raise UsageError(f"step: {slots} codes do not fit, the capacity is {state.cache.capacity - P}.")

    def _prefill(self, state: RasterState, codes_Bn: Tensor | None) -> Logits:
        P, h, n = self.model.config.cls_token_num, state.prefix_RPC, 0
        if codes_Bn is not None:
            n = codes_Bn.shape[1]
            self._room(state, n)
            h = torch.cat((h, self._embed(codes_Bn, self.guidance.active)), dim=1)
        h = self._pass(state, h, start=0)
        state.prefilled = True
        state.grow(n)
        return self._guide(self.model.raw_logits(h[:, P - 1 :]), self.guidance.active, torch.arange(n + 1, device=h.device))

    def _extend(self, state: RasterState, codes_Bn: Tensor) -> Logits:
        P, n = self.model.config.cls_token_num, codes_Bn.shape[1]
        uniform, longest = state.uniform, max(state.lengths)
        self._room(state, longest + n)
        offsets = torch.arange(n, device=codes_Bn.device)
        tokens = (state.lengths_B[:, None] if uniform is None else uniform) + offsets + 1  # indices of the predicted tokens
        guided = self.guidance.active and min(state.lengths) + 1 <= self.guidance.last_guided
        h = self._embed(codes_Bn, guided)
        if uniform is None:
            positions = (P + state.lengths_B[:, None] + offsets).repeat(2 if guided else 1, 1)
            h = self._pass(state, h, positions_Rn=positions, total=P + longest + n)
        else:
            h = self._pass(state, h, start=P + uniform)
        state.grow(n)
        return self._guide(self.model.raw_logits(h), guided, tokens)

    def _step_nodes(self, state: RasterState, codes_Bn: Tensor, nodes: Nodes) -> Logits:
        P, fresh = self.model.config.cls_token_num, not state.prefilled
        slots, positions, visible = nodes.slots_Bn, nodes.positions_Bn, nodes.visible_BnT
        self._room(state, visible.shape[-1])
        tokens = positions + 1
        guided = self.guidance.active and (fresh or int(tokens.min()) <= self.guidance.last_guided)
        h = self._embed(codes_Bn, guided)
        halves = 2 if guided else 1
        slots, positions, visible = (x.repeat(halves, *[1] * (x.dim() - 1)) for x in (P + slots, P + positions, visible))
        sees = visible.new_ones(*visible.shape[:2], P) if state.caption_mask_RP is None else state.caption_mask_RP[: len(h), None].bool()
        mask = torch.cat((sees.expand(*visible.shape[:2], P), visible), dim=-1)[:, None]
        if fresh:
            h = torch.cat((state.prefix_RPC, h), dim=1)
            captions = state.caption_mask_RP
            of_prefix = mask.new_ones(P, P).tril().expand(len(h), 1, P, P) if captions is None else prefix_mask(captions, P)
            mask = torch.cat((torch.nn.functional.pad(of_prefix, (0, visible.shape[-1])), mask), dim=2)
            ahead = torch.arange(P, device=h.device).expand(len(h), P)
            slots, positions = torch.cat((ahead, slots), dim=1), torch.cat((ahead, positions), dim=1)
            tokens = torch.cat((torch.zeros_like(tokens[:, :1]), tokens), dim=1)
        h = self._pass(state, h, positions_Rn=positions, slots_Rn=slots, mask=mask)
        state.prefilled = True
        return self._guide(self.model.raw_logits(h[:, P - 1 :] if fresh else h), guided, tokens)

    def _pass(
        self, state: RasterState, h_RnC: Tensor, *, start: int | None = None, positions_Rn: Tensor | None = None,
        total: int | None = None, slots_Rn: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """All blocks: new keys from slot ``start`` on, or where each row says, of ``total`` slots. Rotary position and slot differ inside a
        tree, which comes with a mask."""
        R, n = h_RnC.shape[:2]
        table = self.model.rope_table(h_RnC.device)
        by_length = mask is None and state.caption_mask_RP is None and reads_lengths(state.cache.k[0], n)
        if start is not None:
            total, rope = start + n, table[start : start + n]
            mask = None if by_length else _uniform_mask(state.caption_mask_RP, R, n, start, h_RnC.device)
        else:
            rope = table[positions_Rn]
            if mask is not None:
                total = mask.shape[-1]
            elif not by_length:
                mask = ragged_mask(state.caption_mask_RP, positions_Rn, total)
        ctx = AttentionContext(
            total=total, mask=mask, is_causal=mask is None and n > 1, cache=state.cache, start=start,
            positions_Bn=positions_Rn if slots_Rn is None else slots_Rn, by_length=by_length,
        )  # fmt: skip
        state.passes += 1
        state.peak_kv_bytes = max(state.peak_kv_bytes, state.cache.bytes(total))
        return self.model.backbone(h_RnC, rope, ctx, self.policy)

    def _guide(self, logits_RmV: Tensor, both: bool, tokens: Tensor) -> Logits:
        return self.guidance.halves(*logits_RmV.chunk(2), tokens) if both else logits_RmV


def _uniform_mask(caption_mask_RP: Tensor | None, rows: int, n: int, start: int, device: torch.device) -> Tensor | None:
    """None where plain causal or full attention is meant; otherwise boolean ``(R | 1, 1, n, start + n)``."""
    if caption_mask_RP is not None:
        return prefix_mask(caption_mask_RP[:rows], start + n)[:, :, start:]
    if n == 1 or start == 0:
        return None
    return torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)[None, None]


def ragged_mask(caption_mask_RP: Tensor | None, positions_Rn: Tensor, total: int) -> Tensor:
    """Boolean ``(R, 1, n, total)``: every query sees the slots up to its own, padded captions hidden."""
    slots = torch.arange(total, device=positions_Rn.device)
    mask = slots <= positions_Rn.unsqueeze(-1)
    if caption_mask_RP is not None:
        P = caption_mask_RP.shape[1]
        mask[:, :, :P] &= caption_mask_RP[: mask.shape[0], None].bool()
    return mask.unsqueeze(1)
