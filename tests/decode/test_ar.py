"""Autoregressive sampling: what an image depends on, the law of the draws, layouts of several tokens a block."""

import pytest
import torch
from scipy import stats

from arsp.decode import ar
from arsp.decode.ar import ARGenerator, decode_blocks, draw_codes, keyed_choice, sample_ar
from arsp.decode.filters import LogitsPipeline
from arsp.errors import ConfigError, NumericalError
from arsp.kernels import reference
from arsp.protocols import Capabilities, Generator, Layout, Request
from arsp.rng import keyed_gumbel
from arsp.testing.golden import find_cases
from arsp.testing.tabular import TabularDecoder, random_tables


@pytest.fixture(scope="module")
def decoder():
    return TabularDecoder(random_tables(6, 5, seed=0, scale=2.0))


def request(ids, seed=0):
    return Request(torch.as_tensor(ids), seed)


def sample(decoder, ids, seed=0, **options):
    return sample_ar(decoder, request(ids, seed), **{"pipeline": LogitsPipeline(), **options})


class ScaleDecoder:
    """Next-scale stub: blocks of 1, 3 and 2 positions in an unusual order; the law of position i puts code i first."""

    layout = Layout((2, 3), ((0,), (3, 1, 2), (5, 4)))
    capabilities = Capabilities(order="next-scale")
    vocab_size = 6

    def start(self, request, capacity=None):
        return {"block": 0, "rows": request.batch_size, "fed": []}

    def step(self, state, codes_Bn):
        state["fed"].append(None if codes_Bn is None else codes_Bn.tolist())
        block = self.layout.blocks[state["block"]]
        state["block"] += 1
        return torch.nn.functional.one_hot(torch.tensor(block), 6).float().mul(100).expand(state["rows"], -1, -1)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [3, 4, 5]])
def test_image_i_depends_on_seed_and_i_only(decoder, sizes):
    whole = sample(decoder, range(12), seed=3).codes_BL
    parts, start = [], 0
    for size in sizes:
        parts.append(sample(decoder, range(start, start + size), seed=3).codes_BL)
        start += size
    assert torch.equal(torch.cat(parts), whole), f"batches of {sizes} change the images"
    assert torch.equal(sample(decoder, [7, 2], seed=3).codes_BL, whole[[7, 2]]), "the order of the batch changes the images"


def test_seeds_and_rows_differ(decoder):
    first, second = (sample(decoder, range(200), seed=s).codes_BL for s in (0, 1))
    assert not torch.equal(first, second)
    assert len(first[:, 0].unique()) > 1, "first tokens of a batch are copies of each other (chance below 1e-20)"


def test_codes_are_the_argmax_of_log_law_plus_keyed_noise(decoder):
    codes = sample(decoder, range(20), seed=8).codes_BL
    log_p = torch.log_softmax(decoder.teacher_forced(request(range(20)), codes), -1)
    noise = keyed_gumbel(8, torch.arange(20)[:, None], torch.arange(5)[None], 6)
    assert torch.equal((log_p + noise).argmax(-1), codes)


def test_one_draw_follows_its_law():
    """50 000 draws, chi-square p > 1e-4, which is the false-alarm rate; the seed is fixed."""
    p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    codes = draw_codes(p.log().expand(50_000, 1, 5), 1, torch.arange(50_000), torch.zeros(1, dtype=torch.int64))
    counts = torch.bincount(codes.flatten(), minlength=5)
    assert counts[2] == 0, "a removed code was drawn"
    result = stats.chisquare(counts[p > 0].numpy(), (50_000 * p[p > 0]).numpy().astype(float), sum_check=False)
    assert result.pvalue > 1e-4, f"counts {counts.tolist()}, p = {result.pvalue:.2e}"


def test_draws_accept_positions_of_each_row():
    log_p, ids = torch.randn(4, 3, 9).log_softmax(-1), torch.arange(4)
    positions_Bm = torch.arange(12).view(4, 3)
    ragged = draw_codes(log_p, 5, ids, positions_Bm)
    for b in range(4):
        assert torch.equal(ragged[b : b + 1], draw_codes(log_p[b : b + 1], 5, ids[b : b + 1], positions_Bm[b]))


def test_large_draws_are_split_without_changing_them(monkeypatch):
    log_p, ids, positions = torch.randn(9, 2, 50).log_softmax(-1), torch.arange(9), torch.arange(2)
    whole = draw_codes(log_p, 0, ids, positions)
    monkeypatch.setattr(ar, "keyed_argmax", reference.keyed_argmax)
    for elements in (1, 250, 1 << 16):
        monkeypatch.setitem(reference.NOISE_ELEMENTS, "cpu", elements)
        assert torch.equal(draw_codes(log_p, 0, ids, positions), whole), f"{elements} at once"


@pytest.mark.parametrize("elements", [1, 6 * 8, 6 * 8 * 2, 6 * 8 * 3, 1 << 16])
def test_noise_made_ahead_is_the_noise_of_each_position(decoder, monkeypatch, elements):
    monkeypatch.setitem(reference.NOISE_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(ar, "fuses_noise", lambda log_p: False)
    codes = sample(decoder, range(8), seed=5).codes_BL
    log_p = torch.log_softmax(decoder.teacher_forced(request(range(8)), codes), -1)
    assert torch.equal(draw_codes(log_p, 5, torch.arange(8), torch.arange(5)), codes)
    choose = keyed_choice(request(range(8), 5))
    for i in (3, 0, 4, 1, 1):  # any order
        assert torch.equal(choose(log_p[:, i : i + 1], LogitsPipeline(), torch.tensor([i])), codes[:, i : i + 1]), f"position {i}"


def test_a_known_prefix_is_kept_and_sampling_can_stop_early(decoder):
    whole = sample(decoder, range(6), seed=2).codes_BL
    choose = keyed_choice(request(range(6), 2))
    for known, stop in ((2, None), (0, 3), (1, 4)):
        out = decode_blocks(decoder, request(range(6), 2), choose, LogitsPipeline(), prefix_Bp=whole[:, :known], stop=stop)
        assert torch.equal(out.codes_BL[:, :stop], whole[:, :stop]), (known, stop)
        assert out.codes_BL[:, stop or 5 :].sum() == 0 and out.stats["passes"] == (stop or 5) - known


def test_temperature_zero_is_deterministic_and_greedy(decoder):
    greedy = LogitsPipeline(temperature=0.0)
    first = sample(decoder, range(4), seed=0, pipeline=greedy).codes_BL
    assert torch.equal(first, sample(decoder, range(4), seed=1, pipeline=greedy).codes_BL)
    assert torch.equal(first, decoder.teacher_forced(request(range(4)), first).argmax(-1))


def test_the_torch_stream_is_multinomial_over_the_rows(decoder):
    got = sample(decoder, range(8), rng="torch", generator=torch.Generator().manual_seed(42)).codes_BL
    generator, expected = torch.Generator().manual_seed(42), torch.zeros(8, 0, dtype=torch.int64)
    for _ in range(5):
        logits = decoder.teacher_forced(request(range(8)), torch.cat((expected, expected.new_zeros(8, 1)), 1))[:, -1]
        expected = torch.cat((expected, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    assert torch.equal(got, expected)


def test_the_torch_stream_runs_on_through_the_calls_of_a_generator(decoder):
    generator = ARGenerator(decoder, rng="torch")
    first, second = (generator.generate(request(range(64))).codes_BL for _ in range(2))
    assert not torch.equal(first, second), "the second batch repeats the first one's stream"
    assert torch.equal(first, ARGenerator(decoder, rng="torch").generate(request(range(64))).codes_BL)


def test_blocks_of_several_tokens_are_fed_whole_and_land_at_their_positions():
    decoder, steps = ScaleDecoder(), []
    state = {}
    decoder.start = lambda request, capacity=None: state.update(ScaleDecoder.start(decoder, request)) or state
    out = sample_ar(decoder, request([0, 1]), pipeline=LogitsPipeline(temperature=0.0), callback=steps.append)
    assert out.codes_BL.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert state["fed"] == [None, [[0]] * 2, [[3, 1, 2]] * 2]
    assert steps == [1, 3, 2] and out.stats == {"passes": 3, "tokens_per_pass": 2.0}


def test_one_pass_a_token_is_counted_and_reported(decoder):
    steps = []
    out = ARGenerator(decoder).generate(request([0]), steps.append)
    assert out.stats["passes"] == 5 and steps == [1] * 5 and out.codes_BL.dtype == torch.int64
    assert isinstance(ARGenerator(decoder), Generator)


@pytest.mark.parametrize("rng", ["keyed", "torch"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_nan_or_empty_laws_are_numerical_errors(rng, value):
    class Broken(ScaleDecoder):
        def step(self, state, codes_Bn):
            return torch.full_like(super().step(state, codes_Bn), value)

    with pytest.raises(NumericalError, match="finite"):
        sample(Broken(), [0], rng=rng)


def test_an_unknown_stream_is_refused(decoder):
    with pytest.raises(ConfigError, match="numpy"):
        sample(decoder, [0], rng="numpy")


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="seeded_fixedpoint"), ids=str)
def test_recorded_noise_gives_the_recorded_sequences(case):
    """Sequential Gumbel-argmax decoding of a table p(x_j | last codes) with given uniforms: tokens exact. V = before the start."""
    log_table, expected = case.io["table"].log(), case.io["tokens"]
    noise = -torch.log(-torch.log(case.io["uniform"]))
    context = [torch.full((len(expected),), case.config["V"])] * (log_table.ndim - 1)
    tokens = []
    for i in range(case.config["L"]):
        tokens.append((log_table[tuple(context)] + noise[:, i]).argmax(-1))
        context = [*context[1:], tokens[-1]]
    sure = case.io["min_gap"] > 1e-4
    wrong = (torch.stack(tokens, 1) != expected)[sure].sum().item()
    assert wrong == 0, f"{wrong} tokens differ in {sure.sum().item()} sequences"
