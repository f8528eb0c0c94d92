"""Networks through torch.compile: what surrounds attention in the blocks of a transformer, and a whole decoder of images."""

from __future__ import annotations

import torch
from torch import nn

from arsp.errors import ResourceError
from arsp.models import attention


def require_compiler(device: torch.device | str, option: str) -> None:
    """ResourceError where torch.compile does not work, that is without a C++ compiler or, for CUDA, without Triton. ``option``: what asks
    for it."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"{option}: torch.compile does not work here: {reason}", "Drop it, or install a C++ compiler.") from error


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """From now on the blocks of a GPT, a VAR or a student run through torch.compile, in place; weights and state dict stay what they are.

    Attention stays outside (:func:`arsp.models.attention.attend`): caches grow, and windows and masks differ from pass to pass. What is
    left is the same for every length, so a handful of compilations at the first passes serve all layers.
    """
    attention.outside = torch.compiler.disable(attention.call)
    for block in network.layers if hasattr(network, "layers") else network.blocks:
        block.compile(backend=backend)
