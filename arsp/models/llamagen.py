"""The LlamaGen GPT (arXiv 2406.06525): a Llama-style decoder over VQ codes in raster order, class- or text-conditional.

Attribute names equal the official state-dict keys of github.com/FoundationVision/LlamaGen, so its checkpoints load with
``strict=True`` and no renaming. The key-value cache is not part of the module: attention goes through a ComputePolicy.

note: the rotary table holds ZEROS (cos and sin) for the conditioning prefix, so prefix queries and keys are zero vectors:
every later query gives all visible prefix slots the same, content-free weight exp(0). Released weights depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.errors import ConfigError
from arsp.kernels import apply_rope, rms_norm
from arsp.models.attention import AttentionContext, DensePolicy, Linear, attend


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of one GPT. ``model_type`` "c2i": one class token as prefix; "t2i": ``cls_token_num`` caption features."""

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 16384
    block_size: int = 256
    num_classes: int = 1000
    model_type: str = "c2i"
    cls_token_num: int = 1
    caption_dim: int = 2048
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    class_dropout_prob: float = 0.1
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        side = round(self.block_size**0.5)
        problems = {
            f"dim {self.dim} is not divisible by n_head {self.n_head}": self.dim % self.n_head,
            f"head width {self.dim // self.n_head} is not a multiple of 4 (2-D rotary embedding)": (self.dim // self.n_head) % 4,
            f"block_size {self.block_size} is not a perfect square": side * side != self.block_size,
            f"model_type '{self.model_type}' is neither 'c2i' nor 't2i'": self.model_type not in ("c2i", "t2i"),
            f"a class-conditional model has one prefix token, not {self.cls_token_num}": self.model_type == "c2i"
            and self.cls_token_num != 1,
        }
        for problem, present in problems.items():
            if present:
                raise ConfigError(f"GPT config: {problem}.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        """SwiGLU width: floor(2/3 * 4 * dim), rounded up to ``multiple_of``."""
        return -(-int(2 * (4 * self.dim) / 3) // self.multiple_of) * self.multiple_of

    @property
    def side(self) -> int:
        return round(self.block_size**0.5)

    @classmethod
    def from_dict(cls, values: dict) -> GPTConfig:
        """Build from a mapping that may hold further keys (they are ignored)."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


VARIANTS = {
    "GPT-B": dict(n_layer=12, n_head=12, dim=768),
    "GPT-L": dict(n_layer=24, n_head=16, dim=1024),
    "GPT-XL": dict(n_layer=36, n_head=20, dim=1280),
    "GPT-XXL": dict(n_layer=48, n_head=24, dim=1536),
    "GPT-XXXL": dict(n_layer=48, n_head=40, dim=2560),
    "GPT-1B": dict(n_layer=22, n_head=32, dim=2048),
    "GPT-3B": dict(n_layer=24, n_head=32, dim=3200),
    "GPT-7B": dict(n_layer=32, n_head=32, dim=4096),
}


class GPT(nn.Module):
    """Logits of the next code from a conditioning prefix and the codes so far."""

    feeds = {"norm": ("output",)}

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config) if config.model_type == "c2i" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self._rope: Tensor | None = None

    def forward(self, codes_Bn: Tensor, condition: Tensor, caption_mask_BP: Tensor | None = None) -> Tensor:
        """Teacher-forced float32 logits ``(B, n + 1, V)``: entry i predicts code i from the condition and codes before i.

        ``condition`` is ``labels_B`` (c2i) or caption features ``(B, P, caption_dim)`` (t2i).
        """
        P, n = self.config.cls_token_num, codes_Bn.shape[1]
        h_BSC = torch.cat((self.cls_embedding(condition), self.tok_embeddings(codes_Bn)), dim=1)
        mask = None if caption_mask_BP is None else prefix_mask(caption_mask_BP, P + n)
        ctx = AttentionContext(total=P + n, mask=mask, is_causal=mask is None)
        h_BSC = self.backbone(self.tok_dropout(h_BSC), self.rope_table(h_BSC.device)[: P + n], ctx)
        return self.head(h_BSC[:, P - 1 :])

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; linear layers may be replaced by others that keep their weights in any form."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def backbone(self, h_BnC: Tensor, rope: Tensor, ctx: AttentionContext, policy: DensePolicy | None = None) -> Tensor:
        """All blocks. ``rope`` is ``(n, D/2, 2)`` or per row ``(B, n, D/2, 2)``."""
        policy = policy or _DENSE
        for i, layer in enumerate(self.layers):
            h_BnC = layer(h_BnC, rope, i, ctx, policy)
        return h_BnC

    def head(self, h_BnC: Tensor) -> Tensor:
        return self.raw_logits(h_BnC).float()

    def raw_logits(self, h_BnC: Tensor) -> Tensor:
        """Logits in the type of the model."""
        return self.output(self.norm(h_BnC))

    def rope_table(self, device: torch.device | str | None = None) -> Tensor:
        """``(P + L, D/2, 2)`` float32 cos and sin; not part of the state dict."""
        device = torch.device(device or "cpu")
        if self._rope is None or self._rope.device != device:
            cfg = self.config
            self._rope = rope_table(cfg.side, cfg.head_dim, cfg.rope_base, cfg.cls_token_num).to(device)
        return self._rope

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Linear and Embedding N(0, initializer_range); norms 1; ``output`` zero; ``uncond_embedding`` N(0, 1)/sqrt(width)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        self.output.weight.zero_()
        if self.config.model_type == "t2i":
            self.cls_embedding.uncond_embedding.normal_(0.0, self.config.caption_dim**-0.5, generator=generator)


class Block(nn.Module):
    feeds = {
        "attention_norm": ("attention.wqkv",), "ffn_norm": ("feed_forward.w1", "feed_forward.w3"), "feed_forward.act": ("feed_forward.w2",)
    }  # fmt: skip

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, layer: int, ctx: AttentionContext, policy: DensePolicy) -> Tensor:
        x = self.attention(self.attention_norm(x), rope, layer, ctx, policy, x)
        return self.feed_forward(self.ffn_norm(x), x)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.wqkv = Linear(config.dim, 3 * config.dim)
        self.wo = Linear(config.dim, config.dim)
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def forward(
        self, x_BnC: Tensor, rope: Tensor, layer: int, ctx: AttentionContext, policy: DensePolicy, residual: Tensor
    ) -> Tensor:  # fmt: skip
        """``residual`` plus the branch."""
        B, n, C = x_BnC.shape
        qk, v = self.wqkv(x_BnC).view(B, n, 3 * self.n_head, self.head_dim).split((2 * self.n_head, self.n_head), dim=2)
        q, k = apply_rope(qk, rope).chunk(2, dim=2)
        out = attend(policy, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layer, ctx)
        return dropped(self.wo, out.transpose(1, 2).reshape(B, n, C), self.resid_dropout, residual)


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w3 = Linear(config.dim, config.ffn_dim)
        self.act = SwiGLU()
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` plus the branch."""
        return dropped(self.w2, self.act(self.w1, self.w3, x), self.ffn_dropout, residual)


def dropped(layer: Linear, x: Tensor, dropout: nn.Dropout, residual: Tensor) -> Tensor:
    """``residual + dropout(layer(x))``, added by the layer itself where nothing is dropped."""
    if dropout.training and dropout.p:
        return residual + dropout(layer(x))
    return layer(x, residual=residual)


class SwiGLU(nn.Module):
    """``silu(gate(x)) up(x)``, made inside the products where the layers can."""

    def forward(self, gate: Linear, up: Linear, x: Tensor) -> Tensor:
        return F.silu(gate(x)) * up(x)


class RMSNorm(nn.Module):
    """Statistics in float32, cast back, then the weight in model dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LabelEmbedder(nn.Module):
    """Class id -> one prefix token. The last row, index ``num_classes``, is the null class of guidance."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + (config.class_dropout_prob > 0), config.dim)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B).unsqueeze(1)


class CaptionEmbedder(nn.Module):
    """Text-encoder features -> P prefix tokens through a bias-free MLP, so that zeroed padding stays exactly zero."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.cap_proj = CaptionMLP(config.caption_dim, config.dim)
        # note: a random constant that the official trainer never trains; it is stored in the checkpoint and must be kept.
        self.register_buffer("uncond_embedding", torch.zeros(config.cls_token_num, config.caption_dim))

    def forward(self, captions_BPE: Tensor) -> Tensor:
        return self.cap_proj(captions_BPE)[:, : self.uncond_embedding.shape[0]]


class CaptionMLP(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.fc1 = nn.Linear(cin, cout, bias=False)
        self.fc2 = nn.Linear(cout, cout, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def rope_table(side: int, head_dim: int, base: float, prefix: int) -> Tensor:
    """2-D rotary table ``(prefix + side^2, head_dim / 2, 2)``: row angles first, then column angles; prefix rows all zero."""
    quarter = head_dim // 4
    theta = 1.0 / base ** (torch.arange(quarter, dtype=torch.float32) * 2 / (head_dim // 2))
    angle = torch.outer(torch.arange(side, dtype=torch.float32), theta)
    rows, columns = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    grid = torch.cat((rows, columns), dim=-1).reshape(side * side, head_dim // 2)
    table = torch.stack((grid.cos(), grid.sin()), dim=-1)
    return torch.cat((torch.zeros(prefix, *table.shape[1:]), table))


def left_pad(captions_BPE: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Text-encoder output, valid tokens first -> the condition the model was trained with: valid tokens last, padding zeroed.

    Returns the condition ``(B, P, E)`` and its boolean mask ``(B, P)``.
    """
    P = mask_BP.shape[1]
    valid_B1 = mask_BP.long().sum(1, keepdim=True)
    order_BP = (torch.arange(P, device=mask_BP.device) + valid_B1) % P
    moved = captions_BPE.gather(1, order_BP.unsqueeze(-1).expand_as(captions_BPE))
    mask = mask_BP.bool().flip(1)
    return moved * mask.unsqueeze(-1), mask


def prefix_mask(caption_mask_BP: Tensor, total: int) -> Tensor:
    """Boolean ``(B, 1, total, total)``: causal, padded caption columns hidden, the diagonal forced on (finite softmax)."""
    B, P = caption_mask_BP.shape
    causal = torch.ones(total, total, dtype=torch.bool, device=caption_mask_BP.device).tril()
    mask = causal.repeat(B, 1, 1)
    mask[:, :, :P] &= caption_mask_BP.bool()[:, None]
    mask |= torch.eye(total, dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(1)


_DENSE = DensePolicy()
