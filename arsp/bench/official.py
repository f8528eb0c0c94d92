"""The baseline of ``arsp bench --baseline eager``: sampling a LlamaGen GPT the way its official code does it.

Benchmark code, not a second model: it takes the weights of a :class:`arsp.models.llamagen.GPT` and repeats what
github.com/FoundationVision/LlamaGen does per generated token (arXiv 2406.06525; docs/methods/llamagen.md), in plain eager torch:
a zero-filled cache of (prefix + tokens) rounded up to a multiple of 8 slots in every layer, written by index put; attention over
ALL slots with a boolean lower-triangular mask; [conditional ; unconditional] rows on every pass; the rotary embedding in float32
by stack and flatten, without complex numbers; softmax and ``torch.multinomial`` per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arsp.models.llamagen import GPT, Attention, RMSNorm


@dataclass
class OfficialCache:
    """One layer: ``(2B, H, slots, D)`` zeros, filled by index."""

    k: Tensor
    v: Tensor

    def update(self, positions_n: Tensor, k_BHnD: Tensor, v_BHnD: Tensor) -> tuple[Tensor, Tensor]:
        self.k[:, :, positions_n] = k_BHnD
        self.v[:, :, positions_n] = v_BHnD
        return self.k, self.v


def rounded_slots(num: int) -> int:
    """Cache slots of the official code: the next multiple of 8."""
    return -(-num // 8) * 8


def cache_bytes(model: GPT, batch_size: int) -> int:
    """Bytes of the full-length cache of ``batch_size`` guided images."""
    cfg = model.config
    slots = rounded_slots(cfg.cls_token_num + cfg.block_size)
    return 2 * cfg.n_layer * 2 * batch_size * cfg.dim * slots * model.output.weight.element_size()


@torch.no_grad()
def sample_official(
    model: GPT, labels_B: Tensor, *, cfg_scale: float = 2.0, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``codes_BL`` of a class-conditional model, guided (``cfg_scale`` > 1), top-k and top-p off."""
    cfg, device = model.config, labels_B.device
    B, dtype = labels_B.shape[0], model.output.weight.dtype
    slots = rounded_slots(cfg.cls_token_num + cfg.block_size)
    caches = [
        OfficialCache(*(torch.zeros(2 * B, cfg.n_head, slots, cfg.head_dim, dtype=dtype, device=device) for _ in range(2)))
        for _ in range(cfg.n_layer)
    ]
    mask_SS = torch.tril(torch.ones(slots, slots, dtype=torch.bool, device=device))
    rope = model.rope_table(device)
    condition = torch.cat((labels_B, torch.full_like(labels_B, cfg.num_classes)))

    positions = torch.arange(cfg.cls_token_num, device=device)
    logits = forward(model, model.cls_embedding(condition), positions, rope, mask_SS, caches)
    codes = [draw(logits, cfg_scale, temperature, generator)]
    positions = torch.tensor([cfg.cls_token_num], device=device)
    for _ in range(cfg.block_size - 1):
        fed = torch.cat((codes[-1], codes[-1]))
        logits = forward(model, model.tok_embeddings(fed), positions, rope, mask_SS, caches)
        codes.append(draw(logits, cfg_scale, temperature, generator))
        positions = positions + 1
    return torch.cat(codes, dim=1)


def forward(model: GPT, h_BnC: Tensor, positions_n: Tensor, rope: Tensor, mask_SS: Tensor, caches: list[OfficialCache]) -> Tensor:
    """One pass over ``positions_n``: float32 logits ``(2B, n, V)`` of every fed position."""
    mask = mask_SS[None, None, positions_n].expand(h_BnC.shape[0], -1, -1, -1)
    rotation = rope[positions_n]
    for layer, cache in zip(model.layers, caches, strict=True):
        h_BnC = h_BnC + attention(layer.attention, norm(layer.attention_norm, h_BnC), rotation, mask, cache, positions_n)
        ffn, x = layer.feed_forward, norm(layer.ffn_norm, h_BnC)
        h_BnC = h_BnC + F.linear(F.silu(F.linear(x, ffn.w1.weight)) * F.linear(x, ffn.w3.weight), ffn.w2.weight)
    return F.linear(norm(model.norm, h_BnC), model.output.weight).float()


def attention(module: Attention, x_BnC: Tensor, rotation: Tensor, mask: Tensor, cache: OfficialCache, positions_n: Tensor) -> Tensor:
    B, n, C = x_BnC.shape
    q, k, v = (part.view(B, n, module.n_head, module.head_dim) for part in F.linear(x_BnC, module.wqkv.weight).split(C, dim=-1))
    q, k = rotate(q, rotation), rotate(k, rotation)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    keys, values = cache.update(positions_n, k, v)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=False, dropout_p=0.0)
    return F.linear(out.transpose(1, 2).contiguous().view(B, n, C), module.wo.weight)


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + module.eps)).type_as(x) * module.weight


def rotate(x_BnHD: Tensor, rotation: Tensor) -> Tensor:
    """Interleaved pairs, float32, without complex numbers."""
    pairs = x_BnHD.float().reshape(*x_BnHD.shape[:-1], -1, 2)
    table = rotation.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    rotated = torch.stack(
        (
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ),
        dim=-1,
    )
    return rotated.flatten(3).type_as(x_BnHD)


def draw(logits_BnV: Tensor, cfg_scale: float, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Guide the last position and draw ``codes_B1``."""
    conditional, unconditional = logits_BnV.chunk(2)
    guided = unconditional + (conditional - unconditional) * cfg_scale
    probabilities = torch.softmax(guided[:, -1, :] / max(temperature, 1e-5), dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)
