"""LiteVAR profiles: which windows and how much sharing between the guidance halves, for one model, as a small bundle.

A bundle directory holds ``arsp.json`` (kind "profile") and ``profile.safetensors`` with ``win`` (int16, layer x head x s x u) and
``share`` (int8, layer x s). A profile belongs to the weights it was calibrated on; :meth:`Profile.check_model` refuses others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from arsp.errors import ConfigError, InputError
from arsp.runs import atomic_dir, sha256_file, write_json
from arsp.sparse.litevar import CUT, MASK_KINDS, TAU, MaskKind
from arsp.sparse.window import DENSE, GEOMETRIES, Geometry, dense_pairs, pairs_per_scale, uniform_2d
from arsp.zoo import bundle

FORMAT = 1
TENSORS = "profile.safetensors"
SHARES = ("none", "map", "output")  # stored as 0, 1, 2
FIELDS = {
    "format": int, "model": str, "fingerprint": str | None, "patch_nums": list, "geometry": str, "mask": str, "tau": int | float,
    "cut": int | float, "calibration": dict,
}  # fmt: skip
DTYPES = {"win": torch.int16, "share": torch.int8}


@dataclass(frozen=True)
class Profile:
    """Windows ``win[layer, head, s, u]`` (-1 dense, 0 dropped, else r or w) and ``share[layer, s]`` (0 none, 1 map, 2 output).

    ``fingerprint`` is the SHA-256 of the weights file; ``calibration`` says how the windows were found (images, batches, seed, cfg).
    ConfigError when the arrays contradict themselves: see :meth:`__post_init__`.
    """

    model: str
    fingerprint: str | None
    patch_nums: tuple[int, ...]
    win: np.ndarray
    share: np.ndarray
    geometry: Geometry = "2d"
    mask: MaskKind = "neginf"
    tau: float = TAU
    cut: float = CUT
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        K = len(self.patch_nums)
        if self.win.ndim != 4 or not self.win.size or self.win.shape[2:] != (K, K) or self.share.shape != (self.win.shape[0], K):
            raise ConfigError(
                f"profile: win {self.win.shape} and share {self.share.shape} do not describe (layers, heads, {K}, {K}) and (layers, {K})."
            )
        if self.geometry not in GEOMETRIES or self.mask not in MASK_KINDS:
            raise ConfigError(f"profile: unknown geometry {self.geometry!r} or mask {self.mask!r}.")
        if self.win.min() < DENSE or self.share.min() < 0 or self.share.max() >= len(SHARES):
            raise ConfigError("profile: windows are -1, 0 or positive, shares are none, map or output.")
        for s in range(K):
            empty = np.argwhere((self.win[:, :, s, : s + 1] == 0).all(-1))
            if len(empty):
                layer, head = empty[0]
                raise ConfigError(
                    f"profile: scale {s} of layer {layer}, head {head} drops all keys: its queries would see nothing.",
                    "Keep at least one key scale (-1 dense or a window).",
                )
        falling = np.argwhere(np.diff(self.share.astype(int), axis=1) < 0)
        if len(falling):
            layer, s = falling[0]
            names = [SHARES[self.share[layer, s + i]] for i in (0, 1)]
            raise ConfigError(
                f"profile: layer {layer} shares '{names[0]}' at scale {s} and '{names[1]}' at scale {s + 1}; "
                "keys and values of the null half that were not stored cannot be read later.",
                "Within a layer the order none, map, output may only grow with the scale.",
            )

    @property
    def depth(self) -> int:
        return self.win.shape[0]

    @property
    def heads(self) -> int:
        return self.win.shape[1]

    def share_of(self, layer: int, s: int) -> str:
        """ "none", "map" or "output"."""
        return SHARES[self.share[layer, s]]

    def kept(self) -> np.ndarray:
        """Kept share of the query-key pairs, ``(layer, s)``, averaged over heads."""
        pairs = pairs_per_scale(self.win, self.patch_nums, self.geometry).mean(1)
        return pairs / np.array(dense_pairs(self.patch_nums))

    def kept_total(self) -> float:
        """Kept share of all query-key pairs of an image."""
        dense = np.array(dense_pairs(self.patch_nums))
        return float((self.kept() * dense).sum() / (self.depth * dense.sum()))

    def check_model(self, name: str, *, patch_nums: Sequence[int], depth: int, heads: int, fingerprint: str | None) -> None:
        """InputError unless the profile was made for this model. ``fingerprint`` None (random weights, costs only) is not compared."""
        own = {"patch_nums": list(self.patch_nums), "layers": self.depth, "heads": self.heads}
        for what, expected in {"patch_nums": list(patch_nums), "layers": depth, "heads": heads}.items():
            if own[what] != expected:
                raise InputError(
                    f"the profile is for {what} {own[what]} ({self.model}), {name} has {expected}.",
                    f"Make one: arsp sparsify --model {name}",
                )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise InputError(
                f"the profile was calibrated on {self.model} with weights {_short(self.fingerprint)}, {name} has {_short(fingerprint)}.",
                f"Windows of other weights do not carry over; make them: arsp sparsify --model {name}",
            )


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:12]


def uniform_share(share: str, depth: int, num_scales: int) -> np.ndarray:
    """``share[layer, s]`` with the same rule everywhere."""
    return np.full((depth, num_scales), SHARES.index(share), dtype=np.int8)


def uniform_profile(model: str, radius: int, *, patch_nums: Sequence[int], depth: int, heads: int) -> Profile:
    """The same 2-D window in every block of every head, nothing shared (the policy computes dense what keeps too much). It belongs to no
    weights: a control for calibrated windows, and what costs can be measured with."""
    win = np.tile(uniform_2d(patch_nums, radius), (depth, heads, 1, 1))
    share = uniform_share("none", depth, len(patch_nums))
    return Profile(model, None, tuple(patch_nums), win, share, calibration={"uniform": radius})


def save_profile(path: Path, profile: Profile) -> Path:
    """Write the bundle directory atomically."""
    config = {
        "format": FORMAT, "model": profile.model, "fingerprint": profile.fingerprint, "patch_nums": list(profile.patch_nums),
        "depth": profile.depth, "heads": profile.heads, "geometry": profile.geometry, "mask": profile.mask, "tau": profile.tau,
        "cut": profile.cut, "calibration": profile.calibration,
    }  # fmt: skip
    with atomic_dir(path) as temporary:
        tensors = {name: torch.from_numpy(getattr(profile, name)).to(dtype) for name, dtype in DTYPES.items()}
        save_file(tensors, temporary / TENSORS)
        manifest = {"schema": bundle.SCHEMA, "family": "var", "kind": "profile", "config": config, "tokenizer": None}
        write_json(temporary / bundle.MANIFEST, {**manifest, "sha256": {TENSORS: sha256_file(temporary / TENSORS)}})
    return path


def load_profile(path: Path | str) -> Profile:
    """Read a profile bundle, or the one in a run directory of ``arsp sparsify``.

    Raises:
        InputError: missing, damaged, of another kind, or of a newer format. ConfigError: the windows contradict themselves.
    """
    path = Path(path)
    if not (path / bundle.MANIFEST).is_file() and (path / "bundle").is_dir():
        path = path / "bundle"
    manifest = bundle.read_manifest(path)
    if manifest["kind"] != "profile":
        raise InputError(f"{path} is a bundle of kind '{manifest['kind']}', not a profile.", "Make one: arsp sparsify --model var")
    config = manifest["config"]
    if isinstance(config.get("format"), int) and config["format"] > FORMAT:
        raise InputError(f"{path} has profile format {config['format']}; this arsp reads up to {FORMAT}.", "Upgrade arsp.")
    tensors = bundle.load_weights(path, TENSORS, manifest)
    wrong = [key for key, kind in FIELDS.items() if not isinstance(config.get(key), kind)]
    if "patch_nums" not in wrong and not all(isinstance(side, int) for side in config["patch_nums"]):
        wrong.append("patch_nums")
    wrong += [name for name, dtype in DTYPES.items() if name not in tensors or tensors[name].dtype != dtype]
    if wrong:
        raise InputError(f"{path} is not a valid profile: {', '.join(wrong)} missing or of the wrong type.", "Make or copy it again.")
    fields = {key: config[key] for key in FIELDS if key not in ("format", "patch_nums")}
    arrays = {name: tensors[name].numpy() for name in DTYPES}
    return Profile(patch_nums=tuple(config["patch_nums"]), **arrays, **fields)
