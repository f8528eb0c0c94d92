"""Schemas of the ops, their shape rules for tracing (``torch.library.opcheck`` holds), and the torch implementation.

The compiled library adds a faster implementation under the dispatch key CPU when ``arsp.kernels.build`` loads it; without it
``torch.ops.arsp.*`` runs the reference. No op has a gradient: the functions of ``arsp.kernels`` leave training to torch.
"""

from __future__ import annotations

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


small_linear = torch.ops.arsp.small_linear.default
