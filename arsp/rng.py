"""Counter-based random numbers keyed by what is decided: (seed, sample id, absolute position, purpose).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter
``(block, position, sample id, purpose)``, key = the two halves of the seed, four 32-bit words a block.
Word w of block k is the draw for element ``x = 4 k + w``. Uniforms are ``(top 23 bits + 0.5) * 2^-23``:
exactly representable in float32 and never 0 or 1 (with 24 bits the largest one would round to 1 and its Gumbel to infinity).
Nothing is stored and nothing depends on batch size, window, number of processes or where a run was interrupted.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """Last word of the counter; a new kind of decision gets a new number, old numbers never change."""

    TOKEN = 0
    ACCEPT = 1
    RESAMPLE = 2
    INIT = 3
    TRAIN = 4
    NOISE = 5  # Gaussian noise tokens of distilled decoding
    LABEL = 6
    METRIC = 7
    SMOOTH = 8  # Gumbel noise of smoothed vectors
    DRAFT = 9  # drafts of the verify family
    COUPLE = 10  # whether a draft survives a redraw
    SIBLING = 11  # further drafts of one position


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit values held in int64 (16-bit split, so nothing overflows)."""
    lo_part = a * (b & 0xFFFF)
    hi_part = a * (b >> 16) + (lo_part >> 16)
    return hi_part >> 16, ((hi_part & 0xFFFF) << 16) | (lo_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 on broadcastable int64 tensors that hold 32-bit words; returns four tensors of 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def keyed_words(seed: int, sample_ids: Tensor, positions: Tensor, purpose: Purpose, num: int, stream: int = 0) -> Tensor:
    """``num`` 32-bit words (int64) for every broadcast pair of sample id and position: shape ``(*broadcast, num)``.

    ``stream`` (< 2^24) separates repeated decisions of one purpose at one position. Sample ids are below 2^32.
    """
    sample_ids, positions = torch.broadcast_tensors(sample_ids, positions)
    blocks = torch.arange((num + 3) // 4, dtype=torch.int64, device=sample_ids.device)
    last = torch.tensor(int(purpose) | (stream << 8), dtype=torch.int64, device=sample_ids.device)
    words = philox4x32(
        (blocks, positions.long().unsqueeze(-1), sample_ids.long().unsqueeze(-1) & _MASK, last),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :num]


def keyed_uniform(seed: int, sample_ids: Tensor, positions: Tensor, purpose: Purpose, num: int, stream: int = 0) -> Tensor:
    """float32 uniforms in (0, 1), shape ``(*broadcast, num)``."""
    words = keyed_words(seed, sample_ids, positions, purpose, num, stream)
    return ((words >> 9).float() + 0.5) * 2.0**-23


def keyed_gumbel(
    seed: int, sample_ids: Tensor, positions: Tensor, num: int, purpose: Purpose = Purpose.TOKEN, stream: int = 0
) -> Tensor:  # fmt: skip
    """Standard Gumbel noise ``-log(-log u)`` in float32, shape ``(*broadcast, num)``."""
    return -torch.log(-torch.log(keyed_uniform(seed, sample_ids, positions, purpose, num, stream)))


def keyed_normal(seed: int, sample_ids: Tensor, positions: Tensor, num: int, purpose: Purpose = Purpose.NOISE) -> Tensor:
    """Standard normals (Box-Muller, computed in float64, returned as float32), shape ``(*broadcast, num)``."""
    u = keyed_uniform(seed, sample_ids, positions, purpose, 2 * ((num + 1) // 2)).double()
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0::2])), 2.0 * torch.pi * u[..., 1::2]
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)
    return pair[..., :num].float()


def keyed_labels(seed: int, sample_ids: Tensor, num_classes: int) -> Tensor:
    """Uniform class ids for the given sample ids (int64)."""
    u = keyed_uniform(seed, sample_ids, torch.zeros((), dtype=torch.int64), Purpose.LABEL, 1)[..., 0]
    return (u * num_classes).long().clamp_(max=num_classes - 1)
