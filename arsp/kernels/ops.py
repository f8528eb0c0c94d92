"""Schemas of the ops, their shape rules for tracing (``torch.library.opcheck`` holds), and the torch implementation.

The compiled library adds a faster implementation under the dispatch key CPU when ``arsp.kernels.build`` loads it; without it
``torch.ops.arsp.*`` runs the reference. No op has a gradient: the functions of ``arsp.kernels`` leave training to torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arsp.kernels import reference

torch.library.define("arsp::small_linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("arsp::small_linear", "CompositeExplicitAutograd", reference.small_linear)


@torch.library.register_fake("arsp::small_linear")
def _(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    torch._check(x_MK.dim() == 2 and weight_NK.dim() == 2, lambda: "small_linear: expected x (M, K) and weight (N, K)")
    torch._check(x_MK.shape[1] == weight_NK.shape[1], lambda: f"small_linear: x has {x_MK.shape[1]} columns, weight {weight_NK.shape[1]}")
    return x_MK.new_empty((x_MK.shape[0], weight_NK.shape[0]))


torch.library.define("arsp::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.impl("arsp::rms_norm", "CompositeExplicitAutograd", reference.rms_norm)


@torch.library.register_fake("arsp::rms_norm")
def _(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    torch._check(x.shape[-1:] == weight_K.shape, lambda: "rms_norm: expected x (..., K) and weight (K)")
    return x.new_empty(x.shape)


torch.library.define("arsp::apply_rope", "(Tensor x, Tensor table) -> Tensor")
torch.library.impl("arsp::apply_rope", "CompositeExplicitAutograd", reference.apply_rope)


@torch.library.register_fake("arsp::apply_rope")
def _(x_BnHD: Tensor, table: Tensor) -> Tensor:
    torch._check(x_BnHD.dim() == 4, lambda: "apply_rope: expected x (B, n, H, D)")
    return x_BnHD.new_empty(x_BnHD.shape)


torch.library.define(
    "arsp::cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, int start, Tensor? mask=None, float? scale=None, "
    "Tensor? starts=None) -> Tensor",
)
torch.library.impl("arsp::cached_attention", "CompositeExplicitAutograd", reference.cached_attention)


@torch.library.register_fake("arsp::cached_attention")
def _(
    q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, k_cache: Tensor, v_cache: Tensor, start: int,
    mask: Tensor | None = None, scale: float | None = None, starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    torch._check(q_BHnD.dim() == 4 and v_BHnD.dim() == 4, lambda: "cached_attention: expected tensors (B, H, n, D)")
    B, H, n, _ = q_BHnD.shape
    return q_BHnD.new_empty((B, n, H, v_BHnD.shape[3])).transpose(1, 2)


torch.library.define(
    "arsp::windowed_scale_attention", "(Tensor q, Tensor k, Tensor v, Tensor windows, int[] sides, int scale_index) -> Tensor"
)
torch.library.impl("arsp::windowed_scale_attention", "CompositeExplicitAutograd", reference.windowed_scale_attention)


@torch.library.register_fake("arsp::windowed_scale_attention")
def _(q_BHnD: Tensor, k_BHTD: Tensor, v_GHTD: Tensor, windows_Hs: Tensor, sides: Sequence[int], scale_index: int) -> Tensor:
    torch._check(q_BHnD.dim() == 4 and v_GHTD.dim() == 4, lambda: "windowed_scale_attention: expected q (B, H, n, D), v (G B, H, T, Dv)")
    return q_BHnD.new_empty((v_GHTD.shape[0], *q_BHnD.shape[1:3], v_GHTD.shape[3]))


torch.library.define("arsp::keyed_argmax", "(Tensor log_w, int seed, Tensor ids, Tensor positions, int purpose, int stream=0) -> Tensor")
torch.library.impl("arsp::keyed_argmax", "CompositeExplicitAutograd", reference.keyed_argmax)


@torch.library.register_fake("arsp::keyed_argmax")
def _(log_w_RV: Tensor, seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0) -> Tensor:
    torch._check(log_w_RV.dim() == 2, lambda: "keyed_argmax: expected log_w (R, V)")
    return ids_R.new_empty(log_w_RV.shape[0])


torch.library.define(
    "arsp::verify",
    "(Tensor logits, Tensor drafts, float temperature, int top_k, float top_p, int seed, Tensor ids, Tensor positions, int purpose, "
    "int stream=0, Tensor? uncond=None, float scale=1, bool ramp=False, Tensor? guided=None) -> "
    "(Tensor codes, Tensor log_p, Tensor lse, Tensor threshold, Tensor last)",
)
torch.library.impl("arsp::verify", "CompositeExplicitAutograd", reference.verify)


@torch.library.register_fake("arsp::verify")
def _(
    logits_RV: Tensor, drafts_R: Tensor, temperature: float, top_k: int, top_p: float,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
    uncond_RV: Tensor | None = None, scale: float = 1.0, ramp: bool = False, guided_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    torch._check(logits_RV.dim() == 2, lambda: "verify: expected logits (R, V)")
    torch._check(uncond_RV is None or uncond_RV.shape == logits_RV.shape, lambda: "verify: the halves differ in shape")
    codes_R, last_R = (drafts_R.new_empty(logits_RV.shape[0]) for _ in range(2))
    log_p_R, lse_R, threshold_R = (logits_RV.new_empty(logits_RV.shape[0], dtype=torch.float32) for _ in range(3))
    return codes_R, log_p_R, lse_R, threshold_R, last_R


torch.library.define("arsp::accept_scan", "(Tensor drafts, Tensor drawn, Tensor known, Tensor? ratio=None, Tensor? uniform=None) -> Tensor")
torch.library.impl("arsp::accept_scan", "CompositeExplicitAutograd", reference.accept_scan)


@torch.library.register_fake("arsp::accept_scan")
def _(drafts_Bm: Tensor, drawn_Bm: Tensor, known_B: Tensor, ratio_Bm: Tensor | None = None, uniform_Bm: Tensor | None = None) -> Tensor:
    torch._check(drafts_Bm.dim() == 2, lambda: "accept_scan: expected drafts (B, m)")
    return drafts_Bm.new_empty(drafts_Bm.shape[0])


torch.library.define(
    "arsp::draw_residual",
    "(Tensor?[] p, float[] p_how, Tensor rows, Tensor?[] q, float[] q_how, Tensor sources, Tensor drafts, Tensor? prior, Tensor? places, "
    "int seed, Tensor ids, Tensor positions, int purpose, int stream=0) -> Tensor",
)
torch.library.impl("arsp::draw_residual", "CompositeExplicitAutograd", reference.draw_residual)


@torch.library.register_fake("arsp::draw_residual")
def _(
    p: Sequence[Tensor | None], p_how: Sequence[float], rows_R: Tensor, q: Sequence[Tensor | None], q_how: Sequence[float],
    sources_R: Tensor, drafts_R: Tensor, prior: Tensor | None, places_R: Tensor | None,
    seed: int, ids_R: Tensor, positions_R: Tensor, purpose: int, stream: int = 0,
) -> Tensor:  # fmt: skip
    return rows_R.new_empty(rows_R.shape)


_BALANCE = "Tensor? smooth=None, Tensor? signs=None"
_QUANTISED = "(Tensor xq, Tensor sx)"


def _quantised_like(x: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() >= 1, lambda: "expected rows (..., K), got a number")
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


torch.library.define("arsp::quantize_per_token", f"(Tensor x, {_BALANCE}, Tensor? scale=None) -> {_QUANTISED}")
torch.library.impl("arsp::quantize_per_token", "CompositeExplicitAutograd", reference.quantize_per_token)


@torch.library.register_fake("arsp::quantize_per_token")
def _(x: Tensor, smooth: Tensor | None = None, signs: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _quantised_like(x)


torch.library.define("arsp::rms_norm_quantize", f"(Tensor x, Tensor weight, float eps, {_BALANCE}) -> {_QUANTISED}")
torch.library.impl("arsp::rms_norm_quantize", "CompositeExplicitAutograd", reference.rms_norm_quantize)


@torch.library.register_fake("arsp::rms_norm_quantize")
def _(x: Tensor, weight_K: Tensor, eps: float, smooth: Tensor | None = None, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _quantised_like(x)


torch.library.define("arsp::modulate_quantize", f"(Tensor x, Tensor scale, Tensor shift, float eps, {_BALANCE}) -> {_QUANTISED}")
torch.library.impl("arsp::modulate_quantize", "CompositeExplicitAutograd", reference.modulate_quantize)


@torch.library.register_fake("arsp::modulate_quantize")
def _(
    x_RnK: Tensor, scale_R1K: Tensor, shift_R1K: Tensor, eps: float, smooth: Tensor | None = None, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(x_RnK.dim() == 3, lambda: "modulate_quantize: expected x (R, n, K)")
    return _quantised_like(x_RnK)


torch.library.define("arsp::swiglu_quantize", f"(Tensor a, Tensor b, {_BALANCE}) -> {_QUANTISED}")
torch.library.impl("arsp::swiglu_quantize", "CompositeExplicitAutograd", reference.swiglu_quantize)


@torch.library.register_fake("arsp::swiglu_quantize")
def _(a: Tensor, b: Tensor, smooth: Tensor | None = None, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    torch._check(a.shape == b.shape, lambda: "swiglu_quantize: expected a and b of one shape")
    return _quantised_like(a)


torch.library.define("arsp::gelu_quantize", "(Tensor x) -> (Tensor xq, Tensor sx, Tensor offset)")
torch.library.impl("arsp::gelu_quantize", "CompositeExplicitAutograd", reference.gelu_quantize)


@torch.library.register_fake("arsp::gelu_quantize")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    xq, sx = _quantised_like(x)
    return xq, sx, torch.empty_like(sx)


_RESULT = (
    "Tensor? bias, ScalarType dtype, Tensor? offset=None, Tensor? rowsum=None, bool gelu=False, Tensor? gain=None, "
    "Tensor? residual=None) -> Tensor"
)

torch.library.define("arsp::w8a8_linear", f"(Tensor xq, Tensor sx, Tensor weight, Tensor scale, {_RESULT}")
torch.library.impl("arsp::w8a8_linear", "CompositeExplicitAutograd", reference.w8a8_linear)


@torch.library.register_fake("arsp::w8a8_linear")
def _(
    xq: Tensor, sx: Tensor, weight: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    torch._check(xq.dim() >= 1 and scale_N.dim() == 1, lambda: "w8a8_linear: expected xq (..., K) and scale (N)")
    return xq.new_empty((*xq.shape[:-1], scale_N.shape[0]), dtype=dtype)


torch.library.define("arsp::w4a8_linear", f"(Tensor xq, Tensor sx, Tensor weight, Tensor scales, Tensor zeros, {_RESULT}")
torch.library.impl("arsp::w4a8_linear", "CompositeExplicitAutograd", reference.w4a8_linear)


@torch.library.register_fake("arsp::w4a8_linear")
def _(
    xq: Tensor, sx: Tensor, weight: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype,
    offset: Tensor | None = None, rowsum_N: Tensor | None = None, gelu: bool = False, gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    torch._check(xq.dim() >= 1 and scales_NG.dim() == 2, lambda: "w4a8_linear: expected xq (..., K) and scales (N, G)")
    return xq.new_empty((*xq.shape[:-1], scales_NG.shape[0]), dtype=dtype)


torch.library.define(
    "arsp::w8a8_swiglu", "(Tensor xq, Tensor sx, Tensor gate, Tensor gate_scale, Tensor up, Tensor up_scale, ScalarType dtype) -> Tensor"
)
torch.library.impl("arsp::w8a8_swiglu", "CompositeExplicitAutograd", reference.w8a8_swiglu)


@torch.library.register_fake("arsp::w8a8_swiglu")
def _(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scale_N: Tensor, up: Tensor, up_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    torch._check(xq.dim() >= 1 and gate_scale_N.dim() == 1, lambda: "w8a8_swiglu: expected xq (..., K) and scales (N)")
    return xq.new_empty((*xq.shape[:-1], gate_scale_N.shape[0]), dtype=dtype)


torch.library.define(
    "arsp::w4a8_swiglu",
    "(Tensor xq, Tensor sx, Tensor gate, Tensor gate_scales, Tensor gate_zeros, Tensor up, Tensor up_scales, Tensor up_zeros, "
    "ScalarType dtype) -> Tensor",
)
torch.library.impl("arsp::w4a8_swiglu", "CompositeExplicitAutograd", reference.w4a8_swiglu)


@torch.library.register_fake("arsp::w4a8_swiglu")
def _(
    xq: Tensor, sx: Tensor, gate: Tensor, gate_scales_NG: Tensor, gate_zeros_NG: Tensor,
    up: Tensor, up_scales_NG: Tensor, up_zeros_NG: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    torch._check(xq.dim() >= 1 and gate_scales_NG.dim() == 2, lambda: "w4a8_swiglu: expected xq (..., K) and scales (N, G)")
    return xq.new_empty((*xq.shape[:-1], gate_scales_NG.shape[0]), dtype=dtype)


torch.library.define(
    "arsp::flow_map",
    "(Tensor logp, Tensor noise, Tensor vectors, Tensor stop_at, str solver, int steps, float t_end) -> "
    "(Tensor group, Tensor stop_t, Tensor weight, Tensor evaluations, Tensor state)",
)
torch.library.impl("arsp::flow_map", "CompositeExplicitAutograd", reference.flow_map)


@torch.library.register_fake("arsp::flow_map")
def _(
    logp_NU: Tensor, noise_NE: Tensor, vectors_UE: Tensor, stop_at_N: Tensor, solver: str, steps: int, t_end: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(logp_NU.dim() == 2 and vectors_UE.dim() == 2, lambda: "flow_map: expected logp (N, U) and vectors (U, E)")
    rest = (logp_NU.new_empty(len(logp_NU)) for _ in range(3))
    return logp_NU.new_empty(len(logp_NU), dtype=torch.int64), *rest, torch.empty_like(noise_NE)


small_linear = torch.ops.arsp.small_linear.default
rms_norm = torch.ops.arsp.rms_norm.default
apply_rope = torch.ops.arsp.apply_rope.default
cached_attention = torch.ops.arsp.cached_attention.default
windowed_scale_attention = torch.ops.arsp.windowed_scale_attention.default
keyed_argmax = torch.ops.arsp.keyed_argmax.default
verify = torch.ops.arsp.verify.default
accept_scan = torch.ops.arsp.accept_scan.default
draw_residual = torch.ops.arsp.draw_residual.default
quantize_per_token = torch.ops.arsp.quantize_per_token.default
rms_norm_quantize = torch.ops.arsp.rms_norm_quantize.default
modulate_quantize = torch.ops.arsp.modulate_quantize.default
swiglu_quantize = torch.ops.arsp.swiglu_quantize.default
gelu_quantize = torch.ops.arsp.gelu_quantize.default
w8a8_linear = torch.ops.arsp.w8a8_linear.default
w4a8_linear = torch.ops.arsp.w4a8_linear.default
w8a8_swiglu = torch.ops.arsp.w8a8_swiglu.default
w4a8_swiglu = torch.ops.arsp.w4a8_swiglu.default
flow_map = torch.ops.arsp.flow_map.default
