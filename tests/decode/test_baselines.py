"""Controls without training: independent draws, the mode, and a teacher that stops early."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from arsp.decode.ar import ARGenerator
from arsp.decode.baselines import MarginalGenerator, SkipGenerator, class_frequencies, parse_baseline
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError
from arsp.metrics.exact import chi_square, count_sequences
from arsp.protocols import Generation, Generator, Layout, Request
from arsp.testing.tabular import TabularDecoder, random_tables
from arsp.testing.tolerance import assert_close, assert_same

CLASSES, L, V = 3, 4, 5
LAYOUT = Layout.raster(2, 2)


class ByClass:
    """Teacher stub: the code at position i of class y is (y + i + sample id parity) mod V; requests are kept."""

    capabilities = None

    def __init__(self):
        self.seen = []

    def generate(self, request, callback=None):
        self.seen.append(request)
        codes = request.labels_B[:, None] + torch.arange(L) + request.sample_ids_B[:, None] % 2
        return Generation(codes % V)


@pytest.fixture
def frequencies():
    draw = torch.rand(CLASSES, L, V, generator=torch.Generator().manual_seed(0))
    draw[:, :, 0] = 0
    return draw / draw.sum(-1, keepdim=True)


def request(n, label=0, seed=4):
    return Request(torch.arange(n), seed, labels_B=torch.full((n,), label))


def count(teacher, cache, **options):
    return class_frequencies(teacher, LAYOUT, CLASSES, V, **{"num": 300, "seed": 2, "cache": cache, **options})


@pytest.mark.parametrize(
    ("text", "expected"), [("naive", ("naive", 0)), ("mode", ("mode", 0)), ("skip-1", ("skip", 1)), ("skip-15", ("skip", 15))]
)
def test_names_of_baselines(text, expected):
    assert parse_baseline(text, Layout.raster(4, 4)) == expected


@pytest.mark.parametrize("text", ["", "naïve", "skip", "skip-", "skip-0", "skip-16", "skip--1", "skip-2x", "onestep"])
def test_other_names_are_refused_with_the_known_ones(text):
    with pytest.raises(ConfigError) as caught:
        parse_baseline(text, Layout.raster(4, 4))
    assert "naive, mode, or skip-N with 0 < N < 16" in caught.value.hint


def test_frequencies_are_counted_for_each_class_and_position(tmp_path):
    found = count(ByClass(), tmp_path / "f.safetensors")
    assert found.shape == (CLASSES, L, V)
    for label in range(CLASSES):
        for i in range(L):
            expected = torch.zeros(V)
            expected[[(label + i) % V, (label + i + 1) % V]] = 0.5
            assert_close(found[label, i], expected, abs_tol=1e-6, what=f"class {label}, position {i}")


def test_every_sample_of_the_count_has_its_own_id(tmp_path):
    teacher = ByClass()
    count(teacher, tmp_path / "f.safetensors", num=1600)
    ids = torch.cat([part.sample_ids_B for part in teacher.seen])
    assert len(ids) == len(ids.unique()) == 1599, "533 a class"
    assert max(part.batch_size for part in teacher.seen) <= 512 and {part.seed for part in teacher.seen} == {2}


def test_counted_frequencies_are_kept_and_used_again(tmp_path):
    cache = tmp_path / "deep" / "f.safetensors"
    first = count(ByClass(), cache)
    assert cache.is_file()
    unused = ByClass()
    assert torch.equal(count(unused, cache), first) and not unused.seen, "the teacher was sampled again"
    assert [p.name for p in cache.parent.iterdir()] == ["f.safetensors"], "temporary files are left behind"


def test_naive_draws_follow_the_frequencies_of_their_class(frequencies):
    """Chi-square of 20 000 draws at each of 12 (class, position) pairs, p > 1e-5 each: false alarm 1.2e-4; the seed is fixed."""
    generator = MarginalGenerator(frequencies, LAYOUT, mode=False)
    for label in range(CLASSES):
        codes = generator.generate(request(20_000, label)).codes_BL
        for i in range(L):
            statistic, df, p = chi_square(torch.bincount(codes[:, i], minlength=V), frequencies[label, i])
            assert p > 1e-5, f"class {label}, position {i}: chi-square {statistic:.1f} with {df} degrees of freedom, p = {p:.2g}"


def test_naive_draws_are_independent_between_positions(frequencies):
    """Chi-square of 40 000 sequences against the product law of 256 possible sequences, p > 1e-5 (the false-alarm rate)."""
    codes = MarginalGenerator(frequencies, LAYOUT, mode=False).generate(request(40_000)).codes_BL
    product = torch.ones(1)
    for marginal in frequencies[0]:
        product = (product[:, None] * marginal).flatten()
    statistic, df, p = chi_square(count_sequences(codes, V), product)
    assert p > 1e-5, f"chi-square {statistic:.1f} with {df} degrees of freedom, p = {p:.2g}"


def test_naive_draws_depend_on_seed_and_sample_only(frequencies):
    generator = MarginalGenerator(frequencies, LAYOUT, mode=False)
    whole = generator.generate(request(9)).codes_BL
    assert_same(generator.generate(Request(torch.tensor([7, 3]), 4, labels_B=torch.zeros(2, dtype=torch.int64))).codes_BL, whole[[7, 3]])
    assert not torch.equal(generator.generate(request(9, seed=5)).codes_BL, whole)


def test_codes_that_never_occurred_are_never_drawn(frequencies):
    assert (MarginalGenerator(frequencies, LAYOUT, mode=False).generate(request(5000)).codes_BL > 0).all()


def test_the_mode_is_the_most_frequent_code_whatever_the_noise(frequencies):
    out = MarginalGenerator(frequencies, LAYOUT, mode=True).generate(request(3, label=2))
    assert_same(out.codes_BL, frequencies[2].argmax(-1).expand(3, -1))


@pytest.mark.parametrize("mode", [False, True])
def test_both_need_one_pass_for_all_positions(frequencies, mode):
    calls = []
    out = MarginalGenerator(frequencies, LAYOUT, mode).generate(request(2), calls.append)
    assert out.stats == {"passes": 1, "tokens_per_pass": L} and calls == [L] and out.embeddings_BLE is None
    assert isinstance(MarginalGenerator(frequencies, LAYOUT, mode), Generator)


def test_controls_have_the_order_of_their_layout(frequencies):
    orders = [MarginalGenerator(frequencies, layout, True).capabilities.order for layout in (LAYOUT, Layout.next_scale((1, 2)))]
    assert orders == ["raster", "next-scale"]


@pytest.mark.parametrize("skip", [1, 3])
def test_the_shortened_teacher_keeps_its_codes_and_decodes_zeros_behind_them(skip):
    book = torch.randn(V, 2, generator=torch.Generator().manual_seed(1))
    decoder, pipeline = TabularDecoder(random_tables(V, L, seed=0, scale=1.5), book), LogitsPipeline(top_k=3)
    out = SkipGenerator(decoder, pipeline, book, skip).generate(request(50))
    kept = L - skip
    whole = ARGenerator(decoder, pipeline).generate(request(50)).codes_BL
    assert_same(out.codes_BL[:, :kept], whole[:, :kept], "codes that are kept")
    assert torch.equal(out.embeddings_BLE[:, :kept], book[whole[:, :kept]])
    assert out.embeddings_BLE[:, kept:].abs().sum() == 0 and out.embeddings_BLE.shape == (50, L, 2)
    assert out.stats["passes"] == kept


def test_the_controls_lose_the_joint_law_of_a_dependent_teacher(tmp_path):
    """20 000 naive draws from counted frequencies: each marginal passes (p > 1e-5; false alarm 4e-5), the joint fails (p < 1e-9)."""
    decoder = TabularDecoder(random_tables(V, L, seed=3, scale=2.0))
    table = class_frequencies(ARGenerator(decoder), LAYOUT, 1, V, num=200_000, seed=1, cache=tmp_path / "f.safetensors")
    codes = MarginalGenerator(table, LAYOUT, mode=False).generate(request(20_000)).codes_BL
    cube = decoder.joint.view((V,) * L)
    for i in range(L):
        marginal = cube.sum(dim=[k for k in range(L) if k != i])
        p = stats.chisquare(torch.bincount(codes[:, i], minlength=V), marginal * 20_000).pvalue
        assert p > 1e-5, f"position {i}: p = {p:.2g}"
    assert chi_square(count_sequences(codes, V), decoder.joint)[2] < 1e-9
