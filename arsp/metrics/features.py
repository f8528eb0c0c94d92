"""The frozen evaluation network of the embedded set: 64 features for Frechet distances, plus four attribute heads.

The trained weights are part of the metric's definition: its name carries their version, and every record their SHA-256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from arsp.errors import InputError

FEATNET_NAME = "shapes-cnn-v1"
IMAGE_SIZE = 32
NUM_FEATURES = 64
PACKAGED_WEIGHTS = Path(__file__).resolve().parent.parent / "zoo" / "tiny" / "featnet.safetensors"

_CHANNELS_STRIDES = ((32, 1), (32, 2), (64, 1), (64, 2), (96, 1), (96, 2), (96, 1))


class FeatNet(nn.Module):
    """Seven conv3x3-BatchNorm-ReLU blocks, one linear layer to 64 features, linear heads on their ReLU (387 643 parameters).

    ``forward(images_u8_B3HW)`` takes uint8 ``(B, 3, 32, 32)`` and returns ``features`` (B, 64; before the ReLU),
    ``shape`` (B, 10), ``color`` (B, 8) and ``bg`` (B, 6) logits, and ``pos`` (B, 3) = (cx / 16 - 1, cy / 16 - 1, r / 8 - 1)
    with the centre and radius in pixels.
    """

    def __init__(self):
        super().__init__()
        blocks, width = [], 3
        for channels, stride in _CHANNELS_STRIDES:
            blocks += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.blocks = nn.Sequential(*blocks)
        self.features = nn.Linear(width * 4 * 4, NUM_FEATURES)
        self.shape = nn.Linear(NUM_FEATURES, 10)
        self.color = nn.Linear(NUM_FEATURES, 8)
        self.bg = nn.Linear(NUM_FEATURES, 6)
        self.pos = nn.Linear(NUM_FEATURES, 3)

    def forward(self, images_u8_B3HW: Tensor) -> dict[str, Tensor]:
        if images_u8_B3HW.dtype != torch.uint8 or tuple(images_u8_B3HW.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            got = f"{images_u8_B3HW.dtype} {tuple(images_u8_B3HW.shape)}"
            raise InputError(f"images: {FEATNET_NAME} expects uint8 (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {got}.")
        x_B3HW = (images_u8_B3HW.to(self.features.weight.dtype) / 255 - 0.5) * 4
        features_B64 = self.features(self.blocks(x_B3HW).flatten(1))
        h_B64 = F.relu(features_B64)
        return {
            "features": features_B64,
            "shape": self.shape(h_B64),
            "color": self.color(h_B64),
            "bg": self.bg(h_B64),
            "pos": self.pos(h_B64),
        }


def load_featnet(path: str | Path | None = None) -> FeatNet:
    """The frozen network in float32 and eval mode, from ``path`` or the packaged file. InputError if missing, corrupt or foreign."""
    path = PACKAGED_WEIGHTS if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"The weights of {FEATNET_NAME} are missing: {path} does not exist.", "Reinstall arsp, or give a weights file.")
    net = FeatNet()
    try:
        net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()})
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is not a weights file of {FEATNET_NAME}: {reason}", "Reinstall arsp to restore the packaged file."
        ) from error
    return net.eval().requires_grad_(False)


def weights_sha256(net: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 bytes of all tensors (independent of how the file was written)."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def extract(net: FeatNet, images_u8_N3HW: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
    """All outputs of the network over N images, on the CPU in float32 (in batches, on the network's device)."""
    device = net.features.weight.device
    parts = [net(batch.to(device)) for batch in images_u8_N3HW.split(batch_size)]
    return {key: torch.cat([part[key].float().cpu() for part in parts]) for key in parts[0]}
