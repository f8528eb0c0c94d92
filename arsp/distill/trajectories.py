"""Trajectory shards of distilled decoding: class labels and teacher codes; the noise is regenerated from (seed, sample id).

A shard is one safetensors file, complete or absent, so generation resumes where it stopped and a shard's content does not
depend on the batch size. ``labels (N,) int16``, ``tokens (N, L) int16|int32`` (of short ones the first of the L codes),
``sample_ids (N,) int64``, and ``noise_check``, the first 64 noise values (the generator must agree bit for bit on the integers and to
1e-6 on the normals on every machine).
Metadata: teacher and codebook hashes, sampling rule, solver, seed, and a hash of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arsp.decode.few_step import request_noise
from arsp.decode.filters import LogitsPipeline
from arsp.distill.flow import FlowSettings, sample_through_map
from arsp.errors import InputError
from arsp.protocols import Decoder, Request
from arsp.rng import keyed_labels
from arsp.runs import atomic_file, check_stop


@dataclass(frozen=True)
class TrajectoryRule:
    """Everything that decides a trajectory besides the teacher's weights."""

    seed: int
    num_classes: int
    cfg: float
    cfg_interval: int
    pipeline: LogitsPipeline
    flow: FlowSettings

    def fingerprint(self, teacher_sha256: str, codebook_VE: Tensor, order: str) -> dict[str, str]:
        """Metadata strings; two shards belong together only if they are equal."""
        book = hashlib.sha256(codebook_VE.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        rule = {
            "cfg": self.cfg,
            "cfg_interval": self.cfg_interval,
            "pipeline": asdict(self.pipeline),
            "flow": asdict(self.flow),
            "order": order,
        }
        return {
            "teacher_sha256": teacher_sha256,
            "codebook_sha256": book,
            "seed": str(self.seed),
            "num_classes": str(self.num_classes),
            "rule": json.dumps(rule, sort_keys=True),
        }


def shard_request(rule: TrajectoryRule, first: int, count: int, device: torch.device | str = "cpu") -> Request:
    """Sample ids ``first .. first + count`` with uniform keyed class labels."""
    ids = torch.arange(first, first + count, dtype=torch.int64)
    return Request(ids.to(device), rule.seed, labels_B=keyed_labels(rule.seed, ids, rule.num_classes).to(device))


def generate_shards(
    folder: Path,
    decoder: Decoder,
    codebook_VE: Tensor,
    rule: TrajectoryRule,
    *,
    teacher_sha256: str,
    num: int,
    first_id: int = 0,
    length: int | None = None,
    shard_size: int = 2048,
    batch_size: int = 512,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write the missing shards of samples ``first_id .. first_id + num`` under ``folder`` and return all of them in order.

    ``length``: their first codes only (whole blocks), which cost that much less.

    Raises InputError when the folder holds damaged shards or some of another teacher or rule, Interrupted between batches when
    asked to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meta = rule.fingerprint(teacher_sha256, codebook_VE, decoder.layout.order) | ({"length": str(length)} if length else {})
    L, end = length or decoder.layout.num_tokens, first_id + num
    counts = {first: min(shard_size, end - first) for first in range(first_id, end, shard_size)}
    paths = {first: folder / f"shard-{first:08d}-{count}.safetensors" for first, count in counts.items()}
    for path in filter(Path.exists, paths.values()):  # before the long work
        _check_meta(path, meta)
        _read_shard(path, codebook_VE.shape[1])
    for first, path in paths.items():
        count = counts[first]
        if path.exists():
            progress(count)
            continue
        tokens, labels = [], []
        for start in range(first, first + count, batch_size):
            check_stop()
            request = shard_request(rule, start, min(batch_size, first + count - start), codebook_VE.device)
            noise = request_noise(request, L, codebook_VE.shape[1]).to(codebook_VE)
            result = sample_through_map(
                decoder, request, lambda positions, noise=noise: noise[:, positions], rule.pipeline, codebook_VE, rule.flow, stop=length
            )
            tokens.append(result.codes_BL[:, :L].cpu())
            labels.append(request.labels_B.cpu())
            progress(request.batch_size)
        small = torch.int16 if codebook_VE.shape[0] <= 1 << 15 else torch.int32
        check = request_noise(shard_request(rule, first, 1), L, codebook_VE.shape[1]).flatten()[:64]
        with atomic_file(path) as temporary:
            tensors = {
                "tokens": torch.cat(tokens).to(small),
                "labels": torch.cat(labels).to(torch.int16),
                "sample_ids": torch.arange(first, first + count),
                "noise_check": check.contiguous(),
            }
            save_file(tensors, temporary, metadata={**meta, "content_sha256": _content_hash(tensors)})
    return list(paths.values())


@dataclass
class Trajectories:
    """All shards in memory: codes, labels and sample ids; noise on demand."""

    tokens_NL: Tensor
    labels_N: Tensor
    sample_ids_N: Tensor
    seed: int
    code_dim: int

    def __len__(self) -> int:
        return len(self.labels_N)

    def rows(self, index: slice) -> Trajectories:
        """A part of the set."""
        return Trajectories(self.tokens_NL[index], self.labels_N[index], self.sample_ids_N[index], self.seed, self.code_dim)

    def first_codes(self, length: int) -> Trajectories:
        """The first ``length`` codes of each."""
        return Trajectories(self.tokens_NL[:, :length], self.labels_N, self.sample_ids_N, self.seed, self.code_dim)

    def joined(self, other: Trajectories) -> Trajectories:
        """Both sets, of one seed and length."""
        both = (torch.cat((getattr(self, name), getattr(other, name))) for name in ("tokens_NL", "labels_N", "sample_ids_N"))
        return Trajectories(*both, self.seed, self.code_dim)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``codes_BL`` int64, ``labels_B`` int64 and the regenerated ``noise_BLE`` of these rows."""
        codes, labels = self.tokens_NL[rows].long(), self.labels_N[rows].long()
        request = Request(self.sample_ids_N[rows], self.seed, labels_B=labels)
        return codes, labels, request_noise(request, codes.shape[1], self.code_dim)


def load_shards(paths: list[Path], code_dim: int) -> Trajectories:
    """Read shards; InputError when one is damaged or its noise cannot be reproduced on this machine."""
    shards = [_read_shard(path, code_dim) for path in paths]
    joined = {key: torch.cat([tensors[key] for tensors, _ in shards]) for key in ("tokens", "labels", "sample_ids")}
    return Trajectories(joined["tokens"], joined["labels"], joined["sample_ids"], shards[-1][1], code_dim)


def _read_shard(path: Path, code_dim: int) -> tuple[dict[str, Tensor], int]:
    """Tensors and seed of one shard, its content hash and its noise checked."""
    again = f"Delete {path} and run the same command again."
    try:
        tensors = load_file(path)
        found = _metadata(path)
        intact = found["content_sha256"] == _content_hash(tensors)
        seed, num_tokens = int(found["seed"]), tensors["tokens"].shape[1]
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise InputError(f"trajectory shard {path} cannot be read: {type(error).__name__}: {error}", again) from error
    if not intact:
        raise InputError(f"trajectory shard {path} is damaged: its content hash differs from the stored one.", again)
    noise = request_noise(Request(tensors["sample_ids"][:1], seed), num_tokens, code_dim).flatten()[:64]
    if not torch.allclose(noise, tensors["noise_check"], atol=1e-6):
        raise InputError(
            f"{path}: the noise regenerated here differs from the noise it was made with.", f"Delete {path.parent} to make it anew."
        )
    return tensors, seed


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_meta(path: Path, expected: dict[str, str]) -> None:
    """InputError when a shard that is already there was made by another teacher or rule, or is damaged."""
    try:
        found = _metadata(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"trajectory shard {path} cannot be read: {error}", f"Delete {path} and run the same command again.") from error
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(
                f"{path} was made with another {key} ({found.get(key)} instead of {value}).", "Choose another --out, or delete the shards."
            )


def minibatches(total: int, batch_size: int) -> Iterator[Tensor]:
    """Row indices in order."""
    yield from torch.arange(total).split(batch_size)
