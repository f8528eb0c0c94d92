"""Moving outliers out of the inputs of a linear layer before both sides are quantised; the exact product does not change.

Scaling (SmoothQuant, arXiv 2211.10438; ViDiT-Q, arXiv 2406.02540): ``x / s`` times ``(W s)^T``. Rotation (QuaRot, arXiv 2404.00456;
:func:`arsp.kernels.reference.rotate`): ``x Q`` times ``(W Q)^T`` with ``Q = D H``, D random signs, H orthonormal Hadamard matrices along
the diagonal, each as large as the largest power of two that divides the inputs. Scaling comes first: it removes what is the same in every
token, the rotation spreads the rest. Shapes: ``K`` inputs, ``N`` outputs of a linear layer, ``T`` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arsp.errors import InputError
from arsp.rng import Purpose, keyed_words

LEAST_RANGE = 1e-5  # stands for an input channel that was always zero


class ChannelRange:
    """Largest magnitude of every input channel over calibration calls: mean over the batch, moving average over the calls."""

    def __init__(self, momentum: float = 0.95):
        self.momentum = momentum
        self.range_K: Tensor | None = None

    def update(self, x_BTK: Tensor) -> None:
        """One call. The first one, and any after nothing but zeros, counts as it is."""
        new_K = x_BTK.float().abs().amax(1).mean(0)
        if self.range_K is None or not bool(self.range_K.any()):
            self.range_K = new_K
        else:
            self.range_K = self.momentum * self.range_K + (1 - self.momentum) * new_K


def balance_scale(range_K: Tensor, weight_NK: Tensor, alpha: float) -> Tensor:
    """``s = range^alpha / (max_n |W|)^(1 - alpha)``, (K,): divide inputs and multiply weights by it. Unused weights get 1.

    For several ranges of steps that share one weight pass the element-wise maximum of their ranges.
    InputError for NaN and infinity.
    """
    weights_K = weight_NK.abs().amax(0)
    range_K = range_K.masked_fill(range_K == 0, LEAST_RANGE)
    if not bool(range_K.isfinite().all() & weights_K.isfinite().all()):
        raise InputError("channel balancing: the inputs or weights contain NaN or infinity.")
    return torch.where(weights_K == 0, torch.ones_like(weights_K), range_K**alpha / weights_K ** (1 - alpha))


def rotation_signs(num_inputs: int, seed: int) -> Tensor:
    """The diagonal of D, int8 of -1 and 1, a function of the seed alone."""
    key = torch.zeros((), dtype=torch.int64)
    return (1 - 2 * (keyed_words(seed, key, key + num_inputs, Purpose.INIT, num_inputs) >> 31)).to(torch.int8)
