"""Decoding codes to pixels cheaply: the convolutions in another precision or memory layout, compiled, and few images at a time.

What precedes the convolutions (codebook vectors, and a next-scale tokenizer's sum over scales) stays float32 whatever is chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from arsp.errors import ConfigError
from arsp.kernels.build import require_compiler

DTYPES = ("float32", "bfloat16", "float16")
PIXELS_AT_ONCE = 1 << 19  # 8 images of 256 px: the released decoders hold about 0.2 GB of float32 activations for each of them


class PixelDecoder:
    """Decodes for a tokenizer, in its place: ``decode_codes``, ``decode_embeddings`` and ``decode_map`` as
    :class:`arsp.protocols.Tokenizer` has them, float32 pixels about [-1, 1]."""

    def __init__(self, tokenizer: nn.Module, convolve: Callable[[Tensor], Tensor], dtype: torch.dtype, channels_last: bool, chunk: int):
        self.tokenizer, self.chunk = tokenizer, chunk
        self._convolve, self._dtype = convolve, dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def codebook_VE(self) -> Tensor:
        return self.tokenizer.codebook_VE

    def decode_codes(self, codes_BL: Tensor) -> Tensor:
        """``codes_BL`` (of a next-scale tokenizer: any whole number of leading scales) -> pixels ``(B, 3, H, W)``."""
        return self.decode_embeddings(self.tokenizer.codebook_VE[codes_BL.long()])

    def decode_embeddings(self, embeddings_BLE: Tensor) -> Tensor:
        """Vectors in the order of the codes -> pixels; no quantisation in between."""
        return self.decode_map(self.tokenizer.to_map(embeddings_BLE))

    def decode_map(self, map_BEhw: Tensor) -> Tensor:
        """The decoder's input ``(B, E, h, w)`` -> pixels, ``chunk`` images at a time."""
        return torch.cat([self._decode(part) for part in map_BEhw.split(self.chunk)])

    def _decode(self, map_BEhw: Tensor) -> Tensor:
        pixels = self._convolve(map_BEhw.to(self._dtype).contiguous(memory_format=self._layout))
        return pixels.to(torch.float32, memory_format=torch.contiguous_format)


def prepare_decoder(
    tokenizer: nn.Module, *, dtype: str = "float32", channels_last: bool | None = None, compile: bool = False, chunk: int | None = None
) -> PixelDecoder:
    """A :class:`PixelDecoder` of a tokenizer of either family.

    ``dtype``: float32, bfloat16 or float16 of the convolutions. ``channels_last``: their memory layout (default: on the CPU, and in 16
    bits anywhere); in float32 it is that of the tokenizer's own weights from then on (the same numbers up to rounding), another
    precision is a copy. ``compile``: through ``torch.compile`` at the first image of each batch size. ``chunk``: images at a time
    (default: as many as have half a million pixels). ConfigError: a precision without convolutions, or a chunk below 1. ResourceError:
    torch.compile does not work here.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"decoder precision {dtype}: expected float32, bfloat16 or float16.")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"decoder chunk {chunk}: expected one image or more.")
    dtype = getattr(torch, dtype)
    network = nn.Sequential(tokenizer.post_quant_conv, tokenizer.decoder)
    if channels_last is None:
        channels_last = dtype != torch.float32 or next(network.parameters()).is_cpu
    if any(parameter.dtype != dtype for parameter in network.parameters()):
        network = copy.deepcopy(network).to(dtype)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    image_size = tokenizer.config.image_size
    if compile:
        require_compiler(next(network.parameters()).device, "decoder_compile")
    convolve = torch.compile(network, dynamic=False) if compile else network
    return PixelDecoder(tokenizer, convolve, dtype, channels_last, chunk or max(1, PIXELS_AT_ONCE // image_size**2))
