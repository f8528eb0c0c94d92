"""Transformers through torch.compile: what surrounds attention in their blocks."""

from __future__ import annotations

import torch
from torch import nn

from arsp.models import attention


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """From now on the blocks of a GPT, a VAR or a student run through torch.compile, in place; weights and state dict stay what they are.

    Attention stays outside (:func:`arsp.models.attention.attend`): caches grow, and windows and masks differ from pass to pass. What is
    left is the same for every length, so a handful of compilations at the first passes serve all layers.
    """
    attention.outside = torch.compiler.disable(attention.call)
    for block in network.layers if hasattr(network, "layers") else network.blocks:
        block.compile(backend=backend)
