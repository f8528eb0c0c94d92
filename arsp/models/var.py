"""The VAR transformer (arXiv 2404.02905): next-scale prediction, every scale's codes in one pass, class-conditional.

Attribute names equal the official state-dict keys of github.com/FoundationVision/VAR. What follows from the configuration alone
(level ids, block-causal mask, the zero bias of the keys) is no part of the state dict; official files that hold it load too.

Sequence: positions are scale-major, raster inside a scale. The input of scale 0 is the class vector; that of scale k is the
sum of all coarser scales averaged down to its grid, so the model never sees code ids. The class enters through AdaLN as well,
and its six vectors a block are computed once an image (:class:`Conditioning`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy, Linear, add, attend
from arsp.tokenizers.var_vqvae import PATCH_NUMS, check_patch_nums

DERIVED_KEYS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")  # last part of official buffer names that configurations imply


@dataclass(frozen=True)
class VARConfig:
    """Sizes of one VAR; the defaults are VAR-d16 at 256 px. ``code_dim`` is the width of the tokenizer's vectors."""

    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    vocab_size: int = 4096
    code_dim: int = 32
    patch_nums: tuple[int, ...] = PATCH_NUMS[256]
    shared_aln: bool = False
    attn_l2_norm: bool = True
    norm_eps: float = 1e-6
    cond_drop_rate: float = 0.1
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        check_patch_nums(self.patch_nums)
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"VAR config: embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    @property
    def num_tokens(self) -> int:
        return sum(pn * pn for pn in self.patch_nums)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits: 1 where the queries carry a learned one (l2 attention)."""
        return 1.0 if self.attn_l2_norm else 0.25 / math.sqrt(self.head_dim)

    def scale_slice(self, first: int, last: int) -> slice:
        """Positions of scales first .. last."""
        start = sum(pn * pn for pn in self.patch_nums[:first])
        return slice(start, start + sum(pn * pn for pn in self.patch_nums[first : last + 1]))

    @classmethod
    def from_dict(cls, values: dict) -> VARConfig:
        """Build from a mapping that may hold further keys (they are ignored)."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


VARIANTS = {
    **{f"VAR-d{d}": dict(depth=d, embed_dim=64 * d, num_heads=d, patch_nums=PATCH_NUMS[256]) for d in (16, 20, 24, 30)},
    "VAR-d36-512": dict(depth=36, embed_dim=2304, num_heads=36, patch_nums=PATCH_NUMS[512], shared_aln=True),
}


@dataclass
class Conditioning:
    """What the class decides, for R rows: the class vectors, six AdaLN vectors ``(R, 1, C)`` a block, two of the head."""

    class_RC: Tensor
    blocks: list[tuple[Tensor, ...]]
    head: tuple[Tensor, Tensor]

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The same for some rows."""
        pick = lambda vectors: tuple(x[index] for x in vectors)  # noqa: E731
        return Conditioning(self.class_RC[index], [pick(block) for block in self.blocks], pick(self.head))


class ClassTransformer(nn.Module):
    """Parts, conditioning, head and start that a VAR and its distilled student share; ``levels`` and ``length``: rows of the level
    and position tables, ``length_start``: positions that start from the class vector."""

    feeds = {"head_nm.modulate": ("head",)}

    def __init__(self, config: VARConfig, levels: int, length: int, length_start: int):
        super().__init__()
        self.config = config
        C = config.embed_dim
        self.word_embed = Linear(config.code_dim, C, bias=True)
        self.class_emb = nn.Embedding(config.num_classes + 1, C)  # the last row is the null class of guidance
        self.pos_start = nn.Parameter(torch.zeros(1, length_start, C))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, C))
        self.lvl_embed = nn.Embedding(levels, C)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(C, 6 * C, bias=True))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = Linear(C, config.vocab_size, bias=True)
        self.register_load_state_dict_pre_hook(_drop_derived)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; linear layers may be replaced by others that keep their weights in any form."""
        return self.class_emb.weight.dtype

    def conditioning(self, labels_B: Tensor, null: bool = False) -> Conditioning:
        """AdaLN vectors of the classes and, with ``null``, of as many rows of the null class behind them (computed once)."""
        if null:
            labels_B = torch.cat((labels_B, labels_B.new_full((1,), self.config.num_classes)))
        class_RC = self.class_emb(labels_B)
        shared = self.shared_ada_lin(class_RC).unflatten(-1, (6, -1)) if self.config.shared_aln else None
        blocks = [tuple(x.unsqueeze(1) for x in block.vectors(class_RC, shared).unbind(1)) for block in self.blocks]
        scale, shift = self.head_nm.ada_lin(class_RC).unflatten(-1, (2, -1)).unsqueeze(2).unbind(1)
        found = Conditioning(class_RC, blocks, (scale, shift))
        if not null:
            return found
        B = len(labels_B) - 1
        return found.rows(torch.cat((torch.arange(B), torch.full((B,), B))).to(labels_B.device))

    def logits(self, h_RnC: Tensor, cond: Conditioning) -> Tensor:
        """Float32 logits ``(R, n, V)``; ``cond`` may have further rows."""
        return self.raw_logits(h_RnC, cond).float()

    def raw_logits(self, h_RnC: Tensor, cond: Conditioning) -> Tensor:
        """:meth:`logits` in the type of the model."""
        scale, shift = (x[: len(h_RnC)] for x in cond.head)
        return self.head(self.head_nm.modulate(h_RnC, scale, shift, self.dtype))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, adaln_gamma: float = 1e-3) -> None:
        """The official start: matrices and tables N(0, 1/(3C)), biases 0; gains of AdaLN scaled by ``adaln_gamma``, its other rows by
        0.5, head by 0.02, ``proj`` and ``fc2`` by (2 depth)^-0.5; the learned attention scale log 4."""
        std = math.sqrt(1 / (3 * self.config.embed_dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for table in (self.pos_start, self.pos_1LC):
            table.normal_(0.0, std, generator=generator)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].weight.mul_(0.5)
        for block in self.blocks:
            block.init_residual(2 * self.config.depth, adaln_gamma, generator)


class VAR(ClassTransformer):
    """Logits of all codes of a scale from the class and the sum of the coarser scales."""

    def __init__(self, config: VARConfig):
        super().__init__(config, config.num_scales, config.num_tokens, config.patch_nums[0] ** 2)

    def embed(self, maps_BnE: Tensor, class_RC: Tensor, first: int, last: int) -> Tensor:
        """Input of scales first .. last, ``(R, n, C)`` float32. ``maps_BnE``: the maps of these scales, scale 0 having none; all
        guidance halves see the same maps."""
        maps_BnE = self.word_embed(maps_BnE.to(self.dtype)).float()
        h_RnC = maps_BnE.repeat(len(class_RC) // len(maps_BnE), 1, 1)
        if first == 0:
            h_RnC = torch.cat((class_RC.unsqueeze(1).float() + self.pos_start.float(), h_RnC), dim=1)
        return h_RnC + self.positions(first, last)

    def positions(self, first: int, last: int) -> Tensor:
        """Level plus position embedding of scales first .. last: ``(1, n, C)`` float32."""
        sides = self.config.patch_nums[first : last + 1]
        levels = self.lvl_embed.weight[first : last + 1].float().split(1)
        levels_nC = torch.cat([level.expand(pn * pn, -1) for level, pn in zip(levels, sides, strict=True)])
        return levels_nC + self.pos_1LC[:, self.config.scale_slice(first, last)].float()

    def backbone(
        self, h_RnC: Tensor, cond: Conditioning, ctx: AttentionContext, policy: DensePolicy | None = None, depth: int | None = None
    ) -> Tensor:
        """The first ``depth`` blocks (None: all). The residual stream keeps the precision of ``h_RnC``."""
        policy = policy or _DENSE
        for i, block in enumerate(self.blocks[:depth]):
            h_RnC = block(h_RnC, cond.blocks[i], i, ctx, policy)
        return h_RnC

    def forward(self, labels_B: Tensor, inputs_BlE: Tensor) -> Tensor:
        """Teacher-forced float32 logits of the leading scales that the inputs of scales 1 .. k fill: ``(B, n_0 + l, V)``."""
        last, n = 0, inputs_BlE.shape[1] + self.config.patch_nums[0] ** 2
        while self.config.scale_slice(0, last).stop < n:
            last += 1
        cond = self.conditioning(labels_B)
        h_BLC = self.embed(inputs_BlE, cond.class_RC, 0, last)
        mask = block_causal_mask(self.config.patch_nums[: last + 1], h_BLC.device)
        ctx = AttentionContext(total=n, mask=mask, scale=self.config.attention_scale)
        return self.logits(self.backbone(h_BLC, cond, ctx), cond)


class Block(nn.Module):
    """``x + g1 attn(LN(x) (1 + s1) + b1)``, then the same with the feed-forward layer; vectors g1, g2, s1, s2, b1, b2."""

    feeds = {"norm1": ("attn.mat_qkv",), "norm2": ("ffn.fc1",), "ffn.act": ("ffn.fc2",)}

    def __init__(self, config: VARConfig, index: int):
        super().__init__()
        C = config.embed_dim
        self.drop_path = config.drop_path_rate * index / max(1, config.depth - 1)
        self.norm1, self.norm2 = Modulate(config.norm_eps), Modulate(config.norm_eps)
        self.attn = Attention(config)
        self.ffn = FeedForward(C, round(C * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, C) / C**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(C, 6 * C, bias=True))

    def vectors(self, class_RC: Tensor, shared_R6C: Tensor | None) -> Tensor:
        """The six AdaLN vectors ``(R, 6, C)``."""
        return self.ada_lin(class_RC).unflatten(-1, (6, -1)) if shared_R6C is None else self.ada_gss[0] + shared_R6C

    def forward(
        self, x: Tensor, vectors: tuple[Tensor, ...], layer: int, ctx: AttentionContext, policy: DensePolicy, between: Tensor | None = None
    ) -> Tensor:
        """``between`` (a student's mark of data and noise) is added behind the attention branch."""
        gain1, gain2, scale1, scale2, shift1, shift2 = vectors
        dtype = self.attn.q_bias.dtype
        x = self.attn(self.norm1(x, scale1, shift1, dtype), layer, ctx, policy, x, self._drop(gain1))
        x = x if between is None else x + between
        return self.ffn(self.norm2(x, scale2, shift2, dtype), x, self._drop(gain2))

    def _drop(self, gain_R1C: Tensor) -> Tensor:
        """Stochastic depth: a whole branch of a row is dropped in training."""
        if not self.training or not self.drop_path:
            return gain_R1C
        kept = torch.rand(len(gain_R1C), 1, 1, device=gain_R1C.device) >= self.drop_path
        return gain_R1C * kept / (1 - self.drop_path)

    def init_residual(self, branches: int, adaln_gamma: float, generator: torch.Generator | None) -> None:
        self.attn.proj.weight.div_(math.sqrt(branches))
        self.ffn.fc2.weight.div_(math.sqrt(branches))
        if hasattr(self, "ada_lin"):
            gains, rest = self.ada_lin[1].weight.tensor_split((2 * self.attn.proj.in_features,))
            gains.mul_(adaln_gamma)
            rest.mul_(0.5)
        else:
            self.ada_gss.normal_(0.0, self.ada_gss.shape[-1] ** -0.5, generator=generator)
            self.ada_gss[:, :, :2].mul_(adaln_gamma)
            self.ada_gss[:, :, 2:].mul_(0.5)
        if hasattr(self.attn, "scale_mul_1H11"):
            self.attn.scale_mul_1H11.fill_(math.log(4))


class Attention(nn.Module):
    """Self-attention; with ``attn_l2_norm`` queries and keys are unit vectors and a learned factor a head sharpens the softmax.

    What a policy lets the two guidance halves share is not computed for the null rows: with ``map`` their queries and keys, with
    ``output`` the whole attention branch.
    """

    max_log_scale = math.log(100)

    def __init__(self, config: VARConfig):
        super().__init__()
        C = config.embed_dim
        self.head_dim, self.l2_norm = config.head_dim, config.attn_l2_norm
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4)))
        self.mat_qkv = Linear(C, 3 * C)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.proj = Linear(C, C, bias=True)

    def forward(
        self, x_RnC: Tensor, layer: int, ctx: AttentionContext, policy: DensePolicy, residual: Tensor, gain: Tensor
    ) -> Tensor:  # fmt: skip
        """``residual`` plus ``gain`` times the branch."""
        share = ctx.shares[layer] if ctx.shares else "none"
        if share == "output":
            x_RnC = x_RnC[: len(x_RnC) // 2]
        C = x_RnC.shape[-1]
        if share == "map":
            qk, v = self._project(x_RnC[: len(x_RnC) // 2], 0, 2 * C), self._project(x_RnC, 2 * C, 3 * C)
        else:
            qk, v = self._project(x_RnC, 0, 3 * C).split((2 * C, C), dim=-1)
        qk, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (qk, v))
        if self.l2_norm:
            sharpness = self.scale_mul_1H11.float().clamp_max(self.max_log_scale).exp()
            length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
            qk = (qk * (torch.cat((sharpness, torch.ones_like(sharpness)), dim=1) / length)).type_as(v)
        q, k = qk.chunk(2, dim=1)
        out = attend(policy, q, k, v, layer, ctx).transpose(1, 2).flatten(2)
        return add(self.proj(out).repeat(2, 1, 1), residual, gain) if share == "output" else self.proj(out, residual=residual, gain=gain)

    def _project(self, x_RnC: Tensor, first: int, stop: int) -> Tensor:
        """Queries, keys and values: outputs first .. stop - 1 of ``mat_qkv`` with their bias, of which keys have none."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))[first:stop]
        return self.mat_qkv(x_RnC, outputs=slice(first, stop), bias=bias)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=True)
        self.act = GELU()
        self.fc2 = Linear(hidden, width, bias=True)

    def forward(self, x: Tensor, residual: Tensor, gain: Tensor) -> Tensor:
        """``residual`` plus ``gain`` times the branch."""
        return self.fc2(self.act(self.fc1, x), residual=residual, gain=gain)


class GELU(nn.Module):
    """``GELU(layer(x))`` in its tanh form, made by the layer itself where it can."""

    def forward(self, layer: Linear, x: Tensor) -> Tensor:
        return layer(x, gelu=True)


class AdaLNBeforeHead(nn.Module):
    """Holds the linear layer that makes the head's scale and shift, and the norm that takes them."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.modulate = Modulate(config.norm_eps)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.embed_dim, 2 * config.embed_dim, bias=True))


class Modulate(nn.Module):
    """``LayerNorm(x) (1 + scale) + shift`` in the precision of the vectors, given back in ``dtype``; no weights of its own."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale).to(dtype)


def block_causal_mask(sides: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Boolean ``(1, 1, L, L)``: a position sees its own scale and every coarser one."""
    levels = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor([pn * pn for pn in sides])).to(device)
    return (levels[:, None] >= levels[None])[None, None]


def _drop_derived(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    for key in [key for key in state_dict if key.rsplit(".", 1)[-1] in DERIVED_KEYS]:
        del state_dict[key]


_DENSE = DensePolicy()
