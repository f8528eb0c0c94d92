"""The VAR counterparts of :mod:`tiny_models`: 8x8 pixels, scales of 1, 2 and 4 (21 codes of 16), three classes."""

from dataclasses import asdict
from pathlib import Path

import torch

from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.models.var import VAR, VARConfig
from arsp.models.var_student import VARStudent
from arsp.protocols import Layout
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.zoo.bundle import save_bundle

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


def tokenizer_bundle(path: Path) -> Path:
    return save_bundle(path, family="var", kind="tokenizer", config=plain(VQ), model=tokenizer_model().state_dict())


def teacher_bundle(path: Path, **more) -> Path:
    return save_bundle(
        path,
        family="var",
        kind="teacher",
        config=plain(CONFIG),
        model=var_model().state_dict(),
        tokenizer={"config": plain(VQ)},
        tokenizer_weights=tokenizer_model().state_dict(),
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
