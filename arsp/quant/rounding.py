"""Rounding weights by what they do to the outputs: GPTQ (arXiv 2210.17323) and the channel scales of AWQ (arXiv 2306.00978).

Both read two moments of a layer's inputs, so calibration keeps no rows. Shapes: ``K`` inputs, ``N`` outputs, ``G`` groups of ``g``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arsp.errors import InputError, NumericalError
from arsp.quant.quantiser import Grid, QuantisedWeight, dequantise, grouped, quantise_weight, weight_grid

BLOCK = 128  # columns whose losses are passed on at once
AWQ_POINTS = 20  # exponents 0, 0.05, ... 0.95


class InputMoments:
    """Sums over the rows that enter a linear layer: ``X^T X`` in float64, and magnitudes of the channels."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu"):
        self.num_rows = 0
        self.gram_KK = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self._sum_K = torch.zeros(num_inputs, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Rows of shape (..., K). NumericalError for NaN and infinity."""
        x_MK = x.flatten(0, -2).float()
        if not bool(x_MK.isfinite().all()):
            raise NumericalError("calibration: the input of a layer contains NaN or infinity.")
        self.gram_KK += (x_MK.T @ x_MK).double()
        self._sum_K += x_MK.abs().sum(0, dtype=torch.float64)
        self.num_rows += x_MK.shape[0]

    @property
    def mean_abs_K(self) -> Tensor:
        """Mean magnitude of every channel. InputError before the first row."""
        if self.num_rows == 0:
            raise InputError("calibration: no rows were seen.", hint="Give at least one calibration sample.")
        return self._sum_K / self.num_rows


def gptq(
    weight_NK: Tensor,
    gram_KK: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool | None = None,
    search: str = "min_max",
    damp: float = 0.01,
    act_order: bool = False,
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> QuantisedWeight:
    """Round column after column; what a column loses, the columns after it make up for.

    ``H = X^T X + damp mean(diag) I``, ``U`` the upper Cholesky factor of its inverse. The scale of a group is that of the weights as they
    are when its first column is reached; with ``act_order`` (columns of large inputs first) groups are met in pieces and all scales are
    those of the given weights. Channels without input get weight 0. ``symmetric``, ``search``, ``scale_dtype`` and errors as in
    :func:`arsp.quant.quantiser.quantise_weight`; NumericalError when H is not positive definite.
    """
    symmetric = bits == 8 if symmetric is None else symmetric
    w_NGg = grouped(weight_NK, bits, group_size, name)
    num_rows, num_groups, size = w_NGg.shape
    hessian_KK = gram_KK.double().clone()
    dead_K = hessian_KK.diagonal() == 0
    hessian_KK.diagonal()[dead_K] = 1
    w_NGg = w_NGg.masked_fill(dead_K.view(num_groups, size), 0)
    given = weight_grid(w_NGg, 2, bits, symmetric, search, scale_dtype=scale_dtype)
    scales_NG, zeros_NG = (part[..., 0].double() for part in (given.scale, given.zero))

    columns = list(range(len(dead_K)))
    if act_order:
        columns = hessian_KK.diagonal().argsort(descending=True, stable=True).tolist()
    upper_KK = _inverse_factor(hessian_KK[columns][:, columns], damp, name)
    w_NK = w_NGg.flatten(1).double()[:, columns]  # from here on, index i stands for input columns[i]
    codes_NK = torch.empty_like(w_NK)
    for start in range(0, len(columns), BLOCK):
        block = slice(start, min(start + BLOCK, len(columns)))
        losses_NK = torch.zeros_like(w_NK[:, block])
        for i in range(block.start, block.stop):
            group = columns[i] // size
            if not act_order and i % size == 0:  # BLOCK is a multiple of the size of groups: the group knows of all columns before it
                grid = weight_grid(w_NK[:, None, i : i + size].float(), 2, bits, symmetric, search, scale_dtype=scale_dtype)
                scales_NG[:, group], zeros_NG[:, group] = grid.scale[:, 0, 0].double(), grid.zero[:, 0, 0].double()
            grid = Grid(scales_NG[:, group], zeros_NG[:, group], given.first, given.last)
            codes_N = codes_NK[:, columns[i]] = grid.encode(w_NK[:, i])
            loss_N = losses_NK[:, i - start] = (w_NK[:, i] - grid.decode(codes_N)) / upper_KK[i, i]
            w_NK[:, i : block.stop] -= loss_N[:, None] * upper_KK[i, i : block.stop]
        w_NK[:, block.stop :] -= losses_NK @ upper_KK[block, block.stop :]
    grid = Grid(scales_NG[..., None], zeros_NG[..., None], given.first, given.last)
    return QuantisedWeight.of(codes_NK.unflatten(1, (num_groups, size)), grid, bits)


def _inverse_factor(hessian_KK: Tensor, damp: float, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix."""
    damped_KK = hessian_KK + damp * hessian_KK.diagonal().mean() * torch.eye(len(hessian_KK), dtype=torch.float64, device=hessian_KK.device)
    lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if int(failed):
        raise NumericalError(f"{name}: the inputs' second moments are not positive definite.", hint="Give more samples, or a larger damp.")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True)


def awq(
    weight_NK: Tensor,
    moments: InputMoments,
    bits: int,
    group_size: int,
    *,
    symmetric: bool | None = None,
    clip: bool = True,
    name: str = "weight",
) -> tuple[Tensor, QuantisedWeight]:
    """The scale ``s`` (K,) that inputs are divided by, and the quantised ``W s``.

    ``s = (mean |x|)^a``, normalised by ``sqrt(max s min s)``, with the exponent of 0, 0.05, ... 0.95 of the least error of the outputs.
    ``clip``: the ranges of groups are then searched by their error of the outputs. Errors as in
    :func:`arsp.quant.quantiser.quantise_weight`; InputError without calibration rows.
    """
    size_K, weight_NK = moments.mean_abs_K, weight_NK.float()
    size_K = size_K.clamp(min=1e-4 * float(size_K.max()) or 1.0).float()  # a silent channel is not scaled away
    gram_KK = moments.gram_KK.float()

    def error(s_K: Tensor) -> float:
        rounded = quantise_weight(weight_NK * s_K, bits, group_size, symmetric=symmetric, name=name)
        d_NK = dequantise(rounded) / s_K - weight_NK
        return float(((d_NK @ gram_KK) * d_NK).sum(dtype=torch.float64))

    powers = (size_K ** (point / AWQ_POINTS) for point in range(AWQ_POINTS))
    s_K = min((s_K / (s_K.max() * s_K.min()).sqrt() for s_K in powers), key=error)
    clipping = {"search": "mse", "gram_KK": gram_KK / torch.outer(s_K, s_K)} if clip else {}
    return s_K, quantise_weight(weight_NK * s_K, bits, group_size, symmetric=symmetric, name=name, **clipping)
