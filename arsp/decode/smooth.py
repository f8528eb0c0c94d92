"""Gumbel-smoothed vectors instead of codes: VAR's ``more_smooth`` (arXiv 2404.02905, demo of the release). Nicer pictures, another law:
never for metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arsp.decode.ar import draw_codes
from arsp.decode.filters import LogitsPipeline
from arsp.decode.next_scale import NextScaleDecoder
from arsp.protocols import Generation, Request
from arsp.rng import Purpose, keyed_gumbel


def smooth_vectors(logits_BmV: Tensor, gumbel_BmV: Tensor, ratio: float, codebook_VE: Tensor) -> Tensor:
    """``softmax((logits (1 + ratio) + g) / tau) E`` with ``tau = max(0.27 (1 - 0.95 ratio), 0.005)``; ``ratio`` = k / (K - 1)."""
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return torch.softmax((logits_BmV * (1 + ratio) + gumbel_BmV) / tau, dim=-1) @ codebook_VE


class SmoothGenerator:
    """The sampler of a next-scale teacher with smoothed vectors; the codes are drawn too, as upstream, and only reported."""

    def __init__(self, decoder: NextScaleDecoder, pipeline: LogitsPipeline):
        self.decoder, self.pipeline, self.capabilities = decoder, pipeline, decoder.capabilities

    @torch.inference_mode()
    def generate(self, request: Request, callback: Callable[[int], None] | None = None) -> Generation:
        decoder = self.decoder
        book, device = decoder.quantizer.embedding.weight.float(), request.sample_ids_B.device
        state, codes, vectors, all_codes, all_vectors = decoder.start(request), None, None, [], []
        for k, block in enumerate(decoder.layout.blocks):
            logits = self.pipeline.masked_logits(decoder.step(state, codes, vectors))
            positions = torch.tensor(block, device=device)
            codes = draw_codes(torch.log_softmax(logits, dim=-1), request.seed, request.sample_ids_B, positions)
            noise = keyed_gumbel(request.seed, request.sample_ids_B[:, None], positions, logits.shape[-1], Purpose.SMOOTH)
            vectors = smooth_vectors(logits, noise, k / (len(decoder.layout.blocks) - 1), book)
            all_codes.append(codes)
            all_vectors.append(vectors)
            if callback:
                callback(len(block))
        stats = {"passes": state.passes, "tokens_per_pass": decoder.layout.num_tokens / state.passes, "kv_bytes": state.peak_kv_bytes}
        return Generation(torch.cat(all_codes, dim=1), torch.cat(all_vectors, dim=1), stats)
