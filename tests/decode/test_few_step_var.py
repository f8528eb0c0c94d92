"""Few-step sampling and the controls on next-scale layouts: settings and ranges count whole scales."""

from __future__ import annotations

import pytest
import tiny_var
import torch

from arsp.decode.ar import ARGenerator, sample_ar
from arsp.decode.baselines import MarginalGenerator, SkipGenerator, class_frequencies, parse_baseline
from arsp.decode.few_step import (
    FewStep,
    StudentGenerator,
    TeacherLoopGenerator,
    default_second_step,
    parse_teacher_range,
    request_noise,
)
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError, InputError
from arsp.protocols import Layout, Request
from arsp.testing.tolerance import assert_close, assert_same

L, ENDS, OFFICIAL = 21, (1, 5, 21), Layout.next_scale((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LAYOUT, BOOK = tiny_var.LAYOUT, tiny_var.tokenizer_model().codebook_VE
GREEDY, PIPELINE = LogitsPipeline(temperature=0.0), LogitsPipeline(top_p=0.9)


def request(ids, seed=7):
    ids = torch.as_tensor(ids)
    return Request(ids, seed, labels_B=ids % 3)


@pytest.fixture(scope="module")
def student():
    return tiny_var.student_model()


def one_of(student, known=(0,), split=-1):
    return StudentGenerator(student, BOOK, LAYOUT, FewStep(known, split))


def loop_of(student, start, stop, *, cfg=0.5, split=-1, pipeline=PIPELINE):
    return TeacherLoopGenerator(one_of(student, split=split), tiny_var.decoder(cfg), pipeline, start, stop)


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [FewStep(), FewStep((0, 1)), FewStep((0, 1, 5), 5), FewStep((0, 5), 0), FewStep((0,), 21)])
def test_counts_at_the_ends_of_scales_are_accepted(settings):
    settings.check(LAYOUT)


@pytest.mark.parametrize("settings", [FewStep((0, 2)), FewStep((0, 21)), FewStep((0, 5, 1)), FewStep((0,), 4), FewStep((0,), 22)])
def test_counts_that_cut_a_scale_are_refused_with_the_ends(settings):
    with pytest.raises(ConfigError, match=r"at the ends of scales, \[0, 1, 5, 21\]"):
        settings.check(LAYOUT)


def test_the_second_step_stands_behind_half_of_the_scales():
    assert default_second_step(OFFICIAL) == OFFICIAL.ends[4] == 55
    assert default_second_step(LAYOUT) == 1


@pytest.mark.parametrize(("text", "expected"), [("5-6", (4, 5)), ("4-6", (3, 5)), ("1-6", (0, 5)), ("1-10", (0, 9))])
def test_published_ranges_count_scales(text, expected):
    assert parse_teacher_range(text, OFFICIAL) == expected


@pytest.mark.parametrize("text", ["1-11", "0-3", "3-3", "55-56"])
def test_ranges_outside_the_scales_are_refused(text):
    with pytest.raises(ConfigError, match="M <= 10 in scales"):
        parse_teacher_range(text, OFFICIAL)


def test_skipped_steps_count_scales():
    assert parse_baseline("skip-2", LAYOUT) == ("skip", 2)
    with pytest.raises(ConfigError) as caught:
        parse_baseline("skip-3", LAYOUT)
    assert "0 < N < 3" in caught.value.hint


# -- the student alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [(0,), (0, 5), (0, 1, 5)])
def test_codes_known_at_a_pass_are_kept(student, known):
    out = one_of(student, known).generate(request(range(4)))
    first = one_of(student).generate(request(range(4)))
    kept = known[1] if len(known) > 1 else L
    assert_same(out.codes_BL[:, :kept], first.codes_BL[:, :kept], "codes of the first pass")
    assert out.stats["passes"] == len(known) and out.embeddings_BLE is None
    assert one_of(student).capabilities.order == "next-scale" and not one_of(student).capabilities.teacher


def test_vectors_behind_the_split_stay_continuous_and_decode(student):
    out = one_of(student, split=5).generate(request(range(2)))
    assert torch.equal(out.embeddings_BLE[:, :5], BOOK[out.codes_BL[:, :5]])
    assert not torch.equal(out.embeddings_BLE[:, 5:], BOOK[out.codes_BL[:, 5:]])
    assert tiny_var.tokenizer_model().decode_embeddings(out.embeddings_BLE).shape == (2, 3, 8, 8)


def test_image_i_depends_on_seed_and_i_only(student):
    whole = one_of(student, (0, 5), 5).generate(request(range(6)))
    part = one_of(student, (0, 5), 5).generate(request([5, 2]))
    assert_same(part.codes_BL, whole.codes_BL[[5, 2]], "codes")
    assert_close(part.embeddings_BLE, whole.embeddings_BLE[[5, 2]], abs_tol=1e-4, what="vectors")


# -- the teacher in the loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 2), (1, 2)])
def test_passes_count_scales_of_the_teacher(student, start, stop):
    stats = loop_of(student, start, stop).generate(request([0, 1])).stats
    assert stats["teacher_passes"] == stop - start
    assert stats["passes"] == stop - start + (2 if start else 1)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_the_prefix_of_the_student_conditions_the_teacher(student, cfg):
    wanted, ends = request(range(5)), (0, *ENDS)
    codes = loop_of(student, 1, 2, cfg=cfg, pipeline=GREEDY).generate(wanted).codes_BL
    assert_same(codes[:, :1], one_of(student).generate(wanted).codes_BL[:, :1], "prefix made by the student")
    greedy = tiny_var.decoder(cfg).teacher_forced(wanted, codes).argmax(-1)
    assert_same(codes[:, ends[1] : ends[2]], greedy[:, ends[1] : ends[2]], "teacher codes after this prefix")
    other = torch.cat(((codes[:, :1] + 1) % 16, codes[:, 1:]), dim=1)
    elsewhere = tiny_var.decoder(cfg).teacher_forced(wanted, other).argmax(-1)
    assert not torch.equal(elsewhere[:, 1:5], greedy[:, 1:5]), "this teacher ignores its prefix: the test shows nothing"


def test_from_the_first_scale_the_teacher_draws_what_it_draws_alone(student):
    wanted = request(range(5))
    codes = loop_of(student, 0, 2).generate(wanted).codes_BL
    alone = sample_ar(tiny_var.decoder(), wanted, pipeline=PIPELINE).codes_BL
    assert_same(codes[:, :5], alone[:, :5], "teacher codes")


def test_behind_the_teacher_the_student_continues_from_its_codes_and_the_original_noise(student):
    wanted = request(range(5))
    codes = loop_of(student, 0, 2).generate(wanted).codes_BL
    x = torch.cat((BOOK[codes[:, :5]], request_noise(wanted, L, 4)[:, 5:]), dim=1)
    with torch.no_grad():
        logits, _ = student(wanted.labels_B, x, torch.full((5,), 5))
    assert_same(codes[:, 5:], logits.argmax(-1)[:, 5:], "last scale")


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 1), (2, 1), (0, 3)])
def test_ranges_that_leave_nothing_to_do_are_refused(student, start, stop):
    with pytest.raises(ConfigError, match="teacher scales"):
        loop_of(student, start, stop)


# -- controls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skip", "kept"), [(1, 5), (2, 1)])
def test_the_shortened_teacher_returns_whole_coarse_scales(skip, kept):
    wanted = request(range(6))
    out = SkipGenerator(tiny_var.decoder(), PIPELINE, BOOK, skip).generate(wanted)
    whole = sample_ar(tiny_var.decoder(), wanted, pipeline=PIPELINE).codes_BL
    assert out.embeddings_BLE is None and out.stats["passes"] == 3 - skip
    assert_same(out.codes_BL, whole[:, :kept], "codes that are kept")
    tokenizer = tiny_var.tokenizer_model()
    assert tokenizer.decode_codes(out.codes_BL).shape == (6, 3, 8, 8)
    with pytest.raises(InputError, match="no whole number"):
        tokenizer.decode_codes(whole[:, : kept + 1])


def test_frequencies_are_counted_over_all_scales(tmp_path):
    table = class_frequencies(ARGenerator(tiny_var.decoder(), PIPELINE), LAYOUT, 3, 16, num=150, seed=1, cache=tmp_path / "f.safetensors")
    assert table.shape == (3, L, 16)
    assert_close(table.sum(-1), torch.ones(3, L), abs_tol=1e-5, what="shares of a position")
    out = MarginalGenerator(table, LAYOUT, mode=False).generate(request(range(30)))
    assert (table[request(range(30)).labels_B].gather(-1, out.codes_BL.unsqueeze(-1)) > 0).all(), "a code that the teacher never drew"
