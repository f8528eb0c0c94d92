"""The Distilled Decoding student of a VAR teacher (arXiv 2412.17153): the noise of all scales to all codes in one pass.

Input: at every position one continuous vector, the codebook vector of a known code or the noise vector of an unknown one, told
apart by ``n_d_embed`` (row 1 = known data and the class position, row 0 = noise), which also enters every block behind its
attention. The sequence is one level longer than the teacher's: the class has a position of its own in front. A position sees the
levels below its own and itself, not its neighbours in the scale: given the coarser scales they are independent. Attribute names
equal the released state-dict keys of github.com/microsoft/distilled_decoding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from arsp.errors import ConfigError
from arsp.models.attention import AttentionContext, DensePolicy, Linear
from arsp.models.student import ContinuousHead
from arsp.models.var import VAR, ClassTransformer, VARConfig


class VARStudent(ClassTransformer):
    """Two heads: logits over codes, and continuous codebook-space vectors. The teacher's stochastic depth is not used."""

    def __init__(self, config: VARConfig, code_dim: int):
        if code_dim != config.code_dim:
            raise ConfigError(f"student on {code_dim}-vectors of a VAR on {config.code_dim}-vectors: the widths must be equal.")
        super().__init__(replace(config, drop_path_rate=0.0), config.num_scales + 1, config.num_tokens + 1, 1)
        C = config.embed_dim
        self.code_dim = code_dim
        self.n_d_embed = nn.Embedding(2, C)
        self.layerwise_n_d_embed = nn.ModuleList(Linear(C, C, bias=True) for _ in range(config.depth + 1))
        self.final_layer_conti = ContinuousHead(C, code_dim)
        self.policy = DensePolicy()
        self._levels_and_mask: tuple[Tensor, Tensor] | None = None

    def forward(self, labels_B: Tensor, x_BLE: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
        """``known_B[b]`` leading vectors (those of whole scales) of row b are data, the rest noise -> ``logits_BLV`` (float32),
        ``vectors_BLE`` (float32)."""
        L = x_BLE.shape[1]
        is_data = (torch.arange(L + 1, device=x_BLE.device) <= known_B[:, None]).unsqueeze(-1)
        mark = lambda rows_2C: torch.where(is_data, rows_2C[1], rows_2C[0])  # noqa: E731
        levels, mask = self.levels_and_mask(x_BLE.device)
        cond = self.conditioning(labels_B)
        class_B1C = cond.class_RC.unsqueeze(1)
        h = torch.cat((class_B1C + self.pos_start, self.word_embed(x_BLE)), dim=1).float()
        h = h + (self.lvl_embed(levels[: L + 1]) + self.pos_1LC[:, : L + 1]) + mark(self.n_d_embed.weight)
        ctx = AttentionContext(total=L + 1, mask=mask[..., : L + 1, : L + 1], scale=self.config.attention_scale)
        marks = [layer(self.n_d_embed.weight) for layer in self.layerwise_n_d_embed]
        for i, block in enumerate(self.blocks):
            h = block(h, cond.blocks[i], i, ctx, self.policy, mark(marks[i]))
        h = (h + mark(marks[-1]))[:, 1:]
        with torch.autocast(h.device.type, enabled=False):  # both heads in the weights' own precision
            return self.logits(h, cond), self.final_layer_conti(h.to(self.dtype), class_B1C.to(self.dtype)).float()

    def levels_and_mask(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Level of every position ``(1 + L,)``, and who sees whom ``(1, 1, 1 + L, 1 + L)``; no part of the state dict."""
        if self._levels_and_mask is None or self._levels_and_mask[0].device != device:
            sizes = torch.tensor([1, *(pn * pn for pn in self.config.patch_nums)])
            levels = torch.arange(len(sizes)).repeat_interleave(sizes)
            mask = (levels[:, None] > levels[None]) | torch.eye(len(levels), dtype=torch.bool)
            self._levels_and_mask = levels.to(device), mask[None, None].to(device)
        return self._levels_and_mask

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, adaln_gamma: float = 1e-3) -> None:
        """A start without a teacher: that of a VAR; ``scale_shift_table`` N(0, 1/C)."""
        super().init_weights(generator, adaln_gamma)
        self.final_layer_conti.init_weights(generator)

    @torch.no_grad()
    def init_from_teacher(self, teacher: VAR, codebook_VE: Tensor, generator: torch.Generator | None = None) -> None:
        """Everything the teacher has is copied. The class keeps row 0 of the level and position tables, the coarsest scale
        starts from the same rows; the layers that mark data and noise start at zero, ``n_d_embed`` and the new head from
        N(0, 0.02)."""
        own, given = self.state_dict(), teacher.state_dict()
        repeated = {  # one row more in front, where the class has moved to
            "lvl_embed.weight": torch.cat((given["lvl_embed.weight"][:1], given["lvl_embed.weight"])),
            "pos_1LC": torch.cat((given["pos_1LC"][:, :1], given["pos_1LC"]), dim=1),
            "pos_start": given["pos_start"][:, :1],
        }
        for name, value in (given | repeated).items():
            own[name].copy_(value)
        for layer in self.layerwise_n_d_embed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.n_d_embed.weight.normal_(0.0, 0.02, generator=generator)
        self.final_layer_conti.init_weights(generator)
