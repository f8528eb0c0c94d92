"""The LlamaGen VQ autoencoder (VQ-16 and VQ-8, arXiv 2406.06525): pixels <-> a grid of code ids.

Attribute names equal the official state-dict keys of github.com/FoundationVision/LlamaGen, so checkpoints load with
``strict=True``. The encoder's level ``i`` is ``conv_blocks.i`` from high to low resolution, the decoder's ``conv_blocks.0`` is
the LOWEST resolution. Codebook rows are l2-normalised at lookup: the stored ones are not unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.errors import InputError
from arsp.tokenizers.blocks import Downsample, ResBlock, Upsample, norm


@dataclass(frozen=True)
class VQConfig:
    """Sizes of the autoencoder; the defaults are the released VQ-16."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    image_size: int = 256  # pixels; decides only the default latent grid

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)


VARIANTS = {"VQ-16": VQConfig(), "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4))}


class VQModel(nn.Module):
    """Encoder, quantiser, decoder. Implements :class:`arsp.protocols.Tokenizer`."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.codebook_embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.downsample
        return side, side

    @property
    def codebook_VE(self) -> Tensor:
        return F.normalize(self.quantize.embedding.weight, dim=-1, eps=1e-12)

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Encoder output after ``quant_conv``, before normalisation: ``(B, E, h, w)``."""
        return self.quant_conv(self.encoder(pixels_B3HW))

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> ``codes_BL`` int64, raster order."""
        factor = self.config.downsample
        if pixels_B3HW.ndim != 4 or pixels_B3HW.shape[1] != 3 or any(side % factor for side in pixels_B3HW.shape[2:]):
            raise InputError(f"encode: expected (B, 3, H, W) with sides divisible by {factor}, got {tuple(pixels_B3HW.shape)}.")
        return self.quantize.nearest(self.latents(pixels_B3HW)).flatten(1)

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """``codes_BL`` -> pixels about [-1, 1], not clamped. ``grid`` defaults to the square of L cells."""
        return self.decode_embeddings(self.codebook_VE[codes_BL.long()], grid)

    def decode_embeddings(self, embeddings_BLE: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latent vectors ``(B, L, E)`` in raster order -> pixels; no quantisation in between (arXiv 2412.17153 decodes so)."""
        return self.decode_map(self.to_map(embeddings_BLE, grid))

    def to_map(self, embeddings_BLE: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's input: the vectors on their grid, ``(B, E, h, w)``."""
        B, L, E = embeddings_BLE.shape
        h, w = grid or _square(L)
        return embeddings_BLE.transpose(1, 2).reshape(B, E, h, w)

    def decode_map(self, latents_BEhw: Tensor) -> Tensor:
        """``(B, E, h, w)`` -> pixels ``(B, 3, H, W)``."""
        return self.decoder(self.post_quant_conv(latents_BEhw))


class Quantizer(nn.Module):
    """Nearest neighbour on the unit sphere (Yu et al., arXiv 2110.04627, l2-normalised codes)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("codebook_used", torch.zeros(65536))  # usage queue of the official trainer; no effect here
        self.embedding = nn.Embedding(size, width)

    def nearest(self, z_BEhw: Tensor) -> Tensor:
        """Code ids ``(B, h, w)`` of the nearest normalised rows (smallest id on exact ties)."""
        z = F.normalize(z_BEhw.movedim(1, -1), dim=-1, eps=1e-12)
        e = F.normalize(self.embedding.weight, dim=-1, eps=1e-12)
        distance = (z * z).sum(-1, keepdim=True) + (e * e).sum(-1) - 2 * z @ e.T
        return distance.argmin(-1)

    def forward(self, z_BEhw: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantised map with straight-through gradient, codebook loss, ``beta`` x commitment loss, ids ``(B, h, w)``."""
        codes = self.nearest(z_BEhw)
        z = F.normalize(z_BEhw, dim=1, eps=1e-12)
        q = F.normalize(self.embedding(codes), dim=-1, eps=1e-12).movedim(-1, 1)
        vq_loss, commit_loss = F.mse_loss(q, z.detach()), beta * F.mse_loss(z, q.detach())
        return z + (q - z).detach(), vq_loss, commit_loss, codes


class Encoder(nn.Module):
    def __init__(self, cfg: VQConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        c = cfg.ch
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.conv_blocks.append(Level(c, width, cfg.num_res_blocks, attention=last, down=not last))
            c = width
        self.mid = _middle(c)
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, cfg: VQConfig):
        super().__init__()
        widths = [cfg.ch * m for m in reversed(cfg.ch_mult)]
        c = widths[0]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = _middle(c)
        self.conv_blocks = nn.ModuleList()
        for j, width in enumerate(widths):
            last = j == len(widths) - 1
            self.conv_blocks.append(Level(c, width, cfg.num_res_blocks + 1, attention=j == 0, up=not last))
            c = width
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then the change of resolution."""

    def __init__(self, cin: int, cout: int, num: int, *, attention: bool, down: bool = False, up: bool = False):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(cin if i == 0 else cout, cout) for i in range(num))
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(num if attention else 0))
        if down:
            self.downsample = Downsample(cout)
        if up:
            self.upsample = Upsample(cout)

    def forward(self, h: Tensor) -> Tensor:
        for i, res in enumerate(self.res):
            h = res(h)
            if i < len(self.attn):
                h = self.attn[i](h)
        if hasattr(self, "downsample"):
            h = self.downsample(h)
        return self.upsample(h) if hasattr(self, "upsample") else h


class AttnBlock(nn.Module):
    """Single-head attention over the h*w cells."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


def _middle(c: int) -> nn.ModuleList:
    return nn.ModuleList((ResBlock(c, c), AttnBlock(c), ResBlock(c, c)))


def _square(num: int) -> tuple[int, int]:
    side = round(num**0.5)
    if side * side != num:
        raise InputError(f"{num} tokens do not fill a square latent grid; pass the grid.")
    return side, side
