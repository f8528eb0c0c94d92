"""The Distilled Decoding student of a LlamaGen teacher (arXiv 2412.17153): the whole noise trajectory to all codes in one pass.

Input: one continuous vector a position, the codebook vector of a known code or the noise vector of an unknown one, told apart by
``n_d_embed`` (row 1 = known data and the class position, row 0 = noise). Output i is read at the position holding vector i
itself. Attribute names equal the released state-dict keys of github.com/microsoft/distilled_decoding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.models.attention import AttentionContext, DensePolicy, Linear
from arsp.models.llamagen import GPT, Block, GPTConfig, LabelEmbedder, RMSNorm, rope_table


class LlamaGenStudent(nn.Module):
    """Causal over [class, x_1 .. x_L]; two heads: logits over codes, and continuous codebook-space vectors."""

    feeds = {"norm": ("output",)}

    def __init__(self, config: GPTConfig, code_dim: int):
        super().__init__()
        self.config, self.code_dim = config, code_dim
        self.cls_embedding = LabelEmbedder(config)
        self.tok_embeddings = nn.Linear(code_dim, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.final_layer_conti = ContinuousHead(config.dim, code_dim)
        self.n_d_embed = nn.Embedding(2, config.dim)
        self.policy = DensePolicy()
        self._rope: Tensor | None = None

    def forward(self, labels_B: Tensor, x_BLE: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
        """``known_B[b]`` leading vectors of row b are data, the rest noise -> ``logits_BLV`` (float32), ``vectors_BLE`` (float32)."""
        L = x_BLE.shape[1]
        positions = torch.arange(L + 1, device=x_BLE.device)
        is_data = (positions <= known_B[:, None]).long()
        class_B1C = self.cls_embedding(labels_B)
        h = torch.cat((class_B1C, self.tok_embeddings(x_BLE)), dim=1) + self.n_d_embed(is_data)
        rope, ctx = self.rope_table(h.device)[: L + 1], AttentionContext(total=L + 1, is_causal=True)
        for i, layer in enumerate(self.layers):
            h = layer(h, rope, i, ctx, self.policy)
        with torch.autocast(h.device.type, enabled=False):  # both heads in the weights' own precision
            h, class_B1C = h.to(self.dtype), class_B1C.to(self.dtype)
            return self.output(self.norm(h))[:, 1:].float(), self.final_layer_conti(h, class_B1C)[:, 1:].float()

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; linear layers may be replaced by others that keep their weights in any form."""
        return self.norm.weight.dtype

    def rope_table(self, device: torch.device) -> Tensor:
        """The teacher's rotary table ``(1 + L, D/2, 2)``; not part of the state dict."""
        if self._rope is None or self._rope.device != device:
            self._rope = rope_table(self.config.side, self.config.head_dim, self.config.rope_base, 1).to(device)
        return self._rope

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """A start without a teacher: matrices and tables N(0, initializer_range), norms 1, biases and ``output`` zero,
        ``scale_shift_table`` N(0, 1/C)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        self.output.weight.zero_()
        self.tok_embeddings.bias.zero_()
        self.final_layer_conti.init_weights(generator)

    @torch.no_grad()
    def init_from_teacher(self, teacher: GPT, codebook_VE: Tensor, generator: torch.Generator | None = None, ridge: float = 1e-3) -> None:
        """Class table, blocks, norm and output copied; ``tok_embeddings`` = ridge least squares from codebook vectors to the
        teacher's code embeddings, so that data tokens start near the teacher's own representation; the rest N(0, 0.02)."""
        own = self.state_dict()
        for name, value in teacher.state_dict().items():
            if not name.startswith("tok_embeddings"):
                own[name].copy_(value)
        X = torch.cat((codebook_VE.double(), torch.ones(len(codebook_VE), 1, dtype=torch.float64)), dim=1)
        gram = X.T @ X + ridge * len(X) * torch.eye(X.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, X.T @ teacher.tok_embeddings.weight.double())
        self.tok_embeddings.weight.copy_(solution[:-1].T)
        self.tok_embeddings.bias.copy_(solution[-1])
        self.n_d_embed.weight.normal_(0.0, 0.02, generator=generator)
        self.final_layer_conti.init_weights(generator)


class ContinuousHead(nn.Module):
    """``Linear(LayerNorm(h) * (1 + scale) + shift)``, (shift, scale) = table + class embedding."""

    def __init__(self, dim: int, code_dim: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.linear = nn.Linear(dim, code_dim)

    def forward(self, h_BlC: Tensor, class_B1C: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + class_B1C).chunk(2, dim=1)
        return self.linear(F.layer_norm(h_BlC, h_BlC.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Weight N(0, 0.02), bias 0, table N(0, 1/C)."""
        self.linear.weight.normal_(0.0, 0.02, generator=generator)
        self.linear.bias.zero_()
        self.scale_shift_table.copy_(torch.randn(self.scale_shift_table.shape, generator=generator) / math.sqrt(self.linear.in_features))
