"""Bundles of a few thousand random weights, made in milliseconds: 8x8 pixels, 4x4 codes of 16, three classes."""

from dataclasses import asdict
from pathlib import Path

import torch

from arsp.models.llamagen import GPT, GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.tokenizers.llamagen_vq import VQConfig, VQModel
from arsp.zoo.bundle import save_bundle

VQ = VQConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=32, codebook_size=16, codebook_embed_dim=4, image_size=8)
GPT_CONFIG = GPTConfig(dim=16, n_layer=1, n_head=2, vocab_size=16, block_size=16, num_classes=3, multiple_of=8)
CLASSES = ["ant", "bee", "cat"]
SAMPLING = {"cfg": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 0.95}


def _noisy(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


def vq_model(config: VQConfig = VQ, seed: int = 1) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(config).eval()


def gpt_model(config: GPTConfig = GPT_CONFIG, seed: int = 2) -> GPT:
    return _noisy(GPT(config), seed)


def student_model(config: GPTConfig = GPT_CONFIG, code_dim: int = 4, seed: int = 3) -> LlamaGenStudent:
    return _noisy(LlamaGenStudent(config, code_dim), seed)


def plain(config: VQConfig) -> dict:
    return {**asdict(config), "ch_mult": list(config.ch_mult)}


def tokenizer_bundle(path: Path) -> Path:
    return save_bundle(path, family="llamagen", kind="tokenizer", config=plain(VQ), model=vq_model().state_dict())


def teacher_bundle(path: Path, **more) -> Path:
    return save_bundle(
        path,
        family="llamagen",
        kind="teacher",
        config=asdict(GPT_CONFIG),
        model=gpt_model().state_dict(),
        tokenizer={"config": plain(VQ)},
        tokenizer_weights=vq_model().state_dict(),
        **{"sampling": SAMPLING, "classes": CLASSES, **more},
    )


def student_bundle(path: Path, teacher: Path | None = None, known: tuple[int, ...] = (0, 5)) -> Path:
    return save_bundle(
        path,
        family="llamagen",
        kind="student",
        config=asdict(GPT_CONFIG),
        model=student_model().state_dict(),
        tokenizer={"config": plain(VQ)},
        tokenizer_weights=vq_model().state_dict(),
        classes=CLASSES,
        code_dim=4,
        known=list(known),
        sampling=SAMPLING,
        teacher=None if teacher is None else str(teacher),
    )
