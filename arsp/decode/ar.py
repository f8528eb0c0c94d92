"""Plain autoregressive sampling of any Decoder, raster or next-scale, with three ways of choosing a code.

One loop (:func:`decode_blocks`) walks the blocks of the layout; what differs is the callable ``choose``:
keyed Gumbel-argmax (default: image i depends on ``(seed, i)`` only), a ``torch.Generator`` multinomial stream as the official
samplers use it, or the flow map of distilled decoding applied to a noise token (``arsp.distill.flow.sample_through_map``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arsp.decode.filters import LogitsPipeline, check_possible
from arsp.decode.guidance import Guided, Logits, step_apart
from arsp.errors import ConfigError
from arsp.kernels import fuses_noise, keyed_argmax, reference
from arsp.protocols import Decoder, Generation, Request
from arsp.rng import Purpose, keyed_gumbel

Choose = Callable[[Logits, LogitsPipeline, Tensor], Tensor]  # (logits_BmV, pipeline, positions_m) -> codes_Bm
Callback = Callable[[int], None]  # called after every pass with the number of token positions it made

RNG_NAMES = ("keyed", "torch")


def decode_blocks(
    decoder: Decoder, request: Request, choose: Choose, pipeline: LogitsPipeline, callback: Callback | None = None, *,
    prefix_Bp: Tensor | None = None, stop: int | None = None,
) -> Generation:  # fmt: skip
    """Fill ``codes_BL`` block by block: one pass of the decoder a block, codes from ``choose(logits, pipeline, positions)``.

    Nothing is read from the device before the end. NumericalError: a law without a possible code, which ``choose`` reports as code -1.
    ``prefix_Bp``: codes already known (whole blocks). ``stop``: blocks that begin at or behind this position are left at 0.
    """
    layout, device = decoder.layout, request.sample_ids_B.device
    codes_BL = torch.zeros(request.batch_size, layout.num_tokens, dtype=torch.int64, device=device)
    known = 0 if prefix_Bp is None else prefix_Bp.shape[1]
    fed_Bn = prefix_Bp if known else None
    if known:
        codes_BL[:, :known] = prefix_Bp
    state, passes, filled = decoder.start(request), 0, 0
    places = torch.tensor([place for block in layout.blocks for place in block], device=device)
    for block, positions_m in zip(layout.blocks, places.split([len(block) for block in layout.blocks]), strict=True):
        if block[0] < known or (stop is not None and block[0] >= stop):
            continue
        logits_BmV = step_apart(decoder, state, fed_Bn)[:, -len(block) :]
        codes_Bm = choose(logits_BmV, pipeline, positions_m)
        codes_BL[:, positions_m], fed_Bn = codes_Bm, codes_Bm.clamp_min(0)
        passes, filled = passes + 1, filled + len(block)
        if callback:
            callback(len(block))
    check_possible(codes_BL >= 0)
    stats = {"passes": passes, "tokens_per_pass": filled / max(passes, 1)}
    if hasattr(state, "peak_kv_bytes"):
        stats["kv_bytes"] = state.peak_kv_bytes
    if hasattr(state, "last_kv_bytes"):
        stats["last_kv_bytes"] = state.last_kv_bytes
    return Generation(codes_BL, stats=stats)


def draw_codes(log_p_BmV: Tensor, seed: int, sample_ids_B: Tensor, positions: Tensor, purpose: Purpose = Purpose.TOKEN) -> Tensor:
    """Keyed Gumbel-argmax draws ``codes_Bm``: ``argmax_x(log p(x) + g(x))``, the smallest id on ties.

    ``g`` is a pure function of (seed, sample id, position, code), so a draw does not depend on the batch, the window or the
    number of passes. ``positions``: ``(m,)`` for all rows or ``(B, m)``. NumericalError when a row has no finite
    log-probability or holds a NaN.
    """
    num_rows, num_positions, _ = log_p_BmV.shape
    ids_Bm, positions_Bm = sample_ids_B[:, None].expand(num_rows, num_positions), positions.expand(num_rows, num_positions)
    codes_R = keyed_argmax(log_p_BmV.flatten(0, 1), seed, ids_Bm.flatten(), positions_Bm.flatten(), purpose)
    check_possible(codes_R >= 0)
    return codes_R.view(num_rows, num_positions)


def keyed_choice(request: Request) -> Choose:
    """``choose`` by keyed Gumbel-argmax with the request's seed and sample ids: one look of the kernel at the logits, as in verification.

    Noise does not depend on the logits: where no kernel makes it as it goes, small batches make it for several single positions ahead.
    """
    ahead: dict[int, Tensor] = {}

    def choose(logits_BmV: Logits, pipeline: LogitsPipeline, positions_m: Tensor) -> Tensor:
        num_rows, num_positions, num_codes = logits_BmV.shape
        if fuses_noise(logits_BmV.cond_BmV if isinstance(logits_BmV, Guided) else logits_BmV):
            positions_Bm = positions_m.expand(num_rows, -1)
            return pipeline.verify(
                logits_BmV, torch.full_like(positions_Bm, -1), request.seed, request.sample_ids_B, positions_Bm, Purpose.TOKEN
            )[1]  # fmt: skip
        log_p_BmV = pipeline(logits_BmV)
        span = reference.noise_elements(log_p_BmV) // max(1, num_rows * num_codes)
        if num_positions > 1 or span < 2:
            return draw_codes(log_p_BmV, request.seed, request.sample_ids_B, positions_m)
        position = int(positions_m)
        if position not in ahead:
            ahead.clear()
            following = torch.arange(position, position + span, device=positions_m.device)
            noise = keyed_gumbel(request.seed, request.sample_ids_B[:, None], following, num_codes)
            ahead.update({position + i: noise[:, i : i + 1] for i in range(span)})
        return reference.perturbed_argmax(log_p_BmV, ahead[position])

    return choose


def multinomial_choice(generator: torch.Generator) -> Choose:
    """``choose`` by ``torch.multinomial`` on rows flattened over batch and positions: the official samplers' stream."""

    def choose(logits_BmV: Logits, pipeline: LogitsPipeline, positions_m: Tensor) -> Tensor:
        log_p_BmV = pipeline(logits_BmV)
        check_possible(log_p_BmV.amax(dim=-1).isfinite())
        drawn = torch.multinomial(log_p_BmV.flatten(0, 1).exp(), 1, generator=generator)
        return drawn.view(log_p_BmV.shape[:2])

    return choose


def sample_ar(
    decoder: Decoder,
    request: Request,
    *,
    pipeline: LogitsPipeline,
    rng: str = "keyed",
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Generation:
    """Sample one sequence a row, one decoder pass a block.

    ``rng="keyed"``: exact law, image i depends on ``(seed, i)`` only. ``rng="torch"``: multinomial draws from ``generator``
    (default: a fresh one seeded with ``request.seed``), which depend on the batch like the official code.
    """
    choose = keyed_choice(request) if check_rng(rng) == "keyed" else multinomial_choice(generator or seeded_generator(request))
    return decode_blocks(decoder, request, choose, pipeline, callback)


class ARGenerator:
    """:func:`sample_ar` bound to a decoder. With ``rng="torch"`` one stream runs through all calls of ``generate``."""

    def __init__(
        self, decoder: Decoder, pipeline: LogitsPipeline | None = None, rng: str = "keyed", generator: torch.Generator | None = None
    ):
        self.decoder, self.pipeline, self.rng, self.generator = decoder, pipeline or LogitsPipeline(), check_rng(rng), generator
        self.capabilities = decoder.capabilities

    def generate(self, request: Request, callback: Callback | None = None) -> Generation:
        """Codes of every row of the request; ``callback(number of new positions)`` after every pass."""
        if self.rng == "torch" and self.generator is None:
            self.generator = seeded_generator(request)
        return sample_ar(
            self.decoder, request, pipeline=self.pipeline, rng=self.rng, generator=self.generator, callback=callback
        )  # fmt: skip


def seeded_generator(request: Request) -> torch.Generator:
    """A ``torch.Generator`` on the request's device, seeded with its seed."""
    return torch.Generator(device=request.sample_ids_B.device).manual_seed(request.seed)


def check_rng(rng: str) -> str:
    """``rng`` itself, or ConfigError naming the known ones."""
    if rng not in RNG_NAMES:
        raise ConfigError(f"rng: unknown random stream {rng!r}.", hint=f"use one of: {', '.join(RNG_NAMES)}")
    return rng
