"""Layouts of quantised weights in files: compressed-tensors ``pack-quantized`` and ``int-quantized``, and the order of QServe.

Of a linear layer P, 4 bits (word j holds elements 8 j .. 8 j + 7, the first one in its lowest four bits; a ragged end is filled with 0):

=========================  ===================================  ==================================================================
``P.weight_packed``        int32 (N, ceil(K / 8))               codes 0..15 along the inputs; symmetric codes are stored plus 8
``P.weight_zero_point``    int32 (ceil(N / 8), G)               zero points 0..15 along the outputs; absent where symmetric
``P.weight_scale``         float32 (float16, bfloat16) (N, G)   G = 1: one scale per output
``P.weight_shape``         int64 (2,)                           N and K
=========================  ===================================  ==================================================================

8 bits: ``P.weight`` int8 (N, K) and ``P.weight_scale``, symmetric. Compressed-tensors holds codes and zero points in memory 8 less than
:mod:`arsp.quant.quantiser` does; the stored words are the same. Layouts of kernels are made on load and never stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from arsp.errors import ConfigError, InputError
from arsp.quant.quantiser import CHANNEL, QuantisedWeight

NIBBLES = 8  # in an int32
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_int4(codes: Tensor) -> Tensor:
    """Whole numbers 0..15, (..., n), as int32 (..., ceil(n / 8)), lowest four bits first."""
    words = F.pad(codes.long(), (0, -codes.shape[-1] % NIBBLES)).unflatten(-1, (-1, NIBBLES))
    words = (words << _shifts(codes)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(words: Tensor, num: int) -> Tensor:
    """The first ``num`` numbers of the last dimension, uint8: the inverse of :func:`pack_int4`."""
    return ((words[..., None].long() >> _shifts(words)) & 15).flatten(-2)[..., :num].to(torch.uint8)


def _shifts(like: Tensor) -> Tensor:
    return 4 * torch.arange(NIBBLES, device=like.device)


def to_tensors(weight: QuantisedWeight, name: str) -> dict[str, Tensor]:
    """The tensors of layer ``name`` in a file. ConfigError for formats that have no layout: they exist in simulation only."""
    if weight.bits == 8 and weight.symmetric:
        return {f"{name}.weight": weight.codes_NK, f"{name}.weight_scale": _stored_scales(weight)}
    if weight.bits != 4:
        kind = "symmetric" if weight.symmetric else "asymmetric"
        raise ConfigError(f"{name}: {weight.bits} bits {kind} cannot be packed.", hint="Use 4 bits, or 8 bits symmetric.")
    tensors = {
        f"{name}.weight_packed": pack_int4(weight.codes_NK.int() + 8 if weight.symmetric else weight.codes_NK),
        f"{name}.weight_scale": _stored_scales(weight),
        f"{name}.weight_shape": torch.tensor(weight.codes_NK.shape),
    }
    if weight.zeros_NG is not None:
        tensors[f"{name}.weight_zero_point"] = pack_int4(weight.zeros_NG.T).T.contiguous()
    return tensors


def _stored_scales(weight: QuantisedWeight) -> Tensor:
    """In 16 bits where nothing is lost."""
    half_NG = weight.scales_NG.half()
    return half_NG if torch.equal(half_NG.float(), weight.scales_NG) else weight.scales_NG


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> QuantisedWeight:
    """Layer ``name`` of a file, exactly as it was packed. InputError for what is missing or does not fit together."""

    def take(part: str) -> Tensor:
        if f"{name}.{part}" not in tensors:
            raise InputError(f"{name}: the quantised file has no {name}.{part}.")
        return tensors[f"{name}.{part}"]

    def expect(part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        tensor = take(part)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(f"{name}.{part}: {got}, expected {' or '.join(map(str, dtypes))} {shape}.")
        return tensor

    is_packed = f"{name}.weight_packed" in tensors
    shape = expect("weight_shape", (2,), torch.int64).tolist() if is_packed else take("weight").shape
    num_rows, num_inputs = shape
    num_groups = take("weight_scale").shape[-1]
    scales_NG = expect("weight_scale", (num_rows, num_groups), *SCALE_DTYPES).float()
    if num_groups == 0 or num_inputs % num_groups or not bool(scales_NG.isfinite().all()):
        raise InputError(f"{name}.weight_scale: {num_groups} scales for {num_inputs} inputs do not fit, or they are not finite.")
    group_size = CHANNEL if num_groups == 1 else num_inputs // num_groups
    if not is_packed:
        return QuantisedWeight(expect("weight", (num_rows, num_inputs), torch.int8), scales_NG, None, 8, group_size)
    codes_NK = unpack_int4(expect("weight_packed", (num_rows, -(-num_inputs // NIBBLES)), torch.int32), num_inputs)
    if f"{name}.weight_zero_point" not in tensors:
        return QuantisedWeight((codes_NK.to(torch.int8) - 8), scales_NG, None, 4, group_size)
    words = expect("weight_zero_point", (-(-num_rows // NIBBLES), num_groups), torch.int32)
    return QuantisedWeight(codes_NK, scales_NG, unpack_int4(words.T, num_rows).T.contiguous(), 4, group_size)


def packed_bytes(num_rows: int, num_inputs: int, bits: int, group_size: int, scale_bytes: int = 4) -> int:
    """Bytes of the tensors of a layer: 4 bits asymmetric, 8 bits symmetric; ``group_size`` divides the inputs or is CHANNEL."""
    num_groups = 1 if group_size == CHANNEL else num_inputs // group_size
    scales = num_rows * num_groups * scale_bytes
    if bits == 8:
        return num_rows * num_inputs + scales
    if bits != 4:
        raise ConfigError(f"{bits} bits cannot be packed.", hint="Use 4 or 8 bits.")
    words = num_rows * -(-num_inputs // NIBBLES) + -(-num_rows // NIBBLES) * num_groups
    return 4 * words + scales + 16


def pack_qserve(codes_NK: Tensor) -> Tensor:
    """Codes 0..15 in the order of QServe's W4A8 kernels (arXiv 2405.04532), int8 (N, K / 2); N and K are multiples of 32.

    A tile of 32 x 32 codes is 512 bytes, one load of 16 bytes a lane in the order that ``mma.m16n8k32`` takes; low four bits: rows 0..15
    of the tile, high four bits: rows 16..31.
    """
    num_rows, num_inputs = codes_NK.shape
    if num_rows % 32 or num_inputs % 32:
        raise InputError(f"QServe's layout takes multiples of 32 outputs and inputs, not {num_rows} x {num_inputs}.")
    # rows: tile, half (which four bits), 16 -> 2 x 8; inputs: tile, half, quad, byte
    tiles = codes_NK.int().reshape(num_rows // 32, 2, 2, 8, num_inputs // 32, 2, 4, 4)
    low, high = tiles.permute(1, 0, 4, 3, 6, 5, 2, 7)
    return (low | high << 4).to(torch.uint8).view(torch.int8).reshape(num_rows, num_inputs // 2)


def qserve_group_order(values_NG: Tensor) -> Tensor:
    """Second-level scales or zero points as QServe stores them, (G, N): inside every 32 rows, row r comes at ``4 (r % 8) + r // 8``."""
    num_rows, num_groups = values_NG.shape
    return values_NG.T.reshape(num_groups, num_rows // 32, 4, 8).transpose(2, 3).reshape(num_groups, num_rows)
