"""The baseline of ``arsp bench --baseline eager`` for VAR: sampling the way its official code does it.

Benchmark code, not a second model: it takes the weights of a :class:`arsp.models.var.VAR` and of its tokenizer and repeats what
github.com/FoundationVision/VAR does per scale (arXiv 2404.02905), in plain eager torch and float32: rows of both guidance halves at
every scale whatever the scale's weight; the six AdaLN vectors of every block and the two of the head computed anew at every scale and
for every row; keys and values of all scales, the last one included, kept by ``torch.cat``; dense attention; top-k by ``topk``, top-p by
an ascending sort, ``torch.multinomial``; the convolutional decoder in float32 on contiguous NCHW maps.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.models.var import VAR, Attention, Block, FeedForward
from arsp.tokenizers.var_vqvae import VQVAE, MultiScaleQuantizer

Cache = list[tuple[Tensor, Tensor] | None]  # one a layer: keys and values of the scales so far, (2B, H, T, D)


def eager_copy(model: VAR, tokenizer: VQVAE) -> tuple[VAR, VQVAE]:
    """The modules in float32 and NCHW: themselves, or copies where they are anything else."""

    def convert(module: nn.Module) -> nn.Module:
        if all(p.dtype == torch.float32 and p.is_contiguous() for p in module.parameters()):
            return module
        return copy.deepcopy(module).to(torch.float32, memory_format=torch.contiguous_format)

    return convert(model), convert(tokenizer)


def cache_bytes(model: VAR, batch_size: int) -> int:
    """Bytes of the cache of ``batch_size`` guided images behind the last scale, float32."""
    config = model.config
    return 2 * config.depth * 2 * batch_size * config.num_tokens * config.embed_dim * 4


@torch.no_grad()
def sample_official(
    model: VAR, quantizer: MultiScaleQuantizer, labels_B: Tensor, *, cfg: float, top_k: int = 0, top_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``codes_BL`` and their ``f_hat`` ``(B, E, h, w)``; ``top_k`` 0 and ``top_p`` 0 are off."""
    config, B = model.config, len(labels_B)
    K = config.num_scales
    class_RC = model.class_emb(torch.cat((labels_B, torch.full_like(labels_B, config.num_classes))))
    positions_1LC = positions(model)
    h_RnC = class_RC[:, None] + model.pos_start + positions_1LC[:, : config.patch_nums[0] ** 2]
    f_hat = class_RC.new_zeros(B, config.code_dim, config.patch_nums[-1], config.patch_nums[-1])
    caches: Cache = [None] * config.depth
    codes, done = [], 0
    for k, pn in enumerate(config.patch_nums):
        shared = model.shared_ada_lin(class_RC).view(-1, 1, 6, config.embed_dim) if config.shared_aln else None
        for layer, block in enumerate(model.blocks):
            h_RnC = run_block(block, h_RnC, class_RC, shared, caches, layer, config.attention_scale)
        cond, uncond = head(model, h_RnC, class_RC).chunk(2)
        t = cfg * k / (K - 1)
        codes.append(draw((1 + t) * cond - t * uncond, top_k, top_p, generator))
        f_hat, next_BEpp = add_scale(quantizer, f_hat, codes[-1], k)
        done += pn * pn
        if k < K - 1:
            h_RnC = embed(model, next_BEpp, positions_1LC[:, done : done + config.patch_nums[k + 1] ** 2])
    return torch.cat(codes, dim=1), f_hat


@torch.no_grad()
def to_pixels(tokenizer: VQVAE, f_hat: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return tokenizer.decode_map(f_hat).clamp_(-1, 1).add_(1).mul_(0.5)


def positions(model: VAR) -> Tensor:
    """Level plus position embedding of all positions, ``(1, L, C)``."""
    sides = model.config.patch_nums
    levels = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor([pn * pn for pn in sides])).to(model.pos_1LC.device)
    return F.embedding(levels, model.lvl_embed.weight) + model.pos_1LC


def embed(model: VAR, next_BEpp: Tensor, positions_1nC: Tensor) -> Tensor:
    """The map of a scale -> its input, for both guidance halves."""
    tokens = next_BEpp.flatten(2).transpose(1, 2)
    return (F.linear(tokens, model.word_embed.weight, model.word_embed.bias) + positions_1nC).repeat(2, 1, 1)


def run_block(block: Block, x: Tensor, class_RC: Tensor, shared: Tensor | None, caches: Cache, layer: int, scale: float) -> Tensor:
    gain1, gain2, scale1, scale2, shift1, shift2 = adaln(block, class_RC, shared)
    x = x + attention(block.attn, norm(x, block.norm1.eps).mul(scale1.add(1)).add_(shift1), caches, layer, scale).mul_(gain1)
    return x + feed_forward(block.ffn, norm(x, block.norm2.eps).mul(scale2.add(1)).add_(shift2)).mul(gain2)


def adaln(block: Block, class_RC: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
    """Six vectors ``(R, 1, C)``."""
    if shared is not None:
        return (block.ada_gss + shared).unbind(2)
    return modulation(block.ada_lin, class_RC, 6)


def modulation(ada_lin: nn.Sequential, class_RC: Tensor, num: int) -> tuple[Tensor, ...]:
    return F.linear(F.silu(class_RC), ada_lin[1].weight, ada_lin[1].bias).view(len(class_RC), 1, num, -1).unbind(2)


def norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def attention(module: Attention, x_RnC: Tensor, caches: Cache, layer: int, scale: float) -> Tensor:
    R, n, C = x_RnC.shape
    bias = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
    qkv = F.linear(x_RnC, module.mat_qkv.weight, bias).view(R, n, 3, -1, module.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if module.l2_norm:
        q = F.normalize(q, dim=-1).mul(module.scale_mul_1H11.clamp_max(math.log(100)).exp())
        k = F.normalize(k, dim=-1)
    if caches[layer] is not None:
        k, v = torch.cat((caches[layer][0], k), dim=2), torch.cat((caches[layer][1], v), dim=2)
    caches[layer] = (k, v)
    out = softmax_attention(q, k, v, scale).transpose(1, 2).reshape(R, n, C)
    return F.linear(out, module.proj.weight, module.proj.bias)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def feed_forward(module: FeedForward, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias), approximate="tanh")
    return F.linear(hidden, module.fc2.weight, module.fc2.bias)


def head(model: VAR, h_RnC: Tensor, class_RC: Tensor) -> Tensor:
    """Logits ``(2B, n, V)``."""
    scale, shift = modulation(model.head_nm.ada_lin, class_RC, 2)
    return F.linear(norm(h_RnC, model.config.norm_eps).mul(scale.add(1)).add_(shift), model.head.weight, model.head.bias)


def draw(logits_BnV: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """``codes_Bn``."""
    B, n, V = logits_BnV.shape
    if top_k > 0:
        kept = logits_BnV.topk(top_k, largest=True, sorted=False).values
        logits_BnV = logits_BnV.masked_fill(logits_BnV < kept.amin(-1, keepdim=True), -torch.inf)
    if top_p > 0:
        ordered, index = logits_BnV.sort(dim=-1, descending=False)
        removed = ordered.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        removed[..., -1:] = False
        logits_BnV = logits_BnV.masked_fill(removed.scatter(-1, index, removed), -torch.inf)
    return torch.multinomial(logits_BnV.softmax(dim=-1).view(-1, V), 1, replacement=True, generator=generator).view(B, n)


def add_scale(quantizer: MultiScaleQuantizer, f_hat: Tensor, codes_Bn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``f_hat`` with scale k added, and the map of the next scale."""
    f_hat = f_hat + quantizer.contribution(quantizer.embedding(codes_Bn), k)
    return f_hat, quantizer.next_map(f_hat, k)
