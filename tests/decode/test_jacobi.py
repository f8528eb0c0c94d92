"""The loop: recorded fixed points, plain sampling code for code, the end of the sequence, finished rows, counters, memory, redraws."""

import pytest
import torch
from tabular_models import MarkovDecoder, guided_decoder, table_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from arsp.decode.accept import ExactRule
from arsp.decode.ar import ARGenerator
from arsp.decode.decoder import RasterDecoder
from arsp.decode.drafts import Initialiser, NGrams
from arsp.decode.filters import LogitsPipeline
from arsp.decode.guidance import Guidance
from arsp.decode.jacobi import Chain, JacobiGenerator, Redraw
from arsp.decode.law import Law
from arsp.decode.modes import MODES, Parts, VerifyConfig, build_mode, settle
from arsp.decode.planner import StepCost, WindowPlanner
from arsp.errors import NumericalError
from arsp.metrics.exact import mode_generator
from arsp.models.llamagen import GPT, GPTConfig
from arsp.protocols import Request
from arsp.testing.golden import find_cases

CHAINS = [("seeded", {}), ("sjd", {}), ("mc", {"coupling": "maximal"}), ("mc", {"coupling": "gumbel"}), ("vp", {}), ("reuse", {})]
EVERY = [*CHAINS, ("pac", {}), ("draft-model", {}), ("kseq", {}), ("rsd", {})]
modes = pytest.mark.parametrize(("name", "options"), EVERY, ids=lambda x: x if isinstance(x, str) else "".join(x.values()))


# -- recorded fixed points --------------------------------------------------------------------------------------------------


class GivenNoise:
    """A pipeline that draws with recorded uniforms."""

    def __init__(self, uniform_NLV):
        self.noise = -torch.log(-torch.log(uniform_NLV))

    def verify(self, logits_BmV, drafts_Bm, seed, ids_B, positions_Bm, purpose, stream=0):
        return None, (logits_BmV + self.noise[ids_B[:, None], positions_Bm]).argmax(-1), None


class Zeros:
    """Every new draft is code 0."""

    def fill(self, tape, stop_B):
        places = torch.arange(tape.length)
        tape.codes_BL = tape.codes_BL.masked_fill((places >= tape.drafted_B[:, None]) & (places >= tape.known_B[:, None]), 0)


class Counting(Chain):
    """Notes how many passes each row took part in."""

    def begin(self, request, length, vocab_size):
        self.passes = torch.zeros(request.batch_size, dtype=torch.int64)
        return super().begin(request, length, vocab_size)

    def advance(self, decoder, state, tape, window):
        self.passes[tape.rows_B] += 1
        return super().advance(decoder, state, tape, window)


GOLDEN = find_cases(kind="seeded_fixedpoint")


def recorded(case, drafter, window, ids=None):
    """Codes of the recorded samples, and passes of each, with the recorded noise."""
    method = Counting(GivenNoise(case.io["uniform"]), drafter)
    generator = JacobiGenerator(MarkovDecoder(case.io["table"], case.config["L"]), method, window)
    codes = generator.generate(Request(torch.arange(case.config["N"]) if ids is None else ids, 0)).codes_BL
    return codes, method.passes


def windows_of(case):
    return [int(key.removeprefix("forwards.W")) for key in case.io if key.startswith("forwards.W")]


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_recorded_noise_gives_the_recorded_codes_in_the_recorded_passes(case):
    """Codes and counts exact, for every recorded window, whatever else is in the batch."""
    assert windows_of(case), "the case has no counts"
    shuffled = torch.randperm(case.config["N"], generator=torch.Generator().manual_seed(0))
    for window in windows_of(case):
        for ids in (torch.arange(case.config["N"]), *shuffled.split(case.config["N"] // 3 + 1), shuffled[:1]):
            codes, passes = recorded(case, Zeros(), window, ids)
            assert torch.equal(codes, case.io["tokens"][ids]), f"window {window}"
            assert torch.equal(passes, case.io[f"forwards.W{window}"][ids]), f"window {window}: {passes.tolist()}"


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_recorded_codes_come_from_any_guesses_and_windows(case):
    L = case.config["L"]
    for window, init in ((0, "random_uniform"), (2, "repeat_left"), (5, "random_uniform"), (L, "repeat_above"), (3 * L, "left_law")):
        codes, passes = recorded(case, Initialiser(init, 4), window)
        assert torch.equal(codes, case.io["tokens"]), f"window {window}, {init}"
        assert (passes == L).all() if window == 0 else (passes <= L).all(), f"window {window}"


# -- a transformer ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=40, block_size=16, num_classes=5, multiple_of=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(2.0, 5)], ids=["off", "guided", "interval"])
def test_seeded_codes_of_a_transformer_are_those_of_plain_sampling(gpt, guidance):
    """Float32; near ties could differ, there is none at this seed."""
    decoder, pipeline = RasterDecoder(gpt, guidance), LogitsPipeline(0.9, 20, 0.95)
    request = Request(torch.arange(6), 2, labels_B=torch.arange(6) % 5)
    expected = ARGenerator(decoder, pipeline).generate(request).codes_BL
    for window in (0, 1, 4, 15, 40):
        for init in ("random_uniform", "repeat_above"):
            generator = JacobiGenerator(decoder, Chain(pipeline, Initialiser(init, 4)), window)
            assert torch.equal(generator.generate(request).codes_BL, expected), f"window {window}, {init}"
            assert torch.equal(generator.generate(request.rows(slice(4, 5))).codes_BL, expected[4:5]), "alone"


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, 5)], ids=["off", "interval"])
@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.exactness == "exact"])
def test_greedy_codes_of_a_transformer_are_those_of_plain_sampling(gpt, guidance, name):
    """Every exact mode at temperature 0: nothing is random, so caches of chains and trees must hold what plain steps would."""
    decoder, pipeline = RasterDecoder(gpt, guidance), LogitsPipeline(temperature=0.0)
    request = Request(torch.arange(5), 2, labels_B=torch.arange(5))
    expected = ARGenerator(decoder, pipeline).generate(request).codes_BL
    drafted = {"draft_model": "itself"} if MODES[name].needs_draft else {}
    parts = Parts(decoder, pipeline, draft=RasterDecoder(gpt) if drafted else None)
    generator = build_mode(name, parts, settle(name, VerifyConfig(**drafted), decoder.layout))
    assert torch.equal(generator.generate(request).codes_BL, expected)
    assert generator.statistics.passes < 5 * 16 or guidance.active, "nothing was accepted"


# -- the end of the sequence, and rows that finish ------------------------------------------------------------------------------


@modes
def test_windows_may_reach_beyond_the_end(name, options):
    """A window of all codes there are; the loop clamps it and keeps to the cache slots of the sequence."""
    decoder = table_decoder()
    window = {} if name == "rsd" else {"window": 6}
    codes = mode_generator(name, decoder, **options, **window).generate(Request(torch.arange(50), 0)).codes_BL
    assert codes.shape == (50, 6) and codes.min() >= 0 and codes.max() < 3


def test_a_window_of_nothing_is_one_code_a_pass_with_the_exact_law():
    decoder = table_decoder()
    for rule in (None, ExactRule()):
        generator = JacobiGenerator(decoder, Chain(LogitsPipeline(), Initialiser("random_uniform", 3), rule, rule and Redraw()), 0)
        generation = generator.generate(Request(torch.arange(7), 0))
        report = generator.statistics.report((2, 3))
        assert generation.stats["passes"] == 6 and report["committed"] == {"1": 42} and report["acceptance"] is None
        assert report["acceptance_map"] == [[None] * 3] * 2


def test_one_code_is_one_pass():
    decoder = table_decoder(4, (1, 1))
    for rule in (None, ExactRule()):
        generator = JacobiGenerator(decoder, Chain(LogitsPipeline(), Initialiser("random_uniform", 1), rule, rule and Redraw()), 3)
        assert generator.generate(Request(torch.arange(9), 0)).stats["passes"] == 1


class Watched(Chain):
    """Notes which rows each pass works on."""

    def begin(self, request, length, vocab_size):
        self.seen = []
        return super().begin(request, length, vocab_size)

    def advance(self, decoder, state, tape, window):
        self.seen.append((tape.rows_B.tolist(), tape.known_B.tolist()))
        return super().advance(decoder, state, tape, window)


def test_finished_rows_leave_and_their_codes_keep_their_place():
    decoder, request = table_decoder(), Request(torch.tensor([40, 3, 17, 3, 8]), 1)
    method = Watched(LogitsPipeline(), Initialiser("random_uniform", 3), ExactRule(), Redraw("maximal"))
    done = []
    codes = JacobiGenerator(decoder, method, 3).generate(request, done.append).codes_BL
    for row in range(5):
        alone = JacobiGenerator(decoder, method, 3).generate(request.rows(slice(row, row + 1))).codes_BL
        assert torch.equal(codes[row : row + 1], alone), f"row {row}"
    assert torch.equal(codes[1], codes[3]), "equal ids give equal codes"
    assert sum(done) == 5 * 6 and min(done) >= 1
    JacobiGenerator(decoder, method, 3).generate(request)
    for (rows, known), (before, earlier) in zip(method.seen[1:], method.seen, strict=False):
        assert set(rows) <= set(before) and all(k < 6 for k in known)
        assert all(known[rows.index(row)] > earlier[before.index(row)] for row in rows), "every pass commits a code of every row"
    sizes = [len(rows) for rows, _ in method.seen]
    assert sizes[0] == 5 and sizes[-1] < 5, f"no row finished early: {sizes}"


def test_a_generator_can_be_used_again():
    decoder = table_decoder()
    for name, options in EVERY:
        generator = mode_generator(name, decoder, **options)
        first, _, second = (generator.generate(Request(torch.arange(n), 0)).codes_BL for n in (20, 3, 20))
        assert torch.equal(first, second), f"{name}: state of an earlier batch is left"


# -- counters ---------------------------------------------------------------------------------------------------------------


@modes
def test_the_counters_agree_with_each_other(name, options):
    decoder = table_decoder()
    generator = mode_generator(name, decoder, **options)
    generations = [generator.generate(Request(torch.arange(start, start + n), 0)) for start, n in ((0, 30), (30, 11))]
    report = generator.statistics.report(decoder.layout.grid)
    passes = sum(g.stats["passes"] * n for g, n in zip(generations, (30, 11), strict=True))
    committed = {int(number): count for number, count in report["committed"].items()}
    assert report["images"] == 41 and report["passes_per_image"] * 41 == pytest.approx(passes)
    assert sum(number * count for number, count in committed.items()) == 41 * 6, "every code is committed once"
    assert sum(committed.values()) == pytest.approx(passes) and min(committed) >= 1
    assert report["tokens_per_pass"] == pytest.approx(41 * 6 / passes)
    assert report["single_token_share"] == pytest.approx(committed.get(1, 0) / passes)
    tested, accepted = generator.statistics.tested_L, generator.statistics.accepted_L
    assert (accepted <= tested).all() and tested[-1] == 0, "the last code is never a draft"
    assert accepted.sum() == sum((number - 1) * count for number, count in committed.items())
    rates = [rate for row in report["acceptance_map"] for rate in row]
    assert rates == [a / t if t else None for a, t in zip(accepted.tolist(), tested.tolist(), strict=True)]
    assert report["acceptance"] == pytest.approx(accepted.sum().item() / tested.sum().item())


def test_acceptance_is_counted_at_its_place():
    """A decoder that always writes 1, guesses that are 1 in the first row and 0 in the second."""

    class Guesses:
        def fill(self, tape, stop_B):
            tape.codes_BL[:, :3], tape.codes_BL[:, 3:] = 1, 0

    decoder = table_decoder()
    decoder._logits = [torch.tensor([-100.0, 0.0, -100.0]).expand_as(x) for x in decoder._logits]
    generator = JacobiGenerator(decoder, Chain(LogitsPipeline(temperature=0.0), Guesses()), 5)
    generator.generate(Request(torch.arange(2), 0))
    assert generator.statistics.report((2, 3))["acceptance_map"] == [[1.0] * 3, [0.0, 0.0, None]]
    assert generator.statistics.histogram == {4: 2, 1: 4}


# -- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3])
@modes
def test_little_is_kept_between_passes(name, options, window):
    """At most (W + 1) V float32 an image; nothing of that in seeded mode. Rising probabilities need those of two passes."""
    V = 20
    generator = mode_generator(name, table_decoder(V, (2, 2)), **options, **({} if name == "rsd" else {"window": window}))
    generator.generate(Request(torch.arange(30), 0))
    kept = generator.statistics.state_bytes
    assert kept <= (window + 1) * 4 * V * (2 if name == "vp" else 1), kept
    assert (kept == 0) == (name in ("seeded", "kseq", "rsd", "draft-model")), kept


# -- reads from the device --------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values and shapes that depend on data. Tensors made from numbers are on the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, made, listed, of_host = 0, torch.tensor, torch.Tensor.tolist, set()

        def tensor(*args, **named):
            of_host.add(id(new := made(*args, **named)))
            self.kept = [*getattr(self, "kept", []), new]  # its id stays its own
            return new

        def tolist(x):
            self.count += id(x) not in of_host
            return listed(x)

        monkeypatch.setattr(torch, "tensor", tensor)
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        by_mask = masks and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += by_mask or (bool(depends) and not masks)
        return func(*args, **(kwargs or {}))


def test_reads_are_noticed(monkeypatch):
    x = torch.arange(4)
    values = (lambda: int(x.max()), lambda: bool(x.any()), lambda: torch.equal(x, x), lambda: x.tolist())
    for read in (*values, lambda: x.nonzero(), lambda: x[x > 1]):
        with Reads(monkeypatch) as reads:
            read()
        assert reads.count == 1
    with Reads(monkeypatch) as reads:
        x[torch.tensor([1, 2])] = torch.tensor([3, 4]).tolist()[0]
    assert reads.count == 0


READ_ONCE = [
    *(("seeded", {"init": init}) for init in ("random_uniform", "repeat_above", "left_law", "prior", "ngram")),
    ("seeded", {"window": "auto"}), ("seeded", {"draft_model": "itself"}),
    ("sjd", {}), ("draft-model", {"draft_model": "itself"}), ("mc", {"coupling": "maximal"}), ("mc", {"coupling": "gumbel"}), ("vp", {}),
    ("reuse", {}), ("gsd", {}), ("lantern", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", READ_ONCE, ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())))
def test_a_pass_reads_once_from_the_device(gpt, monkeypatch, name, options):
    """Whatever the rows do: drafts stand or fall, lengths differ, rows finish."""
    decoder, V = RasterDecoder(gpt, Guidance(2.0, 7)), 40
    book = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))
    prior = torch.full((5, 16, V), 1 / V)
    ngrams = NGrams.count(torch.randint(V, (50, 16), generator=torch.Generator().manual_seed(1)), V)
    flat = StepCost({rows: {n: 1.0 for n in range(1, 18)} for rows in (1, 4)}, {1: 1.0, 4: 1.0})
    draft = RasterDecoder(gpt, Guidance(8.0, 2)) if "draft_model" in options else None
    parts = Parts(decoder, LogitsPipeline(0.9, 20), book, book, draft, prior, ngrams, lambda request: WindowPlanner(flat))
    generator = build_mode(name, parts, settle(name, VerifyConfig(**options), decoder.layout))
    request, counts = Request(torch.arange(4), 3, labels_B=torch.arange(4)), []
    generator.generate(request.rows(slice(0, 2)))  # what is made once is made
    with Reads(monkeypatch) as reads:
        generator.generate(request, lambda committed: (counts.append(reads.count), setattr(reads, "count", 0)))
    assert len(counts) > 3 and max(counts) == 1 and reads.count == 0, f"reads by pass: {counts}, then {reads.count}"


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name, options", [("seeded", {}), ("sjd", {}), ("mc", {}), ("vp", {}), ("draft-model", {"draft_model": "itself"})])
def test_laws_without_a_possible_code_are_numerical_errors(name, options, value):
    """From some position on; of the model or of the one that drafts. No code is returned."""
    for broken in ("target", "draft") if options else ("target",):
        decoders = {"target": table_decoder(), "draft": table_decoder()}
        decoders[broken]._logits[3] = torch.full_like(decoders[broken]._logits[3], value)
        parts = Parts(decoders["target"], LogitsPipeline(), draft=decoders["draft"])
        generator = build_mode(name, parts, settle(name, VerifyConfig(window=2, **options), decoders["target"].layout))
        with pytest.raises(NumericalError, match="finite"):
            generator.generate(Request(torch.arange(3), 0))


# -- redraws ----------------------------------------------------------------------------------------------------------------


def redrawn(name, **options):
    """Codes that 20 000 copies of one draft become in a second pass, and what is recorded: p and the draft's law q of four codes."""
    num, p, q = 20_000, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    decoder = table_decoder(4, (1, 3))
    method = Chain(LogitsPipeline(), Initialiser("random_uniform", 3), ExactRule(), Redraw(name, **options))
    tape = method.begin(Request(torch.arange(num), 0), 3, 4)
    tape.laws, tape.drafted_B, tape.passes = Law.of_weights(q.log().expand(num, 2, 4)), torch.full((num,), 2), 1
    tape.source_BL[:, :2] = torch.tensor([0, 1])
    positions = torch.arange(3).expand(num, 3)
    tape.codes_BL[:, :2] = torch.multinomial(q, 2 * num, replacement=True, generator=torch.Generator().manual_seed(0)).view(num, 2)
    law, drawn, log_p = LogitsPipeline().verify(
        p.log().expand(num, 3, 4).contiguous(), tape.codes_BL, 0, tape.ids_B, positions, 9, method.redraw.stream(tape)
    )
    ratio = ExactRule().ratio(law, log_p, tape, positions, tape.codes_BL)
    codes, recorded = method.redraw(law, drawn, ratio, tape, positions)
    return tape.codes_BL, codes, recorded, p, q, decoder


def distance(codes, law):
    return 0.5 * (torch.bincount(codes, minlength=len(law)) / len(codes) - law).abs().sum().item()


@pytest.mark.parametrize("name", ["fresh", "gumbel", "maximal", "rising"])
def test_redrawn_codes_have_the_law_that_is_recorded(name):
    """20 000 draws of 4 codes: total variation 0.02 would need luck of about 1e-5; the seed is fixed."""
    _, codes, recorded, p, _, _ = redrawn(name)
    for position in range(3):
        law = recorded.log_probs()[0, position].exp()
        assert distance(codes[:, position], law) < 0.02
        torch.testing.assert_close(law, p)


def test_maximal_coupling_keeps_as_many_drafts_as_any_coupling_can():
    old, codes, _, p, q, _ = redrawn("maximal")
    kept = (old[:, :2] == codes[:, :2]).float().mean().item()
    assert kept == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.01), "1 - TV(p, q)"
    fresh_old, fresh, *_ = redrawn("fresh")
    assert (fresh_old[:, :2] == fresh[:, :2]).float().mean().item() == pytest.approx((p * q).sum().item(), abs=0.01)


def test_gumbel_coupling_gives_the_same_code_while_the_law_is_the_same():
    """Noise stays with the position: the draw of a later pass from the same law is the same code."""
    pipeline, ids = LogitsPipeline(), torch.arange(100)
    logits, none, place = torch.randn(100, 2, 9), torch.full((100, 2), -1), torch.arange(2).expand(100, 2)
    codes = {}
    for name in ("gumbel", "fresh"):
        method = Chain(pipeline, Initialiser("random_uniform", 3), ExactRule(), Redraw(name))
        tape = method.begin(Request(ids, 0), 3, 9)
        for tape.passes in (1, 2):
            codes[name, tape.passes] = pipeline.verify(logits, none, 0, ids, place, 9, method.redraw.stream(tape))[1]
    assert torch.equal(codes["gumbel", 1], codes["gumbel", 2]) and not torch.equal(codes["fresh", 1], codes["fresh", 2])


def test_rising_probabilities_are_raised_further_and_recorded():
    """Q in proportion to p max(1, p / p_before)^g, with p_before of the same position in the last pass."""
    redraw, pipeline = Redraw("rising", gain=2.0), LogitsPipeline()
    method = Chain(pipeline, Initialiser("random_uniform", 3), ExactRule(), redraw)
    tape = method.begin(Request(torch.arange(1), 0), 5, 3)
    before, now = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), torch.tensor([[0.1, 0.3, 0.6], [0.6, 0.2, 0.2]])
    for first, p in ((1, before), (2, now)):
        positions = torch.arange(first, first + 2)[None]
        law = pipeline.law(p.log()[None])
        codes, recorded = redraw(law, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), tape, positions)
        tape.passes += 1
    weights = now[0] * (now[0] / before[1]).clamp(min=1) ** 2
    torch.testing.assert_close(recorded.log_probs()[0, 0].exp(), weights / weights.sum())
    torch.testing.assert_close(recorded.log_probs()[0, 1].exp(), now[1], msg="a position seen for the first time has its own law")


def test_exactness_is_that_of_the_weakest_part():
    guess = Initialiser("random_uniform", 3)
    assert Chain(LogitsPipeline(), guess).exactness == Chain(LogitsPipeline(), guess, ExactRule(), Redraw()).exactness == "exact"
    assert Chain(LogitsPipeline(), guess, ExactRule(), Redraw("reuse")).exactness == "lossy"


def test_guidance_may_end_within_a_window():
    """Position by position, not pass by pass: one window over the end of the interval gives the codes of plain sampling."""
    decoder = guided_decoder(interval=0)
    request = Request(torch.arange(200), 4)
    expected = ARGenerator(decoder).generate(request).codes_BL
    assert torch.equal(mode_generator("seeded", decoder, window=5).generate(request).codes_BL, expected)
    assert not torch.equal(ARGenerator(guided_decoder(interval=-1)).generate(request).codes_BL, expected)
