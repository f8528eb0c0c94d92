"""Pixels: between the tokenizers' range [-1, 1] and uint8 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_uint8(pixels_B3HW: Tensor) -> Tensor:
    """Pixels about [-1, 1] -> uint8 NCHW by the official rule ``clamp(127.5 x + 128, 0, 255)`` with truncation."""
    return (127.5 * pixels_B3HW.float() + 128.0).clamp(0, 255).to(torch.uint8)


def to_pixels(images_u8_B3HW: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images_u8_B3HW.float() / 127.5 - 1.0


def resize_for_evaluation(pixels_B3HW: Tensor, size: int) -> Tensor:
    """Bicubic without antialiasing on the UNCLAMPED decoder output: the official 384 -> 256 protocol."""
    return F.interpolate(pixels_B3HW.float(), size=(size, size), mode="bicubic", align_corners=False)
