"""Enumerable decoders beyond plain tables: a guided one, and one of low order for sequences too long to enumerate."""

from __future__ import annotations

import torch
from torch import Tensor

from arsp.decode.guidance import Guidance
from arsp.protocols import Capabilities, Layout
from arsp.testing.tabular import TabularDecoder, random_tables


class GuidedDecoder(TabularDecoder):
    """Two sets of tables, combined at every step by the guidance of raster models; its joint is that of the guided law."""

    def __init__(self, conditional: TabularDecoder, unconditional: TabularDecoder, guidance: Guidance):
        self.halves, self.guidance = (conditional, unconditional), guidance
        tables = [
            guidance.combine(c.log()[None], u.log()[None], torch.tensor([i]))[0].softmax(-1)
            for i, (c, u) in enumerate(zip(conditional.tables, unconditional.tables, strict=True))
        ]
        super().__init__(tables, conditional.codebook_VE, conditional.layout.grid)

    def _law_after(self, codes_BT: Tensor, lengths_B: Tensor) -> Tensor:
        cond, uncond = (half._law_after(codes_BT, lengths_B)[:, None] for half in self.halves)
        return self.guidance.combine(cond, uncond, lengths_B[:, None]).squeeze(1)


class MarkovDecoder(TabularDecoder):
    """``p(x_j | x_(j-k), .., x_(j-1))`` from one table of k + 1 dimensions, index V before the start; any length."""

    def __init__(self, table: Tensor, length: int):
        self.vocab_size, self.layout = table.shape[-1], Layout.raster(1, length)
        self.capabilities = Capabilities(order="raster", rewind=True)
        self.log_table, self.tables = table.log(), [table] * length

    def _law_after(self, codes_BT: Tensor, lengths_B: Tensor) -> Tensor:
        def code(back: int) -> Tensor:
            place = (lengths_B - back)[:, None]
            return torch.where(place >= 0, codes_BT.gather(1, place.clamp(0, codes_BT.shape[1] - 1)), self.vocab_size).squeeze(1)

        return self.log_table[tuple(code(back) for back in range(self.log_table.ndim - 1, 0, -1))]


def table_decoder(vocab_size: int = 3, grid: tuple[int, int] = (2, 3), seed: int = 21, scale: float = 1.3) -> TabularDecoder:
    """Random tables, dependent enough that biases show: 729 sequences by default, long enough for windows to be filled anew."""
    return TabularDecoder(random_tables(vocab_size, grid[0] * grid[1], seed, scale), grid=grid)


def guided_decoder(vocab_size: int = 3, grid: tuple[int, int] = (2, 3), scale: float = 2.5, interval: int = -1) -> GuidedDecoder:
    return GuidedDecoder(table_decoder(vocab_size, grid, 22, 0.8), table_decoder(vocab_size, grid, 23, 0.8), Guidance(scale, interval))
