"""ZipAR (arXiv 2412.04062): rows of the image in parallel. Row i + 1 starts once row i has ``window`` codes, then every active row adds one
code a pass. A code then sees less of the row above than a raster model was trained with: another law, fewer passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arsp.decode.ar import draw_codes
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import Statistics
from arsp.protocols import Decoder, Generation, Nodes, Request


class ZipARGenerator:
    """``window``: codes that a row must have before the next one starts; the width of the image gives the plain sampler, code for code.

    note: the first code of a row follows the last one of the row above; where that one is missing, the newest one there stands in for it,
    and the real one is fed when it is known.
    """

    exactness = "lossy"

    def __init__(self, decoder: Decoder, pipeline: LogitsPipeline, window: int):
        self.decoder, self.pipeline, self.window = decoder, pipeline, window
        self.capabilities, self.statistics = decoder.capabilities, Statistics()

    @torch.inference_mode()
    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        """Codes of every row of the request; ``callback(codes made)`` after every pass."""
        height, width = self.decoder.layout.grid
        device = request.sample_ids_B.device
        codes_BL = request.sample_ids_B.new_zeros(request.batch_size, height * width)
        state, written = self.decoder.start(request), torch.zeros(height * width, dtype=torch.bool, device=device)
        made, late = [0] * height, []  # codes of each image row; last codes of rows whose stand-in is in the cache
        while made[-1] < width:
            rows = [i for i in range(height) if made[i] < width and (i == 0 or made[i - 1] >= min(self.window, width))]
            positions = [i * width + made[i] for i in rows]
            if positions == [0]:
                logits = self.decoder.step(state, None)
            else:
                logits = self._pass(state, codes_BL, written, rows, positions, made, late)
            at = torch.tensor(positions, device=device)
            codes_BL[:, at] = draw_codes(self.pipeline(logits), request.seed, request.sample_ids_B, at)
            for i in rows:
                made[i] += 1
            late = [i * width + width - 1 for i in rows if made[i] == width and i + 1 < height and made[i + 1] > 0]
            self.statistics.count(request.batch_size, len(rows))
            if callback:
                callback(len(rows))
        self.statistics.images += request.batch_size
        passes = state.passes if hasattr(state, "passes") else None
        return Generation(codes_BL, stats={"passes": passes, "tokens_per_pass": height * width / passes} if passes else {})

    def _pass(
        self, state: object, codes_BL: Tensor, written: Tensor, rows: list[int], positions: list[int], made: list[int], late: list[int]
    ) -> Tensor:
        """Logits ``(B, rows, V)`` of the next code of each active row."""
        width, device = self.decoder.layout.grid[1], codes_BL.device
        slots = torch.tensor([*(p - 1 for p in positions), *late], device=device)
        newest = [p - 1 if made[i] else (i - 1) * width + made[i - 1] - 1 for i, p in zip(rows, positions, strict=True)]
        fed = codes_BL[:, torch.tensor([*newest, *late], device=device)]
        written[slots] = True
        total = int(slots.max()) + 1
        sees = written[:total] & (torch.arange(total, device=device) <= slots[:, None])
        batch = len(codes_BL)
        where = slots.expand(batch, -1)
        return self.decoder.step(state, fed, Nodes(where, where, sees.expand(batch, -1, -1)))[:, : len(rows)]
