"""The multi-scale VQVAE of VAR (arXiv 2404.02905, algorithms 1 and 2): pixels <-> one map of code ids per scale.

Attribute names equal the official state-dict keys of github.com/FoundationVision/VAR, so ``vae_ch160v4096z32.pth`` loads with
``strict=True``. Every scale quantises what the coarser ones left over: its vectors are enlarged to the final grid (bicubic),
smoothed by a convolution ``phi`` and added to the running map ``f_hat``; the last sum is decoded. The levels of the decoder are
numbered like the encoder's, by resolution, so they run backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arsp.errors import ConfigError, InputError
from arsp.tokenizers.blocks import Downsample, ResBlock, Upsample, norm

PATCH_NUMS = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}  # official sides by image size


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of the autoencoder; the defaults are the released tokenizer at 256 px.

    ``share_quant_resi``: number of phi convolutions (0: one a scale). ``quant_resi``: share of the convolved map in phi's output.
    """

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    vocab_size: int = 4096
    patch_nums: tuple[int, ...] = PATCH_NUMS[256]
    share_quant_resi: int = 4
    quant_resi: float = 0.5
    quant_conv_ks: int = 3
    using_znorm: bool = False

    def __post_init__(self) -> None:
        check_patch_nums(self.patch_nums)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        return self.patch_nums[-1] * self.downsample


def check_patch_nums(patch_nums: tuple[int, ...]) -> None:
    """ConfigError unless the sides are positive and rising."""
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(a >= b for a, b in zip(patch_nums, patch_nums[1:], strict=False)):
        raise ConfigError(f"patch_nums {list(patch_nums)}: expected two or more rising sides, e.g. [1, 2, 3, 4].")


VARIANTS = {"VAR-VQVAE": VQVAEConfig()}


class VQVAE(nn.Module):
    """Encoder, multi-scale residual quantiser, decoder. Implements :class:`arsp.protocols.Tokenizer`.

    A sequence of L codes is scale-major, raster order inside a scale. ``decode_*`` take any whole number of leading scales.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        pad = config.quant_conv_ks // 2
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, config.quant_conv_ks, padding=pad)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, config.quant_conv_ks, padding=pad)

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.patch_nums[-1], self.config.patch_nums[-1]

    @property
    def codebook_VE(self) -> Tensor:
        return self.quantize.embedding.weight

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Encoder output after ``quant_conv``: ``(B, E, h, w)``."""
        return self.quant_conv(self.encoder(pixels_B3HW))

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> ``codes_BL`` int64. InputError when the image does not fill the last scale's grid."""
        size = self.config.image_size
        if pixels_B3HW.ndim != 4 or tuple(pixels_B3HW.shape[1:]) != (3, size, size):
            raise InputError(f"encode: expected (B, 3, {size}, {size}), got {tuple(pixels_B3HW.shape)}.")
        return torch.cat(self.quantize.encode(self.latents(pixels_B3HW))[0], dim=1)

    def decode_codes(self, codes_BL: Tensor) -> Tensor:
        """Codes of the leading scales -> pixels about [-1, 1], not clamped."""
        return self.decode_embeddings(self.codebook_VE[codes_BL.long()])

    def decode_embeddings(self, embeddings_BLE: Tensor) -> Tensor:
        """Vectors ``(B, L, E)`` in the order of the codes -> pixels; no quantisation in between."""
        return self.decode_map(self.to_map(embeddings_BLE))

    def to_map(self, embeddings_BLE: Tensor) -> Tensor:
        """The decoder's input: the sum over scales ``(B, E, h, w)``."""
        return self.quantize.sum_scales(embeddings_BLE)

    def decode_map(self, f_hat_BEhw: Tensor) -> Tensor:
        """The sum over scales ``(B, E, h, w)`` -> pixels ``(B, 3, H, W)``."""
        return self.decoder(self.post_quant_conv(f_hat_BEhw))


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation over scales. All arithmetic in float32."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.patch_nums, self.znorm = config.patch_nums, config.using_znorm
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.patch_nums), config.vocab_size))  # a training statistic
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = _phis(config)
        self.phi_index = phi_index(len(config.patch_nums), config.share_quant_resi)

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    def start(self, batch: int) -> Tensor:
        """``f_hat`` before the first scale: zeros ``(B, E, h, w)``."""
        side, weight = self.patch_nums[-1], self.embedding.weight
        return weight.new_zeros(batch, weight.shape[1], side, side, dtype=torch.float32)

    def contribution(self, vectors_BnE: Tensor, k: int) -> Tensor:
        """What the vectors of scale k add to ``f_hat``: phi_k of the map enlarged to the final grid, ``(B, E, h, w)``."""
        pn = self.patch_nums[k]
        h = vectors_BnE.transpose(1, 2).reshape(len(vectors_BnE), -1, pn, pn)
        if k < self.num_scales - 1:
            h = F.interpolate(h, size=(self.patch_nums[-1],) * 2, mode="bicubic")
        return self.phi(k)(h)

    def phi(self, k: int) -> nn.Module:
        """The smoothing of scale k."""
        which, holder = self.phi_index[k], self.quant_resi
        if isinstance(holder, PhiShared):
            return holder.qresi
        return holder.qresi_ls[which] if isinstance(holder, PhiPartly) else holder[which]

    def next_map(self, f_hat: Tensor, k: int) -> Tensor:
        """The input of scale k + 1 after scale k was added: ``f_hat`` averaged down to it; behind the last scale, ``f_hat`` itself."""
        if k == self.num_scales - 1:
            return f_hat
        return F.interpolate(f_hat, size=(self.patch_nums[k + 1],) * 2, mode="area")

    def sum_scales(self, vectors_BLE: Tensor) -> Tensor:
        """``f_hat (B, E, h, w)`` of the leading scales that the L vectors fill. InputError when L cuts a scale."""
        f_hat = self.start(len(vectors_BLE))
        for k, part in enumerate(self.split(vectors_BLE.float())):
            f_hat = f_hat + self.contribution(part, k)
        return f_hat

    def split(self, sequence_BL: Tensor) -> tuple[Tensor, ...]:
        """A sequence along dim 1 -> its leading scales. InputError when its length is not that of whole scales."""
        sizes, total = [], 0
        for pn in self.patch_nums:
            if total < sequence_BL.shape[1]:
                sizes.append(pn * pn)
                total += pn * pn
        if total != sequence_BL.shape[1]:
            raise InputError(f"{sequence_BL.shape[1]} codes are no whole number of the scales {list(self.patch_nums)}.")
        return sequence_BL.split(sizes, dim=1)

    def nearest(self, z_NE: Tensor) -> Tensor:
        """Ids of the nearest codebook rows (smallest id on ties); by cosine where the model was trained so."""
        e = self.embedding.weight
        if self.znorm:
            return (F.normalize(z_NE, dim=-1) @ F.normalize(e, dim=-1).T).argmax(-1)
        distance = z_NE.square().sum(-1, keepdim=True) + e.square().sum(-1)
        return torch.addmm(distance, z_NE, e.T, alpha=-2).argmin(-1)

    def encode(self, f_BEhw: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Latents on the final grid -> ids ``(B, n_k)`` and the running ``f_hat`` after every scale."""
        B, E = f_BEhw.shape[:2]
        rest, f_hat = f_BEhw.float(), torch.zeros_like(f_BEhw, dtype=torch.float32)
        ids, maps = [], []
        for k, pn in enumerate(self.patch_nums):
            z = rest if k == self.num_scales - 1 else F.interpolate(rest, size=(pn, pn), mode="area")
            codes = self.nearest(z.permute(0, 2, 3, 1).reshape(-1, E)).view(B, -1)
            added = self.contribution(self.embedding(codes), k)
            f_hat, rest = f_hat + added, rest - added
            ids.append(codes)
            maps.append(f_hat)
        return ids, maps

    def inputs(self, codes_BL: Tensor) -> Tensor:
        """Teacher-forcing input of scales 1 .. K-1 from the codes of scales 0 .. K-2 (or more): ``(B, L - n_0, E)`` float32."""
        parts = self.split(codes_BL)
        f_hat, maps = self.start(len(codes_BL)), []
        for k, codes in enumerate(parts[: self.num_scales - 1]):
            f_hat = f_hat + self.contribution(self.embedding(codes).float(), k)
            maps.append(self.next_map(f_hat, k).flatten(2).transpose(1, 2))
        return torch.cat(maps, dim=1)


def phi_of(width: int, quant_resi: float) -> nn.Module:
    """A phi; without a convolved share there is nothing to learn and no key in the file."""
    return Phi(width, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity()


class Phi(nn.Conv2d):
    """``(1 - r) h + r conv3x3(h)``, r = ``|quant_resi|``."""

    def __init__(self, width: int, quant_resi: float):
        super().__init__(width, width, 3, padding=1)
        self.ratio = abs(quant_resi)

    def forward(self, h_BEhw: Tensor) -> Tensor:
        return h_BEhw.mul(1 - self.ratio) + super().forward(h_BEhw).mul_(self.ratio)


class PhiShared(nn.Module):
    """One phi for all scales."""

    def __init__(self, width: int, quant_resi: float):
        super().__init__()
        self.qresi = phi_of(width, quant_resi)


class PhiPartly(nn.Module):
    """A few phis, each for neighbouring scales."""

    def __init__(self, num: int, width: int, quant_resi: float):
        super().__init__()
        self.qresi_ls = nn.ModuleList(phi_of(width, quant_resi) for _ in range(num))


def _phis(config: VQVAEConfig) -> nn.Module:
    width, ratio = config.z_channels, config.quant_resi
    if config.share_quant_resi == 1:
        return PhiShared(width, ratio)
    if config.share_quant_resi == 0:
        return nn.ModuleList(phi_of(width, ratio) for _ in config.patch_nums)
    return PhiPartly(config.share_quant_resi, width, ratio)


def phi_index(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Which phi serves each scale.

    note: with ten scales and four phis, scales 2 and 7 lie exactly between two ticks; float64 rounding of this very formula
    decides them (0,0,1,1,1,2,2,3,3,3), and the released weights depend on it.
    """
    if num_phis == 0:
        return tuple(range(num_scales))
    margin = 1 / (3 * num_phis) if num_phis == 4 else 1 / (2 * num_phis)
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return tuple(int(np.argmin(np.abs(ticks - k / (num_scales - 1)))) for k in range(num_scales))


class Encoder(nn.Module):
    def __init__(self, cfg: VQVAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = cfg.ch
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.down.append(Level(c, width, cfg.num_res_blocks, attention=last, down=not last))
            c = width
        self.mid = Middle(c)
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.features(x))))

    def features(self, x: Tensor) -> Tensor:
        """What the last normalisation sees: ``(B, C, h, w)``."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.mid(h)


class Decoder(nn.Module):
    def __init__(self, cfg: VQVAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = Middle(c)
        levels = []
        for i in reversed(range(len(widths))):
            levels.insert(0, Level(c, widths[i], cfg.num_res_blocks + 1, attention=i == len(widths) - 1, up=i > 0))
            c = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then the change of resolution."""

    def __init__(self, cin: int, cout: int, num: int, *, attention: bool, down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(cin if j == 0 else cout, cout) for j in range(num))
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(num if attention else 0))
        if down:
            self.downsample = Downsample(cout)
        if up:
            self.upsample = Upsample(cout)

    def forward(self, h: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            h = block(h)
            if j < len(self.attn):
                h = self.attn[j](h)
        if hasattr(self, "downsample"):
            h = self.downsample(h)
        return self.upsample(h) if hasattr(self, "upsample") else h


class Middle(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(c, c), AttnBlock(c), ResBlock(c, c)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class AttnBlock(nn.Module):
    """Single-head attention over the h*w cells."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))
