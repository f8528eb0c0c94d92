"""Layouts of quantised weights for the CPU kernels: made once at load from the canonical forms, in plain torch.

Both are a stream of 64-byte pieces, one register of AVX-512: T = ceil(N / 16) tiles of 16 rows, and along K, inside a tile, piece
after piece. In a piece byte ``4 r + j`` belongs to row r of the tile, so that 4 neighbouring bytes are what one lane of an integer
dot product takes. Rows past N are zero.

- ``pack_w4_cpu``: uint8 (T, K / 8, 64). The low nibble of byte 4 r + j of piece c is code [r, 8 c + j], the high nibble [r, 8 c + 4 + j]:
  one mask, or a shift and a mask, gives the operand of a dot product.
- ``pack_w8_cpu``: uint8 (T, ceil(K / 4), 64). Byte 4 r + j of piece c is code [r, 4 c + j] + 128 (the dot product wants one unsigned
  operand; the kernel takes 128 sum(x) off again). Columns past K are 128, a code of 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arsp.errors import ConfigError

TILE = 16  # rows of a tile


def pack_w4_cpu(words_NW: Tensor) -> Tensor:
    """Canonical 4-bit words int32 (N, K / 8), code 8 w + i in bits 4 i of word w, as uint8 (T, K / 8, 64). ConfigError: another type."""
    if words_NW.dim() != 2 or words_NW.dtype != torch.int32:
        raise ConfigError(f"pack_w4_cpu: expected int32 (N, K / 8), got {words_NW.dtype} {tuple(words_NW.shape)}.")
    codes_NW8 = torch.stack([(words_NW >> shift) & 15 for shift in range(0, 32, 4)], -1).to(torch.uint8)
    return _tiles(codes_NW8[..., :4] | codes_NW8[..., 4:] << 4)


def unpack_w4_cpu(packed: Tensor, num_rows: int) -> Tensor:
    """Codes uint8 (N, K) of :func:`pack_w4_cpu`."""
    bytes_NW4 = _rows(packed, num_rows)
    return torch.cat([bytes_NW4 & 15, bytes_NW4 >> 4], -1).flatten(1)


def pack_w8_cpu(codes_NK: Tensor) -> Tensor:
    """Codes int8 (N, K) as uint8 (T, ceil(K / 4), 64). ConfigError: another type."""
    if codes_NK.dim() != 2 or codes_NK.dtype != torch.int8:
        raise ConfigError(f"pack_w8_cpu: expected int8 (N, K), got {codes_NK.dtype} {tuple(codes_NK.shape)}.")
    padded_NK = F.pad(codes_NK, (0, -codes_NK.shape[1] % 4))
    return _tiles(padded_NK.view(torch.uint8).unflatten(1, (padded_NK.shape[1] // 4, 4)) ^ 128)


def unpack_w8_cpu(packed: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Codes int8 (N, K) of :func:`pack_w8_cpu`."""
    return (_rows(packed, num_rows).flatten(1)[:, :num_columns] ^ 128).view(torch.int8)


def _tiles(bytes_NW4: Tensor) -> Tensor:
    num_rows, pieces, _ = bytes_NW4.shape
    padded = F.pad(bytes_NW4, (0, 0, 0, 0, 0, -num_rows % TILE))
    return padded.view(-1, TILE, pieces, 4).transpose(1, 2).reshape(-1, pieces, 4 * TILE)


def _rows(packed: Tensor, num_rows: int) -> Tensor:
    """The inverse of :func:`_tiles`."""
    tiles, pieces, _ = packed.shape
    return packed.view(tiles, pieces, TILE, 4).transpose(1, 2).reshape(tiles * TILE, pieces, 4)[:num_rows]
