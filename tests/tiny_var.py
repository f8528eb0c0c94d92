"""The VAR counterparts of :mod:`tiny_models`: 8x8 pixels, scales of 1, 2 and 4 (21 codes of 16), three classes."""

from dataclasses import asdict
from pathlib import Path

import torch

from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.models.var import VAR, VARConfig
from arsp.models.var_student import VARStudent
from arsp.protocols import Layout
from arsp.sparse.profile import Profile, save_profile, uniform_share
from arsp.sparse.window import empty_windows
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.zoo.bundle import save_bundle
from arsp.zoo.load import ModelSource, stored_sha256

SIDES = (1, 2, 4)
LAYOUT = Layout.next_scale(SIDES)
VQ = VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, vocab_size=16, patch_nums=SIDES)
CONFIG = VARConfig(depth=2, embed_dim=16, num_heads=2, num_classes=3, vocab_size=16, code_dim=4, patch_nums=SIDES)
CLASSES = ["ant", "bee", "cat"]
SAMPLING = {"cfg": 0.5, "temperature": 1.0, "top_k": 0, "top_p": 0.95}


def _noisy(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "scale_mul" not in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


def tokenizer_model(config: VQVAEConfig = VQ, seed: int = 1) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(config).eval().requires_grad_(False)


def var_model(config: VARConfig = CONFIG, seed: int = 2) -> VAR:
    return _noisy(VAR(config), seed)


def student_model(config: VARConfig = CONFIG, seed: int = 3) -> VARStudent:
    return _noisy(VARStudent(config, config.code_dim), seed)


def decoder(cfg: float = 0.5) -> NextScaleDecoder:
    return NextScaleDecoder(var_model(), tokenizer_model().quantize, RampGuidance(cfg, len(SIDES)))


def plain(config: VARConfig | VQVAEConfig) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def tokenizer_bundle(path: Path, vq: VQVAEConfig = VQ) -> Path:
    return save_bundle(path, family="var", kind="tokenizer", config=plain(vq), model=tokenizer_model(vq).state_dict())


def teacher_bundle(
    path: Path, config: VARConfig = CONFIG, seed: int = 2, vq: VQVAEConfig = VQ, tokenizer_seed: int = 1, **more: object
) -> Path:
    return save_bundle(
        path,
        family="var",
        kind="teacher",
        config=plain(config),
        model=var_model(config, seed).state_dict(),
        tokenizer={"config": plain(vq)},
        tokenizer_weights=tokenizer_model(vq, tokenizer_seed).state_dict(),
        **{"sampling": SAMPLING, "classes": CLASSES, **more},
    )


def student_bundle(path: Path, teacher: Path | None = None, known: tuple[int, ...] = (0, 5)) -> Path:
    return save_bundle(
        path,
        family="var",
        kind="student",
        config=plain(CONFIG),
        model=student_model().state_dict(),
        tokenizer={"config": plain(VQ)},
        tokenizer_weights=tokenizer_model().state_dict(),
        classes=CLASSES,
        code_dim=4,
        known=list(known),
        sampling=SAMPLING,
        teacher=None if teacher is None else str(teacher),
    )


def profile_bundle(path: Path, source: ModelSource, radius: int | None = None, **changes: object) -> Path:
    """A LiteVAR profile of a model: the last scale sees windows of ``radius`` of itself (None: everything is dense), guidance halves
    share the map everywhere; ``changes``: other fields."""
    config, sides = source.config, tuple(source.config["patch_nums"])
    win = empty_windows(len(sides), config["depth"], config["num_heads"])
    if radius is not None:
        win[:, :, -1, -1] = radius
    share = uniform_share("map", config["depth"], len(sides))
    fields = dict(model=source.name, fingerprint=stored_sha256(source), patch_nums=sides, win=win, share=share)
    return save_profile(path, Profile(**{**fields, **changes}))
