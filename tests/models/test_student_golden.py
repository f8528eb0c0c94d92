"""Parity of the DD1 student and its few-step samplers with recorded official outputs."""

from __future__ import annotations

import pytest
import torch

from arsp.decode.decoder import RasterDecoder
from arsp.decode.few_step import FewStep, StudentGenerator, TeacherLoopGenerator, nearest_codes, student_pass
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.distill.dd1 import trajectory_point
from arsp.models.llamagen import GPT, GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.protocols import Layout, Request
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same

pytestmark = pytest.mark.golden
CASES = find_cases(kind="llamagen_dd")


def config_of(case) -> GPTConfig:
    return GPTConfig.from_dict({**case.config, "token_dropout_p": 0.0})


def student_of(case) -> LlamaGenStudent:
    student = LlamaGenStudent(config_of(case), case.config["codebook_dim"]).eval()
    student.load_state_dict({k: v for k, v in case.weights.items() if k != "freqs_cis"}, strict=True)
    return student


def generator_of(case, known: tuple[int, ...], split: int) -> StudentGenerator:
    side = config_of(case).side
    return StudentGenerator(student_of(case), case.io["in.codebook"], Layout.raster(side, side), FewStep(known, split))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_forward_with_mixed_numbers_of_known_tokens(case):
    io, tol = case.io, case.meta["tolerance"]["float_abs"]
    x = trajectory_point(io["in.codes"], io["in.noise"], io["in.t_mixed"], io["in.codebook"])
    assert_close(x, io["out.fwd.x_t"], abs_tol=1e-6, what="trajectory point")
    logits, vectors = student_of(case)(io["in.labels"], x, io["in.t_mixed"])
    assert_close(logits, io["out.fwd.logits"], abs_tol=tol, what="logits")
    assert_close(vectors, io["out.fwd.tokens"], abs_tol=tol, what="continuous head")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_final_substitution_keeps_known_positions(case):
    io, student = case.io, student_of(case)
    x = io["out.fwd.x_t"]
    for row, known in enumerate(io["in.t_mixed"].tolist()):
        codes, vectors = student_pass(student, io["in.labels"][row : row + 1], x[row : row + 1], known, io["in.codebook"])
        assert_close(vectors[0], io["out.final.tokens"][row], abs_tol=case.meta["tolerance"]["float_abs"], what=f"vectors of row {row}")
        assert_same(codes[0], io["out.final.argmax"][row], f"codes of row {row}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["one", "two", "two_split_lt"])
def test_one_and_two_step_samples(case, name):
    config, tol = case.config, case.meta["tolerance"]["float_abs"]
    known = (0,) if name == "one" else (0, config["t2"])
    split = config["t2"] if name == "two_split_lt" else config["split"]
    result = generator_of(case, known, split).from_noise(case.io["in.labels"], case.io["in.noise"])
    expected = case.io[f"out.sample.{name}"]
    assert_close(result.embeddings_BLE, expected, abs_tol=tol, what=f"{name}-step sample")
    assert_same(
        nearest_codes(result.embeddings_BLE[:, :split], case.io["in.codebook"]), nearest_codes(expected[:, :split], case.io["in.codebook"])
    )
    assert result.stats["passes"] == len(known)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["mid", "zero"])
def test_teacher_in_the_loop(case, name):
    config, io, tol = case.config, case.io, case.meta["tolerance"]["float_abs"]
    teacher = GPT(config_of(case)).eval()
    teacher.load_state_dict(case.load("teacher"), strict=True)
    decoder = RasterDecoder(teacher, Guidance(config["cfg"]))
    start = config["teacher_start"] if name == "mid" else 0
    loop = TeacherLoopGenerator(generator_of(case, (0,), config["split"]), decoder, LogitsPipeline(temperature=0.0), start, config["t2"])
    request = Request(torch.arange(len(io["in.labels"])), 0, labels_B=io["in.labels"])
    result = loop.from_noise(request, io["in.noise"])
    assert_same(result.codes_BL[:, : config["t2"]], io[f"out.combine.{name}.ids"], "prefix and teacher tokens")
    assert_close(result.embeddings_BLE, io[f"out.combine.{name}.out"], abs_tol=tol, what=f"{name} sample")
    guided = decoder.teacher_forced(request, result.codes_BL)[:, start : config["t2"]]
    assert_close(guided, io[f"out.combine.{name}.cfg_logits"], abs_tol=2 * tol, rel_tol=1e-4, what="guided teacher logits")
    assert result.stats["passes"] == (start > 0) + config["t2"] - start + 1
