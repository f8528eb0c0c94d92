"""Names, bundles and official files -> loaded models. Everything about a model that needs no weights comes from :func:`resolve`."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from arsp.decode.few_step import default_second_step
from arsp.decode.guidance import Guidance, RampGuidance
from arsp.errors import ConfigError, InputError, nearest
from arsp.protocols import Capabilities, Decoder, Layout
from arsp.registry import Registry
from arsp.runs import cache_root, sha256_file
from arsp.zoo import bundle
from arsp.zoo.families import LLAMAGEN, Family

TINY = Path(__file__).parent / "tiny"
FAMILIES = Registry("families")


@dataclass(frozen=True)
class ModelSource:
    """What is known of a model before its weights are read."""

    name: str
    family: Family
    kind: str  # "teacher" | "student" | "tokenizer" | "features"
    config: dict[str, Any]
    card: dict[str, Any]
    path: Path | None  # bundle directory or official file; None: no weights here
    origin: str  # "embedded" | "official" | "bundle" | "file"
    tokenizer: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How tables call it: the name, without the folders of a path."""
        return Path(self.name).name if self.origin in ("bundle", "file") else self.name

    @property
    def capabilities(self) -> Capabilities:
        condition = "text" if self.config.get("model_type") == "t2i" else "class"
        teacher, raster = self.kind == "teacher", self.layout.is_raster
        order = "raster" if raster else "next-scale"
        return Capabilities(order, frozenset({condition}), rewind=teacher and raster, codebook=True, teacher=teacher)

    @property
    def layout(self) -> Layout:
        return self.family.layout(self.config)

    @property
    def tokenizer_identity(self) -> str | None:
        """What tells this model's tokenizer from others without loading it; None when it has none."""
        if "bundle" in self.tokenizer:
            return self.tokenizer["bundle"]
        if self.path is not None and self.path.is_dir():
            return bundle.read_manifest(self.path)["sha256"].get("tokenizer.safetensors")
        named = self.card.get("files", {}).get("tokenizer")
        return named or (self.tokenizer.get("file") and str(Path(self.tokenizer["file"]).resolve()))


@dataclass
class LoadedModel:
    """A model on its device: module, tokenizer, and where it came from."""

    source: ModelSource
    module: nn.Module
    tokenizer: nn.Module | None
    sha256: str | None  # of the weights file; None for random weights

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def codebook_VE(self) -> torch.Tensor:
        """Codebook vectors that the tokenizer's decoder sees, float32."""
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer, and this needs its codebook.", "Give --tokenizer FILE.")
        return self.tokenizer.codebook_VE.detach().float()

    def decoder(self, guidance: Guidance | RampGuidance, steps: Any = None) -> Decoder:
        """Bound to a guidance; ``steps``: the loaded rows of a schedule (next-scale models)."""
        if self.tokenizer is None and not self.source.layout.is_raster:
            raise InputError(f"{self.name} cannot run without its tokenizer: its input is made of decoded codes.", "Give --tokenizer FILE.")
        return self.source.family.decoder(self.module, self.tokenizer, guidance, steps)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def weight_bytes(self) -> int:
        """Of the parameters and of what integer layers hold in their place."""
        return module_bytes(self.module)


def tokenizer_entry(model: LoadedModel) -> dict[str, Any]:
    """What a bundle made of ``model`` says of its tokenizer (arguments of ``save_bundle``): an embedded one by name, others as a copy."""
    if "bundle" in model.source.tokenizer or model.tokenizer is None:
        return {"tokenizer": model.source.tokenizer if model.tokenizer is not None else None}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.tokenizer.config).items()}
    return {"tokenizer": {"config": config}, "tokenizer_weights": model.tokenizer.state_dict()}


def module_bytes(module: nn.Module) -> int:
    """Bytes of everything a module keeps: parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


@functools.cache
def cards() -> dict[str, dict[str, Any]]:
    """All cards by name (the package's cards.yaml)."""
    return yaml.safe_load((Path(__file__).parent / "cards.yaml").read_text())


def card_names() -> list[str]:
    return list(cards())


def resolve(name: str, *, tokenizer: str | None = None) -> ModelSource:
    """Describe ``name``: a card, a bundle directory, a run directory holding one, or an official file. Reads no weights except
    an official file's shapes. Raises ConfigError for an unknown name, InputError for an unusable path."""
    if name in cards():
        return _from_card(name, cards()[name], tokenizer)
    path = Path(name)
    if path.is_dir():
        inner = path if (path / bundle.MANIFEST).exists() or not (path / "bundle").is_dir() else path / "bundle"
        return _from_bundle(inner, name, {}, "bundle", tokenizer)
    if path.is_file():
        return _from_file(path, tokenizer)
    if os.sep in name or path.suffix:
        raise InputError(f"model '{name}': no such file or directory.", "See: arsp models ls")
    raise ConfigError(f"unknown model '{name}'.", nearest(name, card_names()))


def load_model(
    name: str | ModelSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: str | None = None,
    random_weights: bool = False,
    with_tokenizer: bool = True,
) -> LoadedModel:
    """Build and fill a model. ``random_weights`` needs no file (for cost measurements; images are noise)."""
    source = resolve(name, tokenizer=tokenizer) if isinstance(name, str) else name
    if source.kind not in ("teacher", "student"):
        raise ConfigError(f"{source.name} is of kind '{source.kind}', it generates nothing.", "See: arsp models ls")
    if random_weights and "quantization" in source.card:
        raise ConfigError(f"{source.name} is quantised: random weights have no integers.", "Use its base model with --apply w4a8.")
    digest = None
    vq = _load_tokenizer(source, random_weights) if with_tokenizer else None
    if random_weights:
        module = _random(source, device)
    else:
        weights, digest = _weights(source)
        module = _fill(source, weights, dtype)
    if vq is not None:
        vq = vq.to(device).eval().requires_grad_(False)
    if vq is not None and source.config["vocab_size"] != vq.codebook_VE.shape[0]:
        raise ConfigError(
            f"{source.name} predicts {source.config['vocab_size']} codes, its tokenizer has {vq.codebook_VE.shape[0]}.",
            "Give the tokenizer it was trained with.",
        )
    if vq is not None and source.kind == "student" and source.card["code_dim"] != vq.codebook_VE.shape[1]:
        raise ConfigError(
            f"{source.name} works on {source.card['code_dim']}-vectors, its tokenizer on {vq.codebook_VE.shape[1]}-vectors.",
            "Give the tokenizer it was trained with.",
        )
    return LoadedModel(source, module.to(device=device, dtype=dtype).eval().requires_grad_(False), vq, digest)


def resolve_tokenizer(name: str) -> ModelSource:
    """Like :func:`resolve`, but embedded tokenizers are known by name too."""
    packaged = Path(name).name == name and (TINY / name / bundle.MANIFEST).is_file()
    return _from_bundle(TINY / name, name, {}, "embedded") if packaged and name not in cards() else resolve(name)


def load_tokenizer(name: str) -> nn.Module:
    """A tokenizer alone, from a tokenizer bundle or an embedded name."""
    source = resolve_tokenizer(name)
    if source.kind == "features":
        raise InputError(f"{name} is a feature network, not a tokenizer.")
    if source.kind != "tokenizer":
        vq = _load_tokenizer(source, False)
        if vq is None:
            raise InputError(f"{name} has no tokenizer.")
        return vq
    weights = bundle.load_weights(source.path, "model.safetensors", bundle.read_manifest(source.path))
    return _fill_tokenizer(source.family, source.config, weights, name)


def verify(name: str) -> list[tuple[str, str]]:
    """Check every weights file of a model against its manifest: (file, sha256) pairs. InputError on the first difference."""
    source = resolve(name)
    if source.path is None:
        raise InputError(f"{name}: its weights are not on this machine.", _how_to_get(source))
    if source.path.is_file():
        return [(source.path.name, sha256_file(source.path))]
    manifest = bundle.read_manifest(source.path)
    for file in manifest["sha256"]:
        bundle.load_weights(source.path, file, manifest)
    return sorted(manifest["sha256"].items())


def stored_sha256(source: ModelSource) -> str | None:
    """SHA-256 of a bundle's weights as its manifest says; None for official files and models without weights here."""
    if source.path is None or not source.path.is_dir():
        return None
    return bundle.read_manifest(source.path)["sha256"].get("model.safetensors")


def _from_card(name: str, card: dict[str, Any], tokenizer: str | None) -> ModelSource:
    if "bundle" in card:
        return _from_bundle(TINY / card["bundle"], name, card, "embedded", tokenizer)
    family: Family = FAMILIES.get(card["family"])
    config = family.complete({**family.variants[card["variant"]], **card["config"]})
    vq = {
        "config": family.fit_tokenizer(family.tokenizers[card["tokenizer"]], config),
        "file": tokenizer or _cached(card, "tokenizer"),
    }
    return ModelSource(name, family, card["kind"], config, card, _cached(card, "model"), "official", vq)


def _from_bundle(path: Path, name: str, card: dict[str, Any], origin: str, tokenizer: str | None = None) -> ModelSource:
    if tokenizer is not None:
        raise ConfigError(f"--tokenizer {tokenizer}: {name} is a bundle and knows its own.", "Drop it; it belongs to an official GPT file.")
    manifest = bundle.read_manifest(path)
    family: Family = FAMILIES.get(manifest["family"])
    needed = {"teacher": family.required, "student": (*family.required, "code_dim", "known")}.get(manifest["kind"], ())
    missing = [key for key in needed if key not in manifest["config"] and key not in manifest]
    if missing:
        raise InputError(f"{path}: its {bundle.MANIFEST} lacks '{missing[0]}'.", "Make or copy the bundle again.")
    merged = {**{k: v for k, v in manifest.items() if k not in ("config", "sha256")}, **card}
    return ModelSource(name, family, manifest["kind"], manifest["config"], merged, path, origin, manifest.get("tokenizer") or {})


def _from_file(path: Path, tokenizer: str | None) -> ModelSource:
    from arsp.zoo.convert import detect_family

    family: Family = FAMILIES.get(detect_family(path) or "llamagen")
    _, config = family.read_official(path)
    if family is LLAMAGEN and "block_size" not in config:
        raise InputError(
            f"{path}: the resolution is not in the file; its name should say 256, 384 or 512.",
            "Rename it like the released files, e.g. c2i_B_256.pt",
        )
    student = config.get("student", False)
    card: dict[str, Any] = {"about": f"official layout file {path.name}", "kind": "student" if student else "teacher"}
    if student:
        card |= {"code_dim": config["code_dim"], "known": [0, default_second_step(family.layout(config))]}
    elif family is LLAMAGEN:
        card["sampling"] = {"cfg": 2.0 if config["model_type"] == "c2i" else 7.5}
    else:
        card["sampling"] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    return ModelSource(path.stem, family, card["kind"], family.complete(config), card, path, "file", {"file": tokenizer, "config": None})


def _cached(card: dict[str, Any], which: str) -> Path | None:
    """An official file in ``$ARSP_CACHE/checkpoints`` or in the Hugging Face cache."""
    files = card.get("files")
    if not files:
        return None
    local = cache_root() / "checkpoints" / files[which]
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(files.get(f"{which}_repo", files["repo"]), files[which])
    return Path(found) if isinstance(found, str) else None


def _how_to_get(source: ModelSource) -> str:
    files = source.card.get("files")
    if not files:
        return "No checkpoint of it was ever released; arsp bench --random-weights measures its cost."
    folder = cache_root() / "checkpoints"
    tokenizer = files["tokenizer"] + (f" (of {files['tokenizer_repo']})" if "tokenizer_repo" in files else "")
    return f"Put {files['model']} and {tokenizer} of huggingface.co/{files['repo']} into {folder}, or give the file as --model."


def build_module(source: ModelSource) -> nn.Module:
    """The network of a teacher or student, its weights not filled."""
    if source.kind == "student":
        return source.family.build_student(source.config, source.card["code_dim"])
    return source.family.build(source.config)


def _fill(source: ModelSource, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """The module with these weights; of a quantised bundle with integer layers, or rounding simulated."""
    from arsp.quant import store

    where = f"{source.name} ({source.path})"
    with torch.device("meta"):
        module = build_module(source)
    block = store.check(source.card["quantization"], where) if "quantization" in source.card else None
    if block and not store.is_simulated(block):
        store.install_from(module, block, weights, dtype, where)
    module.to_empty(device="cpu")
    bundle.load_into(module, {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, where)
    if store.is_simulated(block):
        store.simulate_from(module, block, where)
    return module.to(dtype)


def _random(source: ModelSource, device: torch.device | str) -> nn.Module:
    """Drawn on the device itself: billions of numbers take minutes on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        module = build_module(source)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02)
    return module


def _weights(source: ModelSource) -> tuple[dict[str, torch.Tensor], str]:
    if source.path is None:
        raise InputError(f"the weights of {source.name} are not on this machine.", _how_to_get(source))
    if source.path.is_file():
        return source.family.read_official(source.path)[0], sha256_file(source.path)
    manifest = bundle.read_manifest(source.path)
    return bundle.load_weights(source.path, "model.safetensors", manifest), manifest["sha256"]["model.safetensors"]


def _load_tokenizer(source: ModelSource, random_weights: bool) -> nn.Module | None:
    spec = source.tokenizer
    if "bundle" in spec:
        return load_tokenizer(spec["bundle"])
    if spec.get("config") and source.path is not None and source.path.is_dir():
        weights = bundle.load_weights(source.path, "tokenizer.safetensors", bundle.read_manifest(source.path))
        return _fill_tokenizer(source.family, spec["config"], weights, str(source.path))
    if random_weights and spec.get("config"):
        return source.family.build_tokenizer(spec["config"])
    if spec.get("file"):
        weights, config = source.family.read_official_tokenizer(Path(spec["file"]), source.config)
        return _fill_tokenizer(source.family, source.family.fit_tokenizer(config, source.config), weights, str(spec["file"]))
    if source.origin == "official" and not random_weights:
        raise InputError(f"the tokenizer of {source.name} is not on this machine.", _how_to_get(source))
    return None


def _fill_tokenizer(family: Family, config: dict[str, Any], weights: dict[str, torch.Tensor], where: str) -> nn.Module:
    return bundle.load_into(
        family.build_tokenizer(config).float(), {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, where
    ).eval()
