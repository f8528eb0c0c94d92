"""Distances in a codebook: nearest codes, clusters, pairs. Computed once and kept on disk under the codebook's hash.

Any matrix with a row a code will do: LANTERN (arXiv 2410.03355) relaxes over neighbours in the tokenizer's codebook, GSD
(arXiv 2508.07747) compares rows of the transformer's input embedding.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arsp.errors import ConfigError, InputError
from arsp.runs import atomic_file, cache_root

_BLOCK_ELEMENTS = 1 << 20  # distances held at once
_ITERATIONS = 25  # of k-means


class CodebookGeometry:
    """Geometry of ``codebook_VE``; results are on its device. InputError for anything but a finite matrix of two rows or more."""

    def __init__(self, codebook_VE: Tensor):
        if codebook_VE.ndim != 2 or len(codebook_VE) < 2 or not bool(codebook_VE.isfinite().all()):
            raise InputError(f"a codebook is a finite matrix (codes, width) of two codes or more, got {tuple(codebook_VE.shape)}.")
        self.codebook_VE = codebook_VE.detach().float()

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the codebook's float32 bytes, row by row."""
        return hashlib.sha256(self.codebook_VE.cpu().contiguous().numpy().tobytes()).hexdigest()

    def nearest(self, k: int) -> Tensor:
        """The k nearest other codes of every code, nearest first: int64 ``(V, min(k, V - 1))``.

        Codes whose distances (L2) are equal in float32 come in the order of their ids. ConfigError for k < 1.
        """
        if k < 1:
            raise ConfigError(f"{k} nearest codes: expected 1 or more.")
        V = len(self.codebook_VE)
        k = min(k, V - 1)
        small = torch.uint16 if V <= 1 << 16 else torch.int32
        made = self._cached(f"nearest-{k}", lambda: {"nearest_Vk": self._nearest(k, small)}, {"nearest_Vk": (small, (V, k))})
        return made["nearest_Vk"].to(torch.int64)

    def clusters(self, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """k-means: ``labels_V`` int64 (the nearest centre) and ``centres (num, E)`` float32. ConfigError unless 1 <= num <= V."""
        V, E = self.codebook_VE.shape
        if not 1 <= num <= V:
            raise ConfigError(f"{num} clusters of {V} codes: expected 1 to {V}.")
        shapes = {"labels_V": (torch.int64, (V,)), "centres": (torch.float32, (num, E))}
        made = self._cached(f"clusters-{num}-seed{seed}", lambda: self._clusters(num, seed), shapes)
        return made["labels_V"], made["centres"]

    def squared_distance(self, a_codes: Tensor, b_codes: Tensor) -> Tensor:
        """Squared L2 distance of pairs of codes; the two int64 shapes broadcast."""
        return (self.codebook_VE[a_codes] - self.codebook_VE[b_codes]).square().sum(-1)

    def _nearest(self, k: int, dtype: torch.dtype) -> Tensor:
        """Ids ``(V, k)``, a block of rows at a time. Bits of a float32 >= 0 sort as integers: (distance, id) is one key of 64 bits."""
        codebook, V = self.codebook_VE.double(), len(self.codebook_VE)
        ids = torch.arange(V, device=codebook.device)
        nearest_Vk = torch.empty(V, k, dtype=dtype, device=codebook.device)
        rows = max(1, _BLOCK_ELEMENTS // V)
        for block, part in zip(ids.split(rows), nearest_Vk.split(rows), strict=True):
            # not by matrix products: equal codes have to have equal distances
            distance = torch.cdist(codebook[block], codebook, compute_mode="donot_use_mm_for_euclid_dist").float()
            distance.scatter_(1, block[:, None], torch.inf)
            keys = (distance.view(torch.int32).to(torch.int64) << 32) | ids
            part.copy_(keys.topk(k, largest=False).values & 0xFFFFFFFF)
        return nearest_Vk

    def _clusters(self, num: int, seed: int) -> dict[str, Tensor]:
        from scipy.cluster.vq import kmeans2, vq

        points = self.codebook_VE.double().cpu().numpy()
        with warnings.catch_warnings(action="ignore"):  # fewer different codes than clusters: some stay empty
            centres = kmeans2(points, num, iter=_ITERATIONS, minit="++", rng=seed)[0]
        return {"labels_V": torch.from_numpy(vq(points, centres)[0]).long(), "centres": torch.from_numpy(centres).float()}

    def _cached(
        self, what: str, make: Callable[[], dict[str, Tensor]], shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, Tensor]:
        """The tensors of ``what`` from ``cache_root()/geometry``, made and stored first where they are missing."""
        path = cache_root() / "geometry" / f"{self.sha256[:24]}-{self.codebook_VE.shape[1]}-{what}.safetensors"
        if not path.exists():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                intact = (file.metadata() or {}).get("sha256") == _digest(tensors)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}).", f"Delete {path}; it is made again.") from error
        if not intact or {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} != shapes:
            raise InputError(f"{path}: its content is damaged.", f"Delete {path}; it is made again.")
        return {name: tensor.to(self.codebook_VE.device) for name, tensor in tensors.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
