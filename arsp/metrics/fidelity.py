"""Frechet distance, kernel distance, inception score, precision and recall: torch-fidelity behind one seam.

Sources: FID arXiv:1706.08500 eq. 6, KID arXiv:1801.01401 section 4, IS arXiv:1606.03498 section 4, precision and recall
arXiv:1904.06991 section 2. Which numbers may be compared with published ones: docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arsp.errors import InputError, NumericalError, ResourceError
from arsp.metrics.features import FEATNET_NAME, IMAGE_SIZE, NUM_FEATURES, FeatNet, extract, load_featnet, weights_sha256
from arsp.metrics.reference import Reference, images_sha256
from arsp.rng import Purpose, keyed_uniform

METRICS = ("fid", "kid", "is", "prc")
MIN_IMAGES = 2
KID_SCALE = 4.26  # rms standard deviation of the raw features: the cubic kernel means nothing on unnormalised ones
KID_SUBSET_SIZE = 1000
IS_SPLIT_SIZE = 5000  # as the ADM evaluator
INCEPTION_NAME = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_TENSORS = 472  # without batch counters
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

# Schemas of operators that torchvision registers fake kernels for even when its compiled extension could not be loaded.
_TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_defined_operators: list[torch.library.Library] = []  # a library that is collected takes its schemas along


# ---- the seam to torch-fidelity -----------------------------------------------------------------------------------------------


@functools.cache
def torch_fidelity() -> ModuleType:
    """The torch-fidelity package with the embedded feature network registered. ResourceError if it cannot be imported.

    It imports torchvision, whose wheel for CUDA does not load its operators beside a CPU-only torch and then fails with
    "operator torchvision::nms does not exist". No operator is used here, so declaring the missing schema is enough.
    """
    for _ in range(1 + len(_TORCHVISION_SCHEMAS)):
        try:
            module = importlib.import_module("torch_fidelity")
            importlib.import_module("torch_fidelity.utils")
            break
        except (ImportError, RuntimeError, OSError) as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or missing[1] not in _TORCHVISION_SCHEMAS:
                raise _not_importable(error) from error
            _define_operator(missing[1])
            _forget_modules()
    else:
        raise _not_importable(RuntimeError("torchvision does not match the installed torch"))
    if FEATNET_NAME not in module.registry.FEATURE_EXTRACTORS_REGISTRY:
        module.register_feature_extractor(FEATNET_NAME, _featnet_extractor(module.FeatureExtractorBase))
    return module


def _define_operator(name: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(_TORCHVISION_SCHEMAS[name])
    _defined_operators.append(library)


def _forget_modules() -> None:
    """Drop half-imported modules, so that the next import starts over."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[name]


def _not_importable(error: Exception) -> ResourceError:
    reason = " ".join(str(error).split())[:200]
    return ResourceError(f"torch-fidelity cannot be imported: {reason}", "Run: pip install torch-fidelity==0.4.0 torchvision")


def _featnet_extractor(base: type) -> type:
    class FeatNetExtractor(base):
        """The embedded network as a torch-fidelity extractor, float64: ``64``, ``64n`` (divided by KID_SCALE), ``logits`` (shape)."""

        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__(name, features_list)
            self.net = load_featnet(feature_extractor_weights_path)

        def forward(self, images_u8_B3HW: Tensor) -> tuple[Tensor, ...]:
            out = self.net(images_u8_B3HW)
            features_B64 = out["features"].double()
            layers = {"64": features_B64, "64n": features_B64 / KID_SCALE, "logits": out["shape"].double()}
            return tuple(layers[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "64", "64n", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits", "fid": "64", "kid": "64n", "prc": "64"}[metric]

        @staticmethod
        def can_be_compiled():
            return False

    return FeatNetExtractor


# ---- which features -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSource:
    """A feature extractor with its weights: the part of a protocol that decides what the numbers mean."""

    name: str  # FEATNET_NAME | INCEPTION_NAME
    weights: Path | None
    sha256: str

    @property
    def is_toy(self) -> bool:
        return self.name == FEATNET_NAME

    @property
    def extractor(self) -> str:
        return FEATNET_NAME if self.is_toy else "inception-v3-compat"

    @property
    def layers(self) -> dict[str, str]:
        if self.is_toy:
            return {"fid": "64", "kid": "64n", "is": "logits", "prc": "64"}
        return {"fid": "2048", "kid": "2048", "is": "logits_unbiased", "prc": "2048"}

    @property
    def num_features(self) -> int:
        return NUM_FEATURES if self.is_toy else 2048


FEATURE_CHOICES = ("auto", FEATNET_NAME, INCEPTION_NAME)


def resolve_features(
    choice: str = "auto", image_size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), inception_weights: str | Path | None = None
) -> FeatureSource:
    """The extractor for images of ``image_size`` (H, W), its weights checked. InputError if they are missing or do not fit.

    ``auto``: Inception when its weights are named, else the embedded network for 32 x 32 images, else Inception.
    """
    fits_featnet = tuple(image_size) == (IMAGE_SIZE, IMAGE_SIZE)
    if choice == "auto":
        choice = FEATNET_NAME if fits_featnet and inception_weights is None else INCEPTION_NAME
    if choice == INCEPTION_NAME:
        path = inception_weights_path(inception_weights)
        return FeatureSource(INCEPTION_NAME, path, _check_inception(path))
    if choice != FEATNET_NAME:
        raise ValueError(f"features: expected one of {FEATURE_CHOICES}, got {choice!r}")
    if not fits_featnet:
        height, width = image_size
        raise InputError(f"{FEATNET_NAME} reads {IMAGE_SIZE}x{IMAGE_SIZE} images; these are {width}x{height}.", "Use --features inception.")
    return FeatureSource(FEATNET_NAME, None, weights_sha256(load_featnet()))


def inception_weights_path(given: str | Path | None = None) -> Path:
    """The Inception weights file: the given one, else the one in torch hub's cache. Nothing is ever downloaded."""
    if given is not None:
        if not Path(given).is_file():
            raise InputError(f"--inception-weights: {given} does not exist.", f"Expected the file {INCEPTION_FILE}.")
        return Path(given)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not cached.is_file():
        raise InputError(
            f"Inception features need {INCEPTION_FILE}, which is not at {cached}.",
            f"Fetch {INCEPTION_URL} where there is a network, then give it with --inception-weights FILE.",
        )
    return cached


def _check_inception(path: Path) -> str:
    """SHA-256 of a weights file that holds the Inception state dict (read without unpickling code), or InputError."""
    from arsp.runs import sha256_file

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shape = tuple(state["fc.weight"].shape)
        num_tensors = sum(not name.endswith("num_batches_tracked") for name in state)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not the Inception weights file {INCEPTION_FILE}.", f"It comes from {INCEPTION_URL}.") from error
    if shape != (1008, 2048) or num_tensors != INCEPTION_TENSORS:
        found = f"{num_tensors} tensors, fc.weight {shape}"
        raise InputError(f"{path} holds {found}; expected {INCEPTION_TENSORS} and (1008, 2048).", f"Expected the file {INCEPTION_FILE}.")
    return sha256_file(path)


# ---- Frechet distance in float64 ----------------------------------------------------------------------------------------------


def frechet_distance(features_a: Tensor | np.ndarray, features_b: Tensor | np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets ``(N, D)`` and ``(M, D)``; sample covariance (N - 1), float64."""
    return frechet_from_statistics(*gaussian(features_a), *gaussian(features_b))


def gaussian(features_ND: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``(D,)`` and sample covariance ``(D, D)`` in float64."""
    x_ND = np.asarray(features_ND, dtype=np.float64)
    if x_ND.ndim != 2 or len(x_ND) < MIN_IMAGES:
        raise InputError(f"A Frechet distance needs at least {MIN_IMAGES} feature vectors (N, D), got {x_ND.shape}.")
    return x_ND.mean(0), np.cov(x_ND, rowvar=False)


def frechet_from_statistics(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))`` (arXiv:1706.08500 eq. 6).

    The last trace is taken from the symmetric ``sigma_a^(1/2) sigma_b sigma_a^(1/2)``, which has the same eigenvalues.
    """
    return _frechet_to_root(_matrix_root(sigma_a), mu_a, sigma_a, mu_b, sigma_b)


def _matrix_root(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _frechet_to_root(root_a: np.ndarray, mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ sigma_b @ root_a), 0, None)).sum()
    return float((mu_a - mu_b) @ (mu_a - mu_b) + np.trace(sigma_a) + np.trace(sigma_b) - 2 * cross)


def bootstrap_interval(
    samples_ND: Tensor, reference: tuple[np.ndarray, np.ndarray], value: float, resamples: int, seed: int
) -> list[float]:
    """95 % interval of a Frechet distance over the choice of images: ``value`` + (2.5, 97.5) % quantiles of the centred resamples.

    Centred, because a resample holds fewer distinct images and so lies systematically further away.
    """
    x_ND = np.asarray(samples_ND, dtype=np.float64)
    root = _matrix_root(reference[1])
    distances = []
    for r in range(resamples):
        u_N = keyed_uniform(seed, torch.tensor(r), torch.tensor(0), Purpose.METRIC, len(x_ND), stream=1)
        picked_ND = x_ND[(u_N.double() * len(x_ND)).long().numpy()]
        distances.append(_frechet_to_root(root, *reference, *gaussian(picked_ND)))
    low, high = np.quantile(np.array(distances) - np.mean(distances), [0.025, 0.975])
    return [max(0.0, value + float(low)), value + float(high)]


@functools.cache
def _reference_gaussian(reference: Reference, net: FeatNet) -> tuple[np.ndarray, np.ndarray]:
    return gaussian(extract(net, reference.images_N3HW)["features"])


def quick_frechet(images_u8_N3HW: Tensor, reference: Reference, net: FeatNet) -> float:
    """Frechet distance on the embedded features without torch-fidelity, for curves; the reference's statistics are remembered."""
    return frechet_from_statistics(*_reference_gaussian(reference, net), *gaussian(extract(net, images_u8_N3HW)["features"]))


# ---- the metrics --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FidelityOptions:
    """What the numbers depend on besides images, reference and features."""

    seed: int = 0  # order of the images (IS), bootstrap and KID subsets
    kid_subsets: int = 100
    kid_subset_size: int = KID_SUBSET_SIZE  # adapted to the number of images
    prc_neighborhood: int = 3
    bootstrap: int = 200  # resamples for the interval of fid; embedded features only, 0 = none
    comparable_min_images: int = 10_000


class _Images(Dataset):
    """Image tensors for torch-fidelity; ``advance`` is called once an image."""

    def __init__(self, images_N3HW: Tensor, advance: Callable[[int], None] | None):
        self.images_N3HW, self.advance, self.seen = images_N3HW, advance, 0

    def __len__(self) -> int:
        return len(self.images_N3HW)

    def __getitem__(self, i: int) -> Tensor:
        if i == self.seen:
            self.seen += 1
            if self.advance is not None:
                self.advance(1)
        return self.images_N3HW[i]


def keyed_permutation(num: int, seed: int) -> Tensor:
    """A permutation of ``num`` images that depends on ``seed`` only (IS reads images in order)."""
    draws_N = keyed_uniform(seed, torch.arange(num), torch.tensor(0), Purpose.METRIC, 2)
    return (draws_N[:, 0].double() + draws_N[:, 1].double() * 2.0**-24).argsort(stable=True)


def check_count(num_images: int) -> None:
    """InputError for fewer than two images."""
    if num_images < MIN_IMAGES:
        raise InputError(
            f"{num_images} image{'s' * (num_images != 1)} given; metrics need at least {MIN_IMAGES}.", "Give or sample more images."
        )


def check_measurable(
    metrics: Sequence[str], num_images: int, reference: Reference, source: FeatureSource, options: FidelityOptions
) -> None:
    """InputError if these metrics cannot be computed, before any work: too few images, no images or statistics to compare with."""
    check_count(num_images)
    if "fid" in metrics and reference.mu_D is not None and len(reference.mu_D) != source.num_features:
        found = f"mu has {len(reference.mu_D)} features; {source.name} has {source.num_features}"
        raise InputError(f"The statistics of {reference.name} belong to other features: {found}.", "Choose the matching --features.")
    needing = [m for m in metrics if m in ("kid", "prc") or (m == "fid" and reference.mu_D is None)]
    if needing and reference.images_N3HW is None:
        raise InputError(
            f"{', '.join(needing)} needs reference images; {reference.name} holds statistics only.", "Give a reference with arr_0."
        )
    if "prc" in metrics and min(num_images, reference.num_images) <= options.prc_neighborhood:
        raise InputError(
            f"prc needs more than {options.prc_neighborhood} images on both sides, got {num_images} and {reference.num_images}."
        )


def check_sizes(images_N3HW: Tensor, reference: Reference) -> None:
    """InputError if samples and reference images differ in size: a resized comparison must be the user's own, named step."""
    if reference.images_N3HW is not None and reference.images_N3HW.shape[2:] != images_N3HW.shape[2:]:
        sizes = [f"{x.shape[3]}x{x.shape[2]}" for x in (images_N3HW, reference.images_N3HW)]
        raise InputError(
            f"The images are {sizes[0]}, the reference {reference.name} is {sizes[1]}.", "Give a fitting --reference, or resize first."
        )


def measure(
    images_N3HW: Tensor,
    reference: Reference,
    metrics: Sequence[str],
    source: FeatureSource,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    options: FidelityOptions | None = None,
    advance: Callable[[int], None] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Metric entries of a record for uint8 NCHW images: ``fid``, ``kid``, ``is``, ``precision``, ``recall``, ``f_score``.

    ``advance(1)`` is called once per image read (samples and reference), ``notice`` with anything that was adapted.
    InputError on unusable input, NumericalError if a value is not finite.
    """
    options = options or FidelityOptions()
    check_measurable(metrics, len(images_N3HW), reference, source, options)
    check_sizes(images_N3HW, reference)
    images_N3HW = images_N3HW[keyed_permutation(len(images_N3HW), options.seed)]
    job = _Job(images_N3HW, reference, source, torch.device(device), batch_size, options, advance)
    found = {}
    with job.on_device():
        through_library = [m for m in metrics if not (m == "fid" and reference.mu_D is not None)]
        if through_library:
            found |= job.library_metrics(through_library, notice)
        entries = []
        builders = {"fid": job.fid_entries, "kid": job.kid_entries, "is": job.inception_score_entries, "prc": job.prc_entries}
        for metric in metrics:
            entries += builders[metric](found)
    for entry in entries:
        if not np.isfinite(entry["value"]):
            raise NumericalError(f"{entry['name']} is not finite ({entry['value']}).", "Look at the images; most are probably constant.")
    return entries


class _Job:
    """One call of ``measure``: the arguments torch-fidelity needs, and how its results become entries of the record."""

    def __init__(self, images_N3HW, reference, source, device, batch_size, options, advance):
        self.reference, self.source, self.device, self.options = reference, source, device, options
        self.num = len(images_N3HW)
        has_images = reference.images_N3HW is not None
        self.arguments = {
            "input1": _Images(images_N3HW, advance),
            "input2": _Images(reference.images_N3HW, advance) if has_images else None,
            "input1_cache_name": f"samples-{images_sha256(images_N3HW)[:32]}-{source.sha256[:32]}",
            "input2_cache_name": f"reference-{reference.images_sha256[:32]}-{source.sha256[:32]}" if has_images else None,
            "cache_root": _feature_cache(),
            "feature_extractor": source.extractor,
            "feature_extractor_weights_path": None if source.weights is None else str(source.weights),
            "cuda": device.type == "cuda",
            "batch_size": batch_size,
            "save_cpu_ram": True,  # no worker processes, and precision/recall in parts
            "samples_shuffle": False,  # done before, keyed
            "rng_seed": options.seed % 2**32,
            "verbose": False,
        }

    def on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def library_metrics(self, metrics: Sequence[str], notice: Callable[[str], None]) -> dict[str, float]:
        """torch-fidelity's own result for these metrics."""
        flags = {{"is": "isc"}.get(metric, metric): True for metric in metrics}
        sizes = {"isc_splits": self.is_splits, "prc_neighborhood": self.options.prc_neighborhood, "prc_batch_size": 2000}
        if "kid" in metrics:
            sizes |= {"kid_subsets": self.options.kid_subsets, "kid_subset_size": self.kid_subset_size}
            if self.kid_subset_size < self.options.kid_subset_size:
                notice(f"kid: subsets of {self.kid_subset_size} images, as there are no more (asked for {self.options.kid_subset_size}).")
        arguments = self.arguments | ({"input2": None} if list(metrics) == ["is"] else {})  # needs no reference: do not extract it
        try:
            return torch_fidelity().calculate_metrics(**arguments, **flags, **sizes)
        except (RuntimeError, ValueError) as error:
            raise _translated(error, self.source) from error

    @property
    def is_splits(self) -> int:
        return max(1, self.num // IS_SPLIT_SIZE)

    @property
    def kid_subset_size(self) -> int:
        return min(self.options.kid_subset_size, self.num, self.reference.num_images)

    def features(self, which: int) -> Tensor:
        """Features of the samples (1) or the reference (2) as torch-fidelity extracts them (remembered from the metrics' own pass)."""
        utils = torch_fidelity().utils
        layer = self.source.layers["fid"]
        extractor = utils.create_feature_extractor(self.source.extractor, [layer], **_without(self.arguments, "feature_extractor"))
        return utils.extract_featuresdict_from_input_id_cached(which, extractor, **self.arguments)[layer]

    def entry(self, name: str, value: float, metric: str, **more) -> dict:
        protocol = f"{metric}/{self.source.name}/{self.source.layers[metric]}"
        enough = self.num >= self.options.comparable_min_images
        return {
            "name": name,
            "value": float(value),
            "n": self.num,
            "protocol": protocol,
            "reference": self.reference.name,
            "reference_sha256": self.reference.images_sha256,
            "reference_n": self.reference.num_images,
            "comparable": enough and not self.source.is_toy,
            "features": self.source.name,
            "features_sha256": self.source.sha256,
            **more,
        }

    def fid_entries(self, found: dict[str, float]) -> list[dict]:
        stored = self.reference.mu_D is not None
        if stored:
            return [
                self.entry("fid", self._fid_to_statistics(), "fid", reference_sha256=self.reference.statistics_sha256, reference_n=None)
            ]
        more = {}
        value = found["frechet_inception_distance"]
        if self.source.is_toy and self.options.bootstrap:
            statistics = gaussian(self.features(2))
            more["ci95"] = bootstrap_interval(self.features(1), statistics, value, self.options.bootstrap, self.options.seed)
        return [self.entry("fid", value, "fid", **more)]

    def _fid_to_statistics(self) -> float:
        statistics = dict(zip(("mu", "sigma"), gaussian(self.features(1)), strict=True))
        stored = {"mu": self.reference.mu_D, "sigma": self.reference.sigma_DD}
        metric_fid = importlib.import_module("torch_fidelity.metric_fid")
        return metric_fid.fid_statistics_to_metric(statistics, stored, False)["frechet_inception_distance"]

    def kid_entries(self, found: dict[str, float]) -> list[dict]:
        more = {"std": found["kernel_inception_distance_std"], "subsets": self.options.kid_subsets, "subset_size": self.kid_subset_size}
        if self.source.is_toy:
            more["feature_scale"] = KID_SCALE
        return [self.entry("kid", found["kernel_inception_distance_mean"], "kid", **more)]

    def inception_score_entries(self, found: dict[str, float]) -> list[dict]:
        none = {"reference": None, "reference_sha256": None, "reference_n": None}
        std = found["inception_score_std"] if self.is_splits > 1 else None
        return [self.entry("is", found["inception_score_mean"], "is", std=std, splits=self.is_splits, **none)]

    def prc_entries(self, found: dict[str, float]) -> list[dict]:
        more = {"neighborhood": self.options.prc_neighborhood}
        return [self.entry(name, found[name], "prc", **more) for name in ("precision", "recall", "f_score")]


@functools.cache
def _feature_cache_dir() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="arsp-features-", ignore_cleanup_errors=True)


def _feature_cache() -> str:
    """Where torch-fidelity keeps features between the metrics of this process; removed when the process ends."""
    return _feature_cache_dir().name


def _without(arguments: dict, *keys: str) -> dict:
    return {key: value for key, value in arguments.items() if key not in keys}


def _translated(error: Exception, source: FeatureSource) -> Exception:
    """A weights file that torch-fidelity's network refuses is bad input; everything else stays what it is."""
    if "state_dict" in str(error) and source.weights is not None:
        return InputError(f"{source.weights} does not fit the {source.name} network.", f"Expected the file {INCEPTION_FILE}.")
    return error


def progress_total(num_images: int, reference: Reference) -> int:
    """How often ``measure`` calls ``advance`` at most."""
    return num_images + (reference.num_images or 0)
