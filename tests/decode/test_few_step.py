"""Few-step sampling: what each pass of the student is given, what is returned, and the teacher in the loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arsp.decode.ar import sample_ar
from arsp.decode.decoder import RasterDecoder
from arsp.decode.few_step import (
    FewStep,
    StudentGenerator,
    TeacherLoopGenerator,
    default_second_step,
    merge,
    nearest_codes,
    parse_teacher_range,
    request_noise,
    step_counts,
    student_pass,
)
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.errors import ConfigError
from arsp.models.llamagen import GPT, GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.protocols import Generator, Layout, Request
from arsp.testing.tolerance import assert_close, assert_same

L, V, E, CLASSES = 16, 12, 4, 5
LAYOUT = Layout.raster(4, 4)
CONFIG = GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=V, block_size=L, num_classes=CLASSES, multiple_of=16)
BOOK = torch.randn(V, E, generator=torch.Generator().manual_seed(3))


class Recorder(nn.Module):
    """Student stub: the logits favour the code after the input's nearest one, vectors are the input plus 0.25; calls are kept."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, labels_B, x_BLE, known_B):
        self.calls.append((labels_B.clone(), x_BLE.clone(), known_B.clone()))
        wanted = (nearest_codes(x_BLE, BOOK) + 1) % V
        return nn.functional.one_hot(wanted, V).float(), x_BLE + 0.25


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.fixture(scope="module")
def student():
    return randomised(LlamaGenStudent(CONFIG, E))


@pytest.fixture(scope="module")
def teacher():
    return randomised(GPT(CONFIG))


def request(ids, seed=7):
    ids = torch.as_tensor(ids)
    return Request(ids, seed, labels_B=ids % CLASSES)


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [FewStep(), FewStep((0, 5)), FewStep((0, 5, 15), 16), FewStep((0,), 0), FewStep((0,), 7)])
def test_ascending_counts_from_zero_are_accepted(settings):
    settings.check(LAYOUT)


@pytest.mark.parametrize(
    "settings", [FewStep(()), FewStep((1,)), FewStep((0, 0)), FewStep((0, 6, 5)), FewStep((0, 16)), FewStep((0,), -2), FewStep((0,), 17)]
)
def test_other_counts_and_splits_are_refused(settings):
    with pytest.raises(ConfigError, match="student steps|split"):
        StudentGenerator(Recorder(), BOOK, LAYOUT, settings)


def test_student_steps_become_the_counts_it_was_trained_for():
    assert step_counts(1, [5]) == (0,) == step_counts(1, [])
    assert step_counts(2, [5]) == (0, 5)
    for steps, trained in ((2, []), (3, [5]), (0, [5])):
        with pytest.raises(ConfigError, match=f"student steps {steps}"):
            step_counts(steps, trained)


@pytest.mark.parametrize(("text", "expected"), [("61-81", (60, 80)), ("1-81", (0, 80)), ("1-2", (0, 1)), ("1-256", (0, 255))])
def test_published_range_names_count_from_one_and_exclude_the_end(text, expected):
    assert parse_teacher_range(text, Layout.raster(16, 16)) == expected


@pytest.mark.parametrize("text", ["", "5", "a-b", "81-61", "5-5", "0-4", "1-257", "1-2-3", "1.5-3"])
def test_other_range_names_are_refused(text):
    with pytest.raises(ConfigError, match="teacher range"):
        parse_teacher_range(text, Layout.raster(16, 16))


@pytest.mark.parametrize(("layout", "second"), [(Layout.raster(16, 16), 80), (Layout.raster(4, 4), 5), (Layout.raster(1, 2), 1)])
def test_the_second_step_of_a_raster_stands_at_the_published_share(layout, second):
    assert default_second_step(layout) == second


# -- noise ------------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_sample_and_position_only():
    whole = request_noise(request(range(9)), L, E)
    assert whole.shape == (9, L, E) and whole.dtype == torch.float32
    assert torch.equal(request_noise(request([6, 2]), L, E), whole[[6, 2]]), "the batch changes the noise"
    assert torch.equal(request_noise(request(range(9)), 5, E), whole[:, :5]), "the length of the sequence changes the noise"
    relabelled = Request(torch.arange(9), 7, labels_B=torch.zeros(9, dtype=torch.int64))
    assert torch.equal(request_noise(relabelled, L, E), whole), "the class changes the noise"


def test_noise_of_other_seeds_samples_positions_and_components_differs():
    noise = torch.cat((request_noise(request(range(50)), L, E), request_noise(request(range(50), seed=8), L, E)))
    assert noise.unique().numel() > 0.999 * noise.numel()


def test_noise_is_standard_normal():
    """160 000 normals: mean and variance within 5 standard errors (false alarm 1e-6; the seed is fixed)."""
    noise = request_noise(request(range(2500)), L, E).double().flatten()
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / n**0.5, noise.mean().item()
    assert abs(noise.var().item() - 1) < 5 * (2 / n) ** 0.5, noise.var().item()


# -- the student alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [(0,), (0, 5)])
def test_one_network_pass_a_step_is_made_and_counted(known):
    stub, calls = Recorder(), []
    out = StudentGenerator(stub, BOOK, LAYOUT, FewStep(known)).generate(request(range(3)), calls.append)
    assert len(stub.calls) == len(calls) == out.stats["passes"] == len(known)
    assert out.stats["tokens_per_pass"] == L / len(known)
    assert [set(call[2].tolist()) for call in stub.calls] == [{count} for count in known]
    assert all(torch.equal(call[0], request(range(3)).labels_B) for call in stub.calls)


def test_it_is_a_generator_that_is_no_teacher():
    generator = StudentGenerator(Recorder(), BOOK, LAYOUT, FewStep())
    assert isinstance(generator, Generator) and generator.capabilities.teacher is False and generator.capabilities.order == "raster"


def test_the_second_pass_sees_final_codes_and_the_original_noise_behind_them():
    stub = Recorder()
    generator, wanted = StudentGenerator(stub, BOOK, LAYOUT, FewStep((0, 5))), request(range(3))
    noise = request_noise(wanted, L, E)
    first = StudentGenerator(Recorder(), BOOK, LAYOUT, FewStep()).generate(wanted).codes_BL
    out = generator.generate(wanted)
    assert torch.equal(stub.calls[0][1], noise)
    second = stub.calls[1][1]
    assert torch.equal(second[:, :5], BOOK[first[:, :5]]), "known positions do not hold the codebook vectors of the first pass"
    assert torch.equal(second[:, 5:], noise[:, 5:]), "the noise behind the known positions is not the original one"
    assert_same(out.codes_BL[:, :5], first[:, :5], "codes kept by the second pass")
    assert_same(out.codes_BL[:, 5:], (nearest_codes(noise[:, 5:], BOOK) + 1) % V, "codes made by the second pass")


def test_a_student_that_copies_what_it_knows_is_not_asked_about_it():
    noise = request_noise(request([0, 1]), L, E)
    x = torch.cat((BOOK[torch.tensor([[4, 1], [0, 11]])], noise[:, 2:]), dim=1)
    codes, vectors = student_pass(Recorder(), torch.tensor([0, 1]), x, 2, BOOK)
    assert codes[:, :2].tolist() == [[4, 1], [0, 11]] and torch.equal(vectors[:, :2], x[:, :2])
    assert torch.equal(vectors[:, 2:], x[:, 2:] + 0.25)


@pytest.mark.parametrize("split", [-1, L])
def test_without_a_continuous_tail_only_codes_are_returned(split):
    assert StudentGenerator(Recorder(), BOOK, LAYOUT, FewStep((0,), split)).generate(request([0, 1])).embeddings_BLE is None


@pytest.mark.parametrize("split", [0, 5, 15])
def test_vectors_behind_the_split_stay_continuous(split):
    wanted = request(range(3))
    out = StudentGenerator(Recorder(), BOOK, LAYOUT, FewStep((0,), split)).generate(wanted)
    assert torch.equal(out.embeddings_BLE[:, :split], BOOK[out.codes_BL[:, :split]])
    assert torch.equal(out.embeddings_BLE[:, split:], request_noise(wanted, L, E)[:, split:] + 0.25)


def test_a_split_before_the_known_count_hands_continuous_vectors_to_the_second_pass():
    stub, wanted = Recorder(), request(range(2))
    out = StudentGenerator(stub, BOOK, LAYOUT, FewStep((0, 5), 2)).generate(wanted)
    handed = request_noise(wanted, L, E)[:, 2:5] + 0.25
    assert torch.equal(stub.calls[1][1][:, 2:5], handed) and torch.equal(out.embeddings_BLE[:, 2:5], handed)
    assert_same(out.codes_BL[:, 2:5], nearest_codes(handed, BOOK), "codes of continuous known vectors")


def test_nearest_codes_are_the_nearest_rows():
    vectors = torch.randn(200, E, generator=torch.Generator().manual_seed(0))
    assert_same(nearest_codes(vectors, BOOK), torch.cdist(vectors, BOOK).argmin(-1))
    assert_same(nearest_codes(BOOK, BOOK), torch.arange(V))


def test_merging_takes_each_side_of_the_split_from_its_head():
    codes, vectors = torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, E)
    assert torch.equal(merge(codes, vectors, 2, BOOK)[0, :2], BOOK[[1, 2]]) and merge(codes, vectors, 2, BOOK)[0, 2].sum() == 0


@pytest.mark.parametrize("known", [(0,), (0, 5)])
def test_image_i_depends_on_seed_and_i_only(student, known):
    generator = StudentGenerator(student, BOOK, LAYOUT, FewStep(known, 9))
    whole = generator.generate(request(range(6)))
    for ids in ([0], [4, 1], [5, 3, 2]):
        part = generator.generate(request(ids))
        assert_same(part.codes_BL, whole.codes_BL[ids], f"codes of samples {ids}")
        assert_close(part.embeddings_BLE, whole.embeddings_BLE[ids], abs_tol=1e-5, what=f"vectors of samples {ids}")
    assert not torch.equal(generator.generate(request(range(6), seed=8)).codes_BL, whole.codes_BL), "another seed gives the same codes"


# -- the teacher in the loop ------------------------------------------------------------------------------------------------


def loop_of(student, teacher, start, stop, *, cfg=2.0, split=-1, pipeline=None):
    one_step = StudentGenerator(student, BOOK, LAYOUT, FewStep((0,), split))
    return TeacherLoopGenerator(one_step, RasterDecoder(teacher, Guidance(cfg)), pipeline or LogitsPipeline(), start, stop)


@pytest.mark.parametrize(("start", "stop", "student_passes"), [(0, 4, 1), (3, 4, 2), (3, 9, 2)])
def test_passes_of_teacher_and_student_are_counted(student, teacher, start, stop, student_passes):
    stats = loop_of(student, teacher, start, stop).generate(request([0, 1])).stats
    assert stats["teacher_passes"] == stop - start
    assert stats["passes"] == stop - start + student_passes
    assert stats["tokens_per_pass"] == L / stats["passes"]


@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.0])
def test_the_prefix_conditions_the_teacher_with_and_without_guidance(student, teacher, cfg):
    start, stop, wanted = 3, 8, request(range(4))
    loop = loop_of(student, teacher, start, stop, cfg=cfg, pipeline=LogitsPipeline(temperature=0.0))
    codes = loop.generate(wanted).codes_BL
    first = StudentGenerator(student, BOOK, LAYOUT, FewStep()).generate(wanted).codes_BL
    assert_same(codes[:, :start], first[:, :start], "prefix made by the student")
    greedy = RasterDecoder(teacher, Guidance(cfg)).teacher_forced(wanted, codes).argmax(-1)
    assert_same(codes[:, start:stop], greedy[:, start:stop], "teacher codes after this prefix")
    other = torch.cat(((first[:, :start] + 1) % V, codes[:, start:]), dim=1)
    elsewhere = RasterDecoder(teacher, Guidance(cfg)).teacher_forced(wanted, other).argmax(-1)
    assert not torch.equal(elsewhere[:, start:stop], greedy[:, start:stop]), "this teacher ignores its prefix: the test shows nothing"


def test_from_the_first_position_the_teacher_draws_what_it_draws_alone(student, teacher):
    wanted, pipeline = request(range(5)), LogitsPipeline(top_k=6)
    codes = loop_of(student, teacher, 0, 6, pipeline=pipeline).generate(wanted).codes_BL
    alone = sample_ar(RasterDecoder(teacher, Guidance(2.0)), wanted, pipeline=pipeline).codes_BL
    assert_same(codes[:, :6], alone[:, :6], "teacher codes")


def test_the_last_pass_keeps_the_teacher_codes_and_sees_the_original_noise(teacher):
    stub, wanted = Recorder(), request(range(3))
    out = loop_of(stub, teacher, 2, 6, split=10).generate(wanted)
    noise = request_noise(wanted, L, E)
    _, x, known = stub.calls[-1]
    assert set(known.tolist()) == {6} and torch.equal(x[:, 6:], noise[:, 6:])
    assert torch.equal(x[:, :6], BOOK[out.codes_BL[:, :6]])
    assert torch.equal(out.embeddings_BLE[:, :10], BOOK[out.codes_BL[:, :10]]), "known and quantised part"
    assert torch.equal(out.embeddings_BLE[:, 10:], noise[:, 10:] + 0.25), "continuous part"


def test_a_prefix_behind_the_split_is_quantised_to_its_nearest_codes(teacher):
    stub, wanted = Recorder(), request(range(3))
    codes = loop_of(stub, teacher, 4, 6, split=1).generate(wanted).codes_BL
    assert_same(codes[:, 1:4], nearest_codes(request_noise(wanted, L, E)[:, 1:4] + 0.25, BOOK), "prefix from the continuous head")


def test_the_batch_does_not_matter_in_the_loop(student, teacher):
    loop = loop_of(student, teacher, 3, 7)
    whole = loop.generate(request(range(6))).codes_BL
    assert_same(loop.generate(request([5, 1])).codes_BL, whole[[5, 1]])


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (4, 4), (5, 4), (0, 16)])
def test_ranges_that_leave_nothing_to_do_are_refused(student, teacher, start, stop):
    with pytest.raises(ConfigError, match="teacher codes"):
        loop_of(student, teacher, start, stop)
