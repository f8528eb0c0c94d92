"""The readable definition of every op, in plain torch: what a kernel must compute, and what runs where there is no kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def small_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``y = x weight^T``, shape (M, N), dtype of ``x``. Operands of two dtypes are multiplied in float32."""
    if x_MK.dtype == weight_NK.dtype:
        return F.linear(x_MK, weight_NK)
    return F.linear(x_MK.float(), weight_NK.float()).to(x_MK.dtype)
