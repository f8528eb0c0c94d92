"""Parity of the VAR student and its few-step samplers with recorded official outputs."""

from __future__ import annotations

import pytest
import torch

from arsp.decode.few_step import (
    FewStep,
    OfficialPrefixPolicy,
    StudentGenerator,
    TeacherLoopGenerator,
    merge,
    nearest_codes,
    student_pass,
)
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import RampGuidance
from arsp.decode.next_scale import NextScaleDecoder
from arsp.decode.schedule import ScaleStep
from arsp.distill.dd1 import trajectory_point
from arsp.models.attention import DensePolicy
from arsp.models.var import VAR, VARConfig
from arsp.models.var_student import VARStudent
from arsp.protocols import Layout, Request
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import MultiScaleQuantizer, VQVAEConfig

pytestmark = pytest.mark.golden
CASES = find_cases(kind="var_dd")


def config_of(case) -> VARConfig:
    config = case.config
    return VARConfig.from_dict({**case.meta["fixed_config"], **config, "vocab_size": config["V"], "code_dim": config["Cvae"]})


def student_of(case) -> VARStudent:
    student = VARStudent(config_of(case), case.config["Cvae"]).eval()
    student.load_state_dict(case.weights, strict=True)
    return student


def quantizer_of(case) -> MultiScaleQuantizer:
    config, fixed = case.config, case.meta["fixed_config"]
    quantizer = MultiScaleQuantizer(
        VQVAEConfig(
            z_channels=config["Cvae"],
            vocab_size=config["V"],
            patch_nums=tuple(config["patch_nums"]),
            quant_resi=fixed["quant_resi"],
            share_quant_resi=fixed["share_quant_resi"],
            using_znorm=fixed["using_znorm"],
        )  # fmt: skip
    )
    quantizer.load_state_dict({k.removeprefix("quantize."): v for k, v in case.load("vae_quantize").items()}, strict=True)
    return quantizer.eval().requires_grad_(False)


def book_of(case) -> torch.Tensor:
    return case.load("vae_quantize")["quantize.embedding.weight"]


def layout_of(case) -> Layout:
    return Layout.next_scale(tuple(case.config["patch_nums"]))


def known_at(case, scales: torch.Tensor) -> torch.Tensor:
    """Positions of that many leading scales."""
    return torch.tensor([0, *layout_of(case).ends])[scales]


def generator_of(case, scales: tuple[int, ...], split: int) -> StudentGenerator:
    ends = (0, *layout_of(case).ends)
    settings = FewStep(tuple(ends[count] for count in scales), ends[split])
    return StudentGenerator(student_of(case), book_of(case), layout_of(case), settings)


def vectors_of(result, book: torch.Tensor) -> torch.Tensor:
    """What is decoded: of a split behind the last scale, the vectors of the codes."""
    return book[result.codes_BL] if result.embeddings_BLE is None else result.embeddings_BLE


def tolerance(case) -> float:
    return case.meta["tolerance"]["float_abs"]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_forward_with_mixed_numbers_of_known_scales(case):
    io, known = case.io, known_at(case, case.io["in.t_mixed"])
    x = trajectory_point(io["in.codes"], io["in.noise"], known, book_of(case))
    assert_close(x, io["out.fwd.x_t"], abs_tol=1e-6, what="trajectory point")
    logits, vectors = student_of(case)(io["in.labels"], x, known)
    assert_close(logits, io["out.fwd.logits"], abs_tol=tolerance(case), what="logits")
    assert_close(vectors, io["out.fwd.tokens"], abs_tol=tolerance(case), what="continuous head")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_weights_without_the_derived_entries_load_too(case):
    student = VARStudent(config_of(case), case.config["Cvae"])
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    student.load_state_dict({k: v for k, v in case.weights.items() if not k.endswith(derived)}, strict=True)
    assert not any(key.endswith(derived) for key in student.state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_mask_and_levels_equal_the_recorded_buffers(case):
    levels, mask = student_of(case).levels_and_mask(torch.device("cpu"))
    assert_same(levels, case.weights["lvl_1L"][0], "levels")
    assert_same(mask, case.weights["attn_bias_for_masking"] == 0, "mask")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_final_substitution_keeps_known_positions(case):
    io, student = case.io, student_of(case)
    x = io["out.fwd.x_t"]
    for row, known in enumerate(known_at(case, io["in.t_mixed"]).tolist()):
        codes, vectors = student_pass(student, io["in.labels"][row : row + 1], x[row : row + 1], known, book_of(case))
        assert_close(vectors[0], io["out.final.tokens"][row], abs_tol=tolerance(case), what=f"vectors of row {row}")
        assert_same(codes[0], io["out.final.argmax"][row], f"codes of row {row}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["one", "two", "two_split_hi"])
@torch.no_grad()
def test_one_and_two_step_samples(case, name):
    scales = (0,) if name == "one" else (0, case.config["t2"])
    split = case.config["split_hi" if name == "two_split_hi" else "split"]
    result = generator_of(case, scales, split).from_noise(case.io["in.labels"], case.io["in.noise"])
    expected, first = case.io[f"out.sample.{name}"], layout_of(case).ends[split - 1]
    vectors = vectors_of(result, book_of(case))
    assert_close(vectors, expected, abs_tol=tolerance(case), what=f"{name}-step sample")
    assert_same(nearest_codes(expected[:, :first], book_of(case)), result.codes_BL[:, :first], "quantised part")
    f_hat = quantizer_of(case).sum_scales(vectors)
    assert_close(f_hat, case.io[f"out.sample.{name}.fhat"], abs_tol=tolerance(case), what="sum over scales")
    assert result.stats["passes"] == len(scales)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("prefix", "policy"), [("causal", DensePolicy()), ("official", OfficialPrefixPolicy())])
@pytest.mark.parametrize("name", ["mid", "zero"])
@torch.no_grad()
def test_teacher_in_the_loop(case, name, prefix, policy):
    """``official``: the released script's unmasked prefix."""
    config, io, book = case.config, case.io, book_of(case)
    teacher = VAR(config_of(case)).eval()
    teacher.load_state_dict(case.load("teacher"), strict=True)
    K = len(config["patch_nums"])
    decoder = NextScaleDecoder(teacher, quantizer_of(case), RampGuidance(config["cfg"], K), [ScaleStep(teacher, policy=policy)] * K)
    start = config["teacher_start"] if name == "mid" else 0
    student = generator_of(case, (0,), config["split"])
    loop = TeacherLoopGenerator(student, decoder, LogitsPipeline(temperature=0.0), start, config["t2"])
    result = loop.from_noise(Request(torch.arange(len(io["in.labels"])), 0, labels_B=io["in.labels"]), io["in.noise"])
    known = layout_of(case).ends[config["t2"] - 1]
    assert_same(result.codes_BL[:, :known], nearest_codes(io[f"out.combine.{name}.teacher_tokens_{prefix}"], book), "teacher codes")
    vectors = vectors_of(result, book)
    assert_close(vectors, io[f"out.combine.{name}.out_{prefix}"], abs_tol=tolerance(case), what=f"{name} sample")
    f_hat = quantizer_of(case).sum_scales(vectors)
    assert_close(f_hat, io[f"out.combine.{name}.fhat_{prefix}"], abs_tol=tolerance(case), what="sum over scales")
    assert result.stats["passes"] == (start > 0) + config["t2"] - start + 1
    if start:
        first, vectors = student_pass(student.student, io["in.labels"], io["in.noise"], 0, book)
        made = book[nearest_codes(merge(first, vectors, student.split, book), book)]
        assert_close(made, io["out.combine.mid.prefix_tokens"], abs_tol=tolerance(case), what="prefix made by the student")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_teacher_forcing_of_the_teacher(case):
    teacher = VAR(config_of(case)).eval()
    teacher.load_state_dict(case.load("teacher"), strict=True)
    inputs = quantizer_of(case).inputs(case.io["in.codes"])
    assert_close(inputs, case.io["out.teacher.tf_input"], abs_tol=tolerance(case), what="input of the scales")
    assert_close(teacher(case.io["in.labels"], inputs), case.io["out.teacher.tf_logits"], abs_tol=tolerance(case), what="logits")
