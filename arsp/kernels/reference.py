"""The readable definition of every op, in plain torch: what a kernel must compute, and what runs where there is no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arsp.kernels.layouts import unpack_w4_cpu, unpack_w8_cpu
from arsp.rng import keyed_uniform

MIN_TEMPERATURE = 1e-5  # what a positive temperature is raised to before logits are divided by it
ONE_HOT, UNIFORM, PRIOR = -1, -2, -3  # laws of a draft that need no storage, see draw_residual
RESIDUAL_FLOOR = 1e-12  # a residual with less mass is rounding: draw from p itself
GELU_SHIFT = 0.17  # GELU is never below -0.17, but for rounding: what gelu_quantize adds before it quantises
NOISE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}  # Gumbel noise made at once: larger leaves the cache, smaller pays per call


def small_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``y = x weight^T``, shape (M, N), dtype of ``x``. Operands of two dtypes are multiplied in float32."""
    if x_MK.dtype == weight_NK.dtype:
        return F.linear(x_MK, weight_NK)
    return F.linear(x_MK.float(), weight_NK.float()).to(x_MK.dtype)


def rms_norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in float32, cast back, then times the weight in the model's precision."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight_K


def apply_rope(x_BnHD: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs (2j, 2j+1) in float32; ``table``, cos and sin, is ``(n, D/2, 2)`` or ``(B, n, D/2, 2)``."""
    pairs = x_BnHD.float().unflatten(-1, (-1, 2))
    cos, sin = table.unsqueeze(-3).unbind(-1)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x_BnHD)


def cached_attention(
    q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, k_cache: Tensor, v_cache: Tensor, start: int,
    mask: Tensor | None = None, scale: float | None = None, starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Store k and v at slots ``start ..`` of the first B rows of the caches, then ``softmax(scale q k^T) v`` over all slots up to the last
    new one where ``mask`` is True; without a mask a query sees the slots up to its own. ``starts`` (B): a start for every row."""
    B, n = len(q_BHnD), q_BHnD.shape[2]
    if starts is None:
        total = start + n
        k_cache[:B, :, start:total], v_cache[:B, :, start:total] = k_BHnD, v_BHnD
        if mask is None and n > 1:
            mask = torch.ones(n, total, dtype=torch.bool, device=q_BHnD.device).tril(start)
    else:
        row_B1, slots_Bn = torch.arange(B, device=starts.device)[:, None], starts[:, None] + torch.arange(n, device=starts.device)
        for cache, new_BHnD in ((k_cache, k_BHnD), (v_cache, v_BHnD)):
            cache[row_B1, :, slots_Bn] = new_BHnD.transpose(1, 2)
        total = int(slots_Bn.max()) + 1 if slots_Bn.numel() else 0
        mask = causal_mask(slots_Bn, total)
    return F.scaled_dot_product_attention(q_BHnD, k_cache[:B, :, :total], v_cache[:B, :, :total], attn_mask=mask, scale=scale)


def causal_mask(slots_Bn: Tensor, total: int) -> Tensor:
    """Boolean ``(B, 1, n, total)``: queries at these slots see the slots up to their own."""
    return (torch.arange(total, device=slots_Bn.device) <= slots_Bn[..., None])[:, None]


def windowed_scale_attention(
    q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int
) -> Tensor:
    """``softmax(q k^T) v`` over the keys that ``windows_Hs`` keeps; rows b and B + b of ``v`` use the map of row b."""
    mask_HnT = window_mask(windows_Hs, sides, scale_index)
    logits_BHnT = (q_BHnD @ k_BHTD.mT).masked_fill(~mask_HnT, float("-inf"))
    weights_BHnT = logits_BHnT.softmax(-1)
    return weights_BHnT.repeat(v_GHTD.shape[0] // q_BHnD.shape[0], 1, 1, 1) @ v_GHTD


def window_mask(windows_Hs: Tensor, sides: Sequence[int], scale_index: int) -> Tensor:
    """Boolean (H, n, T), True = kept. Windows: -1 everything, 0 nothing, r >= 1 the keys of map u with |row - cy| <= r and
    |column - cx| <= r, where query (y, x) has its centre at cy = (y + 0.5) pn_u / pn_s - 0.5, cx alike."""
    blocks = []
    for u, side in enumerate(sides[: scale_index + 1]):
        distance_nu = _distance(sides[scale_index], side, windows_Hs.device)
        radius_H11 = windows_Hs[:, u, None, None]
        # distances are in units of 1 / (2 pn_s) key cells
        blocks.append((radius_H11 < 0) | ((radius_H11 > 0) & (distance_nu <= 2 * sides[scale_index] * radius_H11)))
    return torch.cat(blocks, -1)


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """Chebyshev distance (n, n_u) of keys to the centres of queries, times 2 ``queries``: whole numbers, so ties are exact."""
    y_n1, row_1u = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    along = (2 * queries * row_1u - ((2 * y_n1 + 1) * keys - queries)).abs()
    both = torch.maximum(along[:, None, :, None], along[None, :, None, :])  # (y, x, row, column)
    return both.reshape(queries**2, keys**2)


def keyed_argmax(log_w_RV: Tensor, seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0) -> Tensor:
    """``argmax_x(log w[x] + g(x))`` with ``g = -log(-log u)``, ``u`` of :func:`arsp.rng.keyed_uniform`; some rows at a time."""
    num_rows, num_codes = log_w_RV.shape
    chunk = max(1, noise_elements(log_w_RV) // num_codes)
    codes_R = ids_R.new_empty(num_rows)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        uniform_rV = keyed_uniform(seed, ids_R[rows], positions_R[rows], purpose, num_codes, stream)
        codes_R[rows] = perturbed_argmax(log_w_RV[rows], -torch.log(-torch.log(uniform_rV)))
    return codes_R


def perturbed_argmax(log_w: Tensor, noise: Tensor) -> Tensor:
    """``argmax(log w + noise)`` over the last dimension, the first of equal maxima; -1 where the maximum is not finite."""
    best = (log_w + noise).max(dim=-1)
    return torch.where(best.values.isfinite(), best.indices, -1)


def noise_elements(like: Tensor) -> int:
    """How much noise to make at once on the device of a tensor."""
    return NOISE_ELEMENTS.get(like.device.type, NOISE_ELEMENTS["cuda"])


def guide(cond: Tensor, uncond: Tensor, scale: float, ramp: bool = False, guided: Tensor | None = None) -> Tensor:
    """Float32 logits of classifier-free guidance, every operation rounded: ``u + scale (c - u)``, or with ``ramp``
    ``(1 + scale) c - scale u``. ``guided``: bool, broadcast against the logits; c itself where it is False."""
    cond, uncond = cond.float(), uncond.float()
    both = (1 + scale) * cond - scale * uncond if ramp else uncond + scale * (cond - uncond)
    return both if guided is None else torch.where(guided, both, cond)


def verify(
    logits_RV: Tensor, drafts_R: Tensor, temperature: float, top_k: int, top_p: float,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
    uncond_RV: Tensor | None = None, scale: float = 1.0, ramp: bool = False, guided_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(codes, log_p, lse, threshold, last)`` of every row; :func:`arsp.kernels.verify` has the definitions."""
    if uncond_RV is not None:
        logits_RV = guide(logits_RV, uncond_RV, scale, ramp, None if guided_R is None else guided_R[:, None])
    scaled_RV = logits_RV.float() / (max(temperature, MIN_TEMPERATURE) if temperature else 1.0)
    best = scaled_RV.max(dim=-1, keepdim=True)  # the first of equal maxima
    if temperature == 0:
        lse_R1, threshold_R1, last_R1 = best.values, best.values, best.indices
    else:
        threshold_R1, last_R1 = _cut(scaled_RV, top_k, top_p)
    ids_V = torch.arange(scaled_RV.shape[-1], device=scaled_RV.device)
    kept_RV = (scaled_RV > threshold_R1) | ((scaled_RV == threshold_R1) & (ids_V <= last_R1))
    if temperature != 0:
        lse_R1 = scaled_RV.masked_fill(~kept_RV, -torch.inf).double().logsumexp(-1, keepdim=True).float()
    log_p_RV = (scaled_RV - lse_R1).masked_fill(~kept_RV, -torch.inf)
    codes_R = last_R1.squeeze(-1) if temperature == 0 else keyed_argmax(log_p_RV, seed, ids_R, positions_R, purpose, stream)
    log_p_R = log_p_RV.gather(-1, drafts_R.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    valid_R = best.values.squeeze(-1).isfinite()
    return (
        torch.where(valid_R, codes_R, -1),
        torch.where(valid_R, log_p_R, torch.nan).masked_fill(drafts_R < 0, 0.0),
        torch.where(valid_R, lse_R1.squeeze(-1), torch.nan),
        torch.where(valid_R, threshold_R1.squeeze(-1), torch.nan),
        torch.where(valid_R, last_R1.squeeze(-1), -1),
    )


def _cut(scaled_RV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Threshold and last id (R, 1) of what top-k and then top-p keep. Masses are summed in float64."""
    num_codes = scaled_RV.shape[-1]
    threshold_R1 = scaled_RV.new_full((len(scaled_RV), 1), -torch.inf)
    last_R1 = torch.full_like(threshold_R1, num_codes - 1, dtype=torch.int64)
    if 0 < top_k < num_codes:
        threshold_R1 = scaled_RV.topk(top_k, dim=-1).values[:, -1:]
    if top_p >= 1:
        return threshold_R1, last_R1
    kept_RV = scaled_RV.masked_fill(scaled_RV < threshold_R1, -torch.inf)
    ordered = kept_RV.sort(dim=-1, descending=True, stable=True)  # smaller ids first among equals
    mass_RV = ordered.values.double().softmax(-1).cumsum(-1)
    place_R1 = (mass_RV[:, :-1] <= top_p).sum(-1, keepdim=True).clamp(max=num_codes - 1)
    cut_R1 = ordered.values.gather(-1, place_R1)
    next_R1 = ordered.values.gather(-1, (place_R1 + 1).clamp(max=num_codes - 1))
    tie_R1 = (next_R1 == cut_R1) & (place_R1 < num_codes - 1)  # equal logits on both sides of the cut
    within_R1 = cut_R1 > -torch.inf  # otherwise top-p removes nothing
    last_R1 = torch.where(tie_R1 & within_R1, ordered.indices.gather(-1, place_R1), last_R1)
    return torch.where(within_R1, cut_R1, threshold_R1), last_R1


def leading(stands_Bm: Tensor) -> Tensor:
    """How many places come before the first that does not stand, int64 ``(B,)``."""
    return stands_Bm.to(torch.int64).cumprod(1).sum(1)


def accept_scan(
    drafts_Bm: Tensor, drawn_Bm: Tensor, known_B: Tensor, ratio_Bm: Tensor | None = None, uniform_Bm: Tensor | None = None
) -> Tensor:
    """:func:`leading` of the drafts that equal the code drawn, or whose uniform is below the ratio; the first ``known_B`` always stand."""
    stands_Bm = drafts_Bm == drawn_Bm if ratio_Bm is None or uniform_Bm is None else uniform_Bm < ratio_Bm
    return leading(stands_Bm | (torch.arange(drafts_Bm.shape[1], device=drafts_Bm.device) < known_B[:, None]))


def draw_residual(
    p: Sequence[Tensor | None], p_how: Sequence[float], rows_R: Tensor, q: Sequence[Tensor | None], q_how: Sequence[float],
    sources_R: Tensor, drafts_R: Tensor, prior: Tensor | None, places_R: Tensor | None,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
) -> Tensor:  # fmt: skip
    """:func:`keyed_argmax` of ``log max(0, p - q)``, of ``log p`` where that has no mass; :func:`arsp.kernels.draw_residual` has the
    definitions."""
    codes_R, wanted = torch.zeros_like(rows_R), (rows_R >= 0).nonzero().squeeze(1)
    num_codes = p[0].shape[1]
    for at in wanted.split(max(1, noise_elements(p[0]) // num_codes)):
        p_rV, source_r1 = log_law(p, p_how, rows_R[at]).exp(), sources_R[at, None]
        q_rV = torch.zeros_like(p_rV).scatter_(1, drafts_R[at, None], 1.0)
        q_rV = torch.where(source_r1 == UNIFORM, 1.0 / num_codes, q_rV)
        if prior is not None and places_R is not None:
            q_rV = torch.where(source_r1 == PRIOR, prior[places_R[at]], q_rV)
        if q:
            q_rV = torch.where(source_r1 >= 0, log_law(q, q_how, sources_R[at].clamp_min(0)).exp(), q_rV)
        rest_rV = (p_rV - q_rV).clamp_min(0)
        empty_r1 = rest_rV.sum(-1, keepdim=True, dtype=torch.float64) < RESIDUAL_FLOOR
        codes_R[at] = keyed_argmax(torch.where(empty_r1, p_rV, rest_rV).log(), seed, ids_R[at], positions_R[at], purpose, stream)
    return codes_R


def log_law(law: Sequence[Tensor | None], how: Sequence[float], rows_r: Tensor) -> Tensor:
    """Log-probabilities (r, V) of some rows of laws: (logits, uncond, guided, lse, threshold, last) and (scale, ramp, temperature)."""
    logits, uncond, guided, lse, threshold, last = (None if x is None else x[rows_r] for x in law)
    scale, ramp, temperature = how
    if uncond is not None:
        logits = guide(logits, uncond, scale, bool(ramp), None if guided is None else guided[:, None])
    scaled, threshold = logits.float() / temperature, threshold[:, None]
    ids = torch.arange(scaled.shape[1], device=scaled.device)
    kept = (scaled > threshold) | ((scaled == threshold) & (ids <= last[:, None]))
    return (scaled - lse[:, None]).masked_fill(~kept, -torch.inf)


def quantize_per_token(
    x: Tensor, smooth_K: Tensor | None = None, signs_K: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(xq int8, sx float32)``: sx = absmax / 127, or as given; xq = x / sx to the nearest, ties to even, within +-127. A row of zeros (or
    whose sx is 0 in float32) has sx = 1; one that is not finite has codes 0 and sx NaN or infinite, so that products with it are NaN."""
    x = _balanced(x.float(), smooth_K, signs_K)
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    if scale is None:
        sx = absmax / torch.full_like(absmax, 127)  # CUDA multiplies by the reciprocal of a number
    else:
        sx = scale.reshape(-1).expand(absmax.numel()).view(absmax.shape).where(absmax.isfinite(), torch.nan)
    sx = torch.where(sx == 0, 1.0, sx)
    return _codes(x, sx, -127, 127), sx


def rms_norm_quantize(
    x: Tensor, weight_K: Tensor, eps: float, smooth_K: Tensor | None = None, signs_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``x / sqrt(mean(x^2) + eps) weight``, float32 throughout."""
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_K.float()
    return quantize_per_token(normed, smooth_K, signs_K)


def modulate_quantize(
    x_RnK: Tensor, scale_R1K: Tensor, shift_R1K: Tensor, eps: float, smooth_K: Tensor | None = None, signs_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``LayerNorm(x) (1 + scale) + shift``, float32 throughout."""
    normed_RnK = F.layer_norm(x_RnK.float(), x_RnK.shape[-1:], eps=eps)
    return quantize_per_token(normed_RnK * (1 + scale_R1K.float()) + shift_R1K.float(), smooth_K, signs_K)


def swiglu_quantize(a: Tensor, b: Tensor, smooth_K: Tensor | None = None, signs_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of ``silu(a) b``, float32 throughout."""
    return quantize_per_token(F.silu(a.float()) * b.float(), smooth_K, signs_K)


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(xq int8, sx float32, offset float32)`` of y = GELU(x) in its tanh form: ``y ~ xq sx + offset``, sx = (max y + 0.17) / 255,
    xq = round((y + 0.17) / sx) - 128, offset = 128 sx - 0.17. A row of nothing but least values has sx = 1, one that is not finite codes 0
    and sx NaN."""
    y = F.gelu(x.float(), approximate="tanh") + GELU_SHIFT
    most = y.amax(-1).clamp(min=0) if y.shape[-1] else y.new_zeros(y.shape[:-1])
    sx = most / torch.full_like(most, 255)
    sx = torch.where(sx == 0, 1.0, sx).where(y.isfinite().all(-1), torch.nan)
    return _codes(y, sx, 0, 255, 128), sx, 128 * sx - GELU_SHIFT


def _balanced(x: Tensor, smooth_K: Tensor | None, signs_K: Tensor | None) -> Tensor:
    """``x smooth``, then rotated (:func:`rotate`); either may be left out."""
    x = x if smooth_K is None else x * smooth_K
    return x if signs_K is None or not x.numel() else rotate(x, signs_K)


def _codes(x: Tensor, sx: Tensor, first: int, last: int, less: int = 0) -> Tensor:
    codes = (x / sx[..., None]).round().clamp(first, last) - less
    return codes.where(sx[..., None].isfinite(), 0).to(torch.int8)


def w8a8_linear(
    xq: Tensor, sx: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`integer_linear` with one group, no zero point and the weight of ``pack_w8_cpu``."""
    codes_NK = unpack_w8_cpu(weight, len(scale_N), xq.shape[-1])
    return integer_linear(xq, sx, codes_NK, scale_N[:, None], None, bias_N, dtype, offset, rowsum_N, gelu, gain, residual)


def w4a8_linear(
    xq: Tensor, sx: Tensor, weight: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`integer_linear` with the weight of ``pack_w4_cpu``."""
    codes_NK = unpack_w4_cpu(weight, len(scales_NG))
    return integer_linear(xq, sx, codes_NK, scales_NG, zeros_NG, bias_N, dtype, offset, rowsum_N, gelu, gain, residual)


def w8a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scale_N: Tensor, up: Tensor, up_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """``silu(a) b`` of two products of :func:`w8a8_linear`, float32 until ``dtype``."""
    a, b = (w8a8_linear(xq, sx, *weight, None, torch.float32) for weight in ((gate, gate_scale_N), (up, up_scale_N)))
    return (F.silu(a) * b).to(dtype)


def w4a8_swiglu(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scales_NG: Tensor, gate_zeros_NG: Tensor,
    up: Tensor, up_scales_NG: Tensor, up_zeros_NG: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``silu(a) b`` of two products of :func:`w4a8_linear`, float32 until ``dtype``."""
    weights = ((gate, gate_scales_NG, gate_zeros_NG), (up, up_scales_NG, up_zeros_NG))
    a, b = (w4a8_linear(xq, sx, *weight, None, torch.float32) for weight in weights)
    return (F.silu(a) * b).to(dtype)


def integer_linear(
    xq: Tensor, sx: Tensor, codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``y = sx sum_g scale_g (sum_{k in g} code_k xq_k - zero_g sum_{k in g} xq_k) + bias + offset rowsum``, G groups of K / G columns;
    then ``residual + gain gelu(y)`` of what is given.

    What stands in brackets is a whole number of 32 bits and exact. Outside, every operation rounds to float32: the groups are added one
    after another, then comes sx, then the bias, then the product of offset and rowsum, then GELU (tanh form), then the gain, then the
    residual, then ``dtype``. Kernels give these very numbers, those behind a GELU but for its own rounding.
    """
    size = xq.shape[-1] // scales_NG.shape[1]
    total = torch.zeros(*xq.shape[:-1], len(codes_NK), device=xq.device)
    for g in range(scales_NG.shape[1]):
        # float64 holds the whole numbers exactly and has a fast product
        part, codes_Nk = (tensor[..., g * size : (g + 1) * size].double() for tensor in (xq, codes_NK))
        inner = part @ codes_Nk.T
        if zeros_NG is not None:
            inner -= part.sum(-1, keepdim=True) * zeros_NG[:, g].double()
        total += inner.float() * scales_NG[:, g]
    y = total * sx[..., None]
    y = y if bias_N is None else y + bias_N.float()
    y = y if offset is None or rowsum_N is None else y + offset[..., None] * rowsum_N
    y = F.gelu(y, approximate="tanh") if gelu else y
    y = y if gain is None else y * gain.float()
    return (y if residual is None else y + residual.float()).to(dtype)


class FlowStep(NamedTuple):
    """A point of the grid of :func:`flow_map` and the way to the next one, all functions of t alone."""

    t: float
    inner: float  # log w = log p + inner <x, c> - square |c|^2
    square: float
    ratio: float = 0.0  # t' / t, t' the next point
    slope: float = 0.0  # 2m: weight of the difference to the mean before
    width: float = 0.0  # t' - t
    middle: float = 0.0  # midpoint: the t half way, and what is above for it
    middle_ratio: float = 0.0
    middle_inner: float = 0.0
    middle_square: float = 0.0


def flow_grid(solver: str, steps: int, t_end: float) -> list[FlowStep]:
    """``steps`` steps uniform in t from 1 to ``t_end``."""
    grid = [1 + (t_end - 1) * i / steps for i in range(steps + 1)]
    points = []
    for i, (t, after) in enumerate(zip(grid, grid[1:], strict=False)):
        slope, middle = multistep_weight(grid, i) if solver == "2m" else 0.0, (t + after) / 2
        points.append(FlowStep(t, *_evidence(t), after / t, slope, after - t, middle, middle / t, *_evidence(middle)))
    return [*points, FlowStep(t_end, *_evidence(t_end))]


def _evidence(t: float) -> tuple[float, float]:
    return (1 - t) / (t * t), (1 - t) ** 2 / (2 * t * t)


def multistep_weight(grid: list[float], i: int) -> float:
    """1/(2r) with r = h'/h, the ratio of the last two steps in lambda = log((1-t)/t); 0 while one of them starts at t = 1."""
    if i < 2:
        return 0.0
    before, now, after = (math.log((1 - t) / t) for t in grid[i - 1 : i + 2])
    return (after - now) / (2 * (now - before))


def flow_map(
    logp_NU: Tensor, noise_NE: Tensor, vectors_UE: Tensor, stop_at_N: Tensor, solver: str, steps: int, t_end: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(group int64, stop_t, weight, evaluations, state)`` of every row: the flow of arXiv 2412.17153 from its noise towards the vectors,
    until the largest posterior weight reaches ``stop_at`` or the grid ends. Solvers: euler, 2m, midpoint."""

    def posterior(x_NE: Tensor, inner: float, square: float) -> tuple[Tensor, Tensor]:
        log_w_NU = logp_NU + inner * (x_NE @ vectors_UE.T) - square * vectors_UE.square().sum(1)
        w_NU = log_w_NU.softmax(1)
        return w_NU, w_NU @ vectors_UE

    num = len(logp_NU)
    group_N, live_N = torch.zeros(num, dtype=torch.int64, device=logp_NU.device), torch.ones(num, dtype=torch.bool, device=logp_NU.device)
    stop_t_N, weight_N, evaluations_N = (torch.zeros(num, device=logp_NU.device) for _ in range(3))
    x_NE, state_NE, previous_NE = noise_NE, noise_NE.clone(), None
    for i, step in enumerate(flow_grid(solver, steps, t_end)):
        w_NU, mean_NE = posterior(x_NE, step.inner, step.square)
        best_N, code_N = w_NU.max(1)
        evaluations_N += live_N
        new_N = live_N & ((best_N >= stop_at_N) | (i == steps))
        group_N, stop_t_N = torch.where(new_N, code_N, group_N), stop_t_N.masked_fill(new_N, step.t)
        weight_N, state_NE = torch.where(new_N, best_N, weight_N), torch.where(new_N[:, None], x_NE, state_NE)
        live_N = live_N & ~new_N
        if i == steps or not live_N.any():
            break
        if solver == "midpoint":
            middle_NE = mean_NE + step.middle_ratio * (x_NE - mean_NE)
            x_NE = x_NE + step.width * (middle_NE - posterior(middle_NE, step.middle_inner, step.middle_square)[1]) / step.middle
            evaluations_N += live_N
        else:
            target_NE = mean_NE if previous_NE is None else mean_NE + step.slope * (mean_NE - previous_NE)
            x_NE, previous_NE = target_NE + step.ratio * (x_NE - target_NE), mean_NE
    return group_N, stop_t_N, weight_N, evaluations_N, state_NE


def rotation_block(num_inputs: int) -> int:
    """The largest power of two that divides the inputs."""
    return num_inputs & -num_inputs


def hadamard(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform (Sylvester's order) of every ``block`` entries of the last dimension; its own inverse."""
    shape, width = x.shape, 1
    while width < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        width *= 2
    return x.reshape(shape) * block**-0.5


def rotate(x: Tensor, signs_K: Tensor) -> Tensor:
    """``x Q`` along the last dimension, in the dtype of ``x``."""
    return hadamard(x * signs_K.to(x.dtype), rotation_block(x.shape[-1]))
