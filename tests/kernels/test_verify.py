"""verify and keyed_argmax against their references, LogitsPipeline and arsp.rng, on every instruction set of this machine."""

import math

import pytest
import torch
from verify_cases import draw, key, laws, residual_call, same_codes, same_residual_draws

from arsp import kernels
from arsp.decode.filters import LogitsPipeline, keep_top_p
from arsp.errors import ConfigError
from arsp.kernels import build, ops, reference
from arsp.rng import Purpose, keyed_uniform

SIZES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 500, 1025)  # around registers and chunks of every instruction set
LAWS = [(t, k, p) for t in (1.0, 0.7, 0.0) for k in (0, 1, 5, 100, 2000) for p in (1.0, 0.9012, 0.5012, 0.0)]
EVERY_ISA = pytest.mark.parametrize("isa", range(len(build.ISA)), ids=build.ISA)


@pytest.fixture
def use(compiled):
    """Sets the instruction set, or skips where the processor has none; the best one afterwards."""

    def choose(isa):
        if compiled.use_isa(isa) != build.ISA[isa]:
            pytest.skip(f"this processor has no {build.ISA[isa]}")

    yield choose
    compiled.use_isa(-1)


def dense(logits, temperature, found):
    """Log-probabilities of the law that (codes, log_p, lse, threshold, last) describe."""
    _, _, lse, threshold, last = (x.unsqueeze(-1) for x in found)
    scaled, ids = logits / (max(temperature, 1e-5) if temperature else 1.0), torch.arange(logits.shape[-1])
    kept = (scaled > threshold) | ((scaled == threshold) & (ids <= last))
    return (scaled - lse).masked_fill(~kept, -torch.inf)


@EVERY_ISA
def test_the_noise_is_that_of_keyed_uniform_bit_for_bit(use, isa):
    """Flat weights: the code of the largest uniform, the smallest on ties, among any subset of the codes."""
    use(isa)
    for codes in SIZES:
        for seed in range(3):
            arguments = key(200, seed)
            kept = draw(200, codes, seed, removed=(0, 0.5, 0.95)[seed]).isfinite()
            flat = torch.zeros(200, codes).masked_fill(~kept, -torch.inf)
            uniform = keyed_uniform(*arguments[:4], codes, arguments[4]).masked_fill(~kept, -1)
            assert torch.equal(ops.keyed_argmax(flat, *arguments), uniform.argmax(-1)), f"V={codes} {build.ISA[isa]}"


@EVERY_ISA
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e6])
def test_draws_are_those_of_the_reference(use, isa, spread):
    use(isa)
    for codes in SIZES:
        log_w, arguments = spread * draw(60, codes, codes), key(60, codes)
        for rows in (log_w, log_w.sort().values, log_w.sort(descending=True).values, log_w + 1000 * spread):
            found, wanted = ops.keyed_argmax(rows, *arguments), reference.keyed_argmax(rows, *arguments)
            same_codes(found, wanted, rows, arguments, f"V={codes} spread {spread} {build.ISA[isa]}")


@EVERY_ISA
def test_the_largest_noise_there_is_can_win(use, isa):
    use(isa)
    position, code = torch.tensor([954096]), 66  # found by search: the uniform is the largest one, its noise 16.64
    assert keyed_uniform(0, torch.tensor([5]), position, Purpose.TOKEN, 67)[0, code] == 1 - 2.0**-24
    log_w = torch.full((1, 300), -torch.inf)
    log_w[0, 0] = 0.0
    first = -math.log(-math.log(keyed_uniform(0, torch.tensor([5]), position, Purpose.TOKEN, 1).item()))
    for margin, winner in ((1e-3, code), (-1e-3, 0)):
        log_w[0, code] = first - 16.635532 + margin
        assert ops.keyed_argmax(log_w, 0, torch.tensor([5]), position, 0).item() == winner
        assert ops.verify(log_w, torch.tensor([0]), 1.0, 0, 1.0, 0, torch.tensor([5]), position, 0)[0].item() == winner


@EVERY_ISA
def test_equal_scores_give_the_smallest_id(use, isa):
    use(isa)
    log_w = torch.full((8, 200), -torch.inf)
    for row, first in enumerate((0, 1, 15, 16, 63, 64, 100, 199)):
        log_w[row, first:] = 1e9  # one float in 64: the noise is lost
    assert ops.keyed_argmax(log_w, *key(8)).tolist() == [0, 1, 15, 16, 63, 64, 100, 199]


@EVERY_ISA
def test_draws_follow_the_law(use, isa):
    """20 000 draws of 40 codes: total variation 0.03 is above what 20 000 exact draws reach with a chance of 1e-4; the seed is fixed."""
    use(isa)
    log_p = draw(1, 40, 5).log_softmax(-1)
    ids = torch.arange(20_000)
    codes = ops.keyed_argmax(log_p.expand(20_000, -1), 1, ids, torch.zeros_like(ids), 0)
    distance = (torch.bincount(codes, minlength=40) / 20_000 - log_p[0].exp()).abs().sum().item() / 2
    assert distance < 0.03, f"total variation {distance:.3f}"


@EVERY_ISA
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_everything_is_that_of_the_reference_at_awkward_shapes(use, isa, ties):
    use(isa)
    for codes in SIZES:
        for temperature, top_k, top_p in LAWS:
            logits, arguments = draw(12, codes, codes, ties), key(12, codes)
            drafts = torch.arange(-2, 10).clamp(max=codes - 1)
            call = (logits, drafts, temperature, top_k, top_p, *arguments)
            found, wanted, what = ops.verify(*call), reference.verify(*call), f"V={codes} {temperature, top_k, top_p} {build.ISA[isa]}"
            same_codes(found[0], wanted[0], dense(logits, temperature, wanted), arguments, what)
            for name, ours, theirs in zip(("log_p", "lse"), found[1:3], wanted[1:3], strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0, msg=lambda m, n=name, w=what: f"{n}, {w}: {m}")
            assert torch.equal(found[3], wanted[3]) and torch.equal(found[4], wanted[4]), f"cut of {what}"


@EVERY_ISA
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_the_law_is_that_of_the_pipeline(use, isa, ties):
    use(isa)
    for codes in (1, 17, 500):
        for temperature, top_k, top_p in LAWS:
            logits = draw(12, codes, codes, ties)
            found = ops.verify(logits, torch.zeros(12, dtype=torch.int64), temperature, top_k, top_p, *key(12))
            ours, theirs = dense(logits, temperature, found), LogitsPipeline(temperature, top_k, top_p)(logits)
            what = f"V={codes} {temperature, top_k, top_p} {build.ISA[isa]}"
            assert torch.equal(ours.isinf(), theirs.isinf()), f"kept codes of {what}"
            kept = theirs.isfinite()
            worst = (ours[kept] - theirs[kept]).abs().max().item()
            assert worst < 3e-6, f"log-probabilities of {what} differ by {worst:.1e}"  # two roundings of numbers up to 16
            torch.testing.assert_close(found[1], ours[:, 0], atol=0, rtol=0)


@EVERY_ISA
def test_masses_are_exact_enough_to_cut_a_large_vocabulary_where_float64_does(use, isa):
    use(isa)
    logits = 2.5 * draw(40, 16384, removed=0) / 3
    for top_p in (0.3, 0.9, 0.95, 0.99):
        found = ops.verify(logits, torch.full((40,), -1), 1.0, 0, top_p, *key(40))
        kept = keep_top_p(logits.double(), top_p).isfinite()
        wrong = (dense(logits, 1.0, found).isfinite() != kept).any(-1).sum().item()
        assert wrong == 0, f"top_p {top_p}: {wrong} of 40 rows keep other codes than in float64"
        total = dense(logits, 1.0, found).double().exp().sum(-1)
        assert (total - 1).abs().max() < 2e-6, f"the law sums to {total.tolist()}"


def test_equal_logits_at_the_cut_keep_the_smaller_ids(compiled):
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 2, 1, 2, 2, 0]]).mul(math.log(2))  # masses 2 4 4 2 4 4 2 4 4 1 of 31
    for top_p, kept in ((0.0, [1]), (4.1 / 31, [1, 2]), (12.1 / 31, [1, 2, 4, 5]), (24.1 / 31, [0, 1, 2, 4, 5, 7, 8])):
        for isa in range(len(build.ISA)):
            compiled.use_isa(isa)
            found = ops.verify(logits, torch.tensor([2]), 1.0, 0, top_p, *key(1))
            assert dense(logits, 1.0, found)[0].isfinite().nonzero().flatten().tolist() == kept, f"top_p {top_p:.3f}"
            assert found[1].isfinite().item() == (2 in kept)
    ties = ops.verify(logits, torch.tensor([9]), 1.0, 3, 1.0, *key(1))
    assert dense(logits, 1.0, ties)[0].isfinite().sum() == 6 and ties[4].item() == 9, "top-k keeps all ties"


def test_greedy_is_the_first_best_code_without_noise(compiled):
    logits = torch.tensor([[0.0, 3, 1, 3], [5, -torch.inf, 5, 5]])
    for isa in range(len(build.ISA)):
        compiled.use_isa(isa)
        codes, log_p, lse, threshold, last = ops.verify(logits, torch.tensor([1, 3]), 0.0, 2, 0.5, *key(2))
        assert codes.tolist() == last.tolist() == [1, 0]
        assert log_p.tolist() == [0, -math.inf] and lse.tolist() == threshold.tolist() == [3, 5]


@EVERY_ISA
@pytest.mark.parametrize("ramp", [False, True], ids=["scale", "ramp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_guidance_is_rounded_as_torch_rounds_it(use, isa, dtype, ramp):
    """All results are those of the combined logits, to the bit; rows that are not guided do not look at their other half."""
    use(isa)
    for codes in SIZES:
        both, arguments = torch.cat((draw(6, codes, codes), draw(6, codes, codes + 1, removed=0))).to(dtype), key(6)
        cond, uncond = both.chunk(2)
        drafts = torch.arange(-1, 5).clamp(max=codes - 1)
        for guided in (None, torch.tensor([True, False, True, True, False, False])):
            if guided is not None:
                uncond[4] = torch.nan
            rows = reference.guide(cond, uncond, 1.7, ramp, None if guided is None else guided[:, None])
            for law in ((1.0, 0, 1.0), (0.7, 5, 0.9), (0.0, 0, 1.0)):
                found = ops.verify(cond, drafts, *law, *arguments, uncond, 1.7, ramp, guided)
                for ours, theirs in zip(found, ops.verify(rows, drafts, *law, *arguments), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True, msg=f"V={codes} {law} {guided}")


@EVERY_ISA
@pytest.mark.parametrize("law", [(1.0, 0, 1.0), (0.5, 3, 0.9), (0.0, 0, 1.0)], ids=str)
def test_rows_without_a_finite_maximum_are_marked_and_leave_the_others_alone(use, isa, law):
    use(isa)
    for codes in (1, 20, 64, 131):
        logits, arguments = draw(5, codes, removed=0), key(5)
        drafts = torch.tensor([0, 0, -1, 0, 0])
        clean_draw, clean = ops.keyed_argmax(logits, *arguments), ops.verify(logits, drafts, *law, *arguments)
        logits[1] = -torch.inf
        logits[2, codes // 2] = torch.nan
        logits[3, codes - 1] = torch.inf
        assert ops.keyed_argmax(logits, *arguments).tolist() == [clean_draw[0], -1, -1, -1, clean_draw[4]]
        found, wanted = ops.verify(logits, drafts, *law, *arguments), reference.verify(logits, drafts, *law, *arguments)
        assert found[0][1:4].tolist() == found[4][1:4].tolist() == [-1] * 3
        assert found[1][1].isnan() and found[1][2] == 0 and found[1][3].isnan(), "a draft has no log-probability there; none is 0"
        assert found[2][1:4].isnan().all() and found[3][1:4].isnan().all()
        for ours, theirs, before in zip(found, wanted, clean, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0, equal_nan=True)
            assert torch.equal(ours[[0, 4]], before[[0, 4]])


@EVERY_ISA
def test_rows_may_be_views_and_are_not_read_beyond_their_end(use, isa):
    use(isa)
    for codes in (5, 64, 97):
        logits, drafts, arguments = draw(6, codes), torch.arange(6) % codes, key(6)
        wide = torch.full((6, codes + 13), torch.nan)
        wide[:, 3 : 3 + codes] = logits
        turned, one = logits.t().contiguous().t(), logits[:1].expand(6, -1)
        for view, copy in ((wide[:, 3 : 3 + codes], logits), (turned, logits), (one, one.clone())):
            assert torch.equal(ops.keyed_argmax(view, *arguments), ops.keyed_argmax(copy, *arguments))
            for ours, theirs in zip(*(ops.verify(x, drafts, 0.9, 4, 0.8, *arguments) for x in (view, copy)), strict=True):
                assert torch.equal(ours, theirs)
        pairs = torch.stack((arguments[1], arguments[2]), -1)  # ids and positions with a stride
        assert torch.equal(ops.keyed_argmax(logits, arguments[0], *pairs.unbind(-1), *arguments[3:]), ops.keyed_argmax(logits, *arguments))


def test_no_rows_give_no_results(compiled):
    none = torch.zeros(0, dtype=torch.int64)
    for call in (ops, reference):
        assert call.keyed_argmax(torch.zeros(0, 9), 0, none, none, 0).shape == (0,)
        assert [(x.shape, x.dtype) for x in call.verify(torch.zeros(0, 9), none, 1.0, 3, 0.5, 0, none, none, 0)] == [
            ((0,), dtype) for dtype in (torch.int64, torch.float32, torch.float32, torch.float32, torch.int64)
        ]


def test_a_row_depends_on_neither_the_other_rows_nor_the_threads(compiled):
    logits, drafts, (seed, ids, positions, *rest) = draw(40, 3000), torch.arange(40), key(40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.verify(logits, drafts, 0.9, 500, 0.9, seed, ids, positions, *rest)
        draws = ops.keyed_argmax(logits, seed, ids, positions, *rest)
        torch.set_num_threads(3)
        for ours, theirs in zip(ops.verify(logits, drafts, 0.9, 500, 0.9, seed, ids, positions, *rest), alone, strict=True):
            assert torch.equal(ours, theirs), "3 threads differ from 1"
        assert torch.equal(ops.keyed_argmax(logits, seed, ids, positions, *rest), draws)
    finally:
        torch.set_num_threads(threads)
    some = [31, 4]
    few = ops.verify(logits[some], drafts[some], 0.9, 500, 0.9, seed, ids[some], positions[some], *rest)
    for ours, theirs in zip(few, alone, strict=True):
        assert torch.equal(ours, theirs[some]), "two rows differ from forty"


def test_seeds_of_64_bits_are_told_apart(compiled):
    flat, ids = torch.zeros(50, 30), torch.arange(50)
    for seed in (2**64 - 1, 2**63, 2**63 - 1, 2**32, 1):
        wanted = keyed_uniform(seed, ids, ids, Purpose.TOKEN, 30).argmax(-1)
        assert torch.equal(kernels.keyed_argmax(flat, seed, ids, ids, Purpose.TOKEN), wanted), seed
        assert torch.equal(kernels.verify(flat, ids % 30, 1.0, 0, 1.0, seed, ids, ids, Purpose.TOKEN)[0], wanted), seed


@EVERY_ISA
def test_residual_draws_are_those_of_the_definition(use, isa):
    use(isa)
    for codes in SIZES:
        for law in ((1.0, 0, 1.0), (0.7, 40, 0.9), (0.0, 0, 1.0)):
            for dtype, guided in ((torch.float32, False), (torch.bfloat16, True)):
                call = residual_call(codes, law, dtype=dtype, guided=guided)
                same_residual_draws(ops.draw_residual(*call), call, f"V={codes} {law} {dtype} {build.ISA[isa]}")


@EVERY_ISA
def test_residual_draws_follow_the_residual(use, isa):
    """20 000 draws of 40 codes: total variation 0.03 is above what 20 000 exact draws reach with a chance of 1e-4; the seed is fixed."""
    use(isa)
    (p, how), (q, q_how), ids = laws(1, 40, (1.0, 0, 1.0), 5), laws(1, 40, (1.0, 0, 1.0), 6), torch.arange(20_000)
    zeros = torch.zeros_like(ids)
    codes = ops.draw_residual(p, how, zeros, q, q_how, zeros, zeros, None, None, 1, ids, zeros, 0)
    rest = (reference.log_law(p, how, zeros[:1]).exp() - reference.log_law(q, q_how, zeros[:1]).exp()).clamp_min(0)[0]
    distance = (torch.bincount(codes, minlength=40) / 20_000 - rest / rest.sum()).abs().sum().item() / 2
    assert distance < 0.03, f"total variation {distance:.3f}"


@EVERY_ISA
def test_residuals_without_mass_are_drawn_from_the_law(use, isa):
    use(isa)
    for codes in (1, 33, 1100):
        p, how = laws(4, codes, (1.0, 0, 1.0), codes)
        at, drafts = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        found, log_p = ops.draw_residual(p, how, at, p, how, at, drafts, None, None, *key(4)), reference.log_law(p, how, at)
        same_codes(found, reference.keyed_argmax(log_p, *key(4)), log_p, key(4), f"V={codes}")
        p[0][:3, 1:] = -torch.inf  # one code is left
        p[0][1, 0], p[0][2, 0] = torch.nan, -torch.inf
        law = [*p[:3], *ops.verify(p[0], drafts, 1.0, 0, 1.0, *key(4))[2:]]
        call = (law, how, at, [], [], torch.tensor([-1, -1, -2, -1]), drafts, None, None, *key(4))
        found = ops.draw_residual(*call)
        assert found[:3].tolist() == [0, -1, -1] and torch.equal(found, reference.draw_residual(*call))


def test_draws_from_laws_that_are_not_there_are_refused(compiled):
    call = list(residual_call(20))
    for i, row, value in ((2, 0, 27), (5, 0, 4), (6, 3, 20), (6, 3, -1), (8, 6, 3)):
        wrong = call.copy()
        wrong[i] = call[i].clone()
        wrong[i][row] = value
        with pytest.raises(RuntimeError, match=f"draw {row} is from law"):
            ops.draw_residual(*wrong)
    with pytest.raises(RuntimeError, match="draw 0 is from law"):
        ops.draw_residual(*call[:3], [], [], *call[5:])


def test_scans_stop_at_the_first_draft_that_falls(compiled):
    generator = torch.Generator().manual_seed(0)
    for rows, m in ((1, 1), (3, 7), (40, 33), (5, 0)):
        drafts, known = torch.randint(5, (rows, m), generator=generator), torch.randint(0, m + 1, (rows,), generator=generator) // 2
        drawn = torch.where(torch.rand(rows, m, generator=generator) < 0.8, drafts, drafts + 1)
        ratio, uniform = 3 * torch.rand(rows, 2 * m, generator=generator), torch.rand(rows, 2 * m, generator=generator)
        ratio[-1] = torch.nan
        for given in ((drafts, drawn, known), (drafts, drawn, known, ratio[:, :m], uniform[:, m:])):
            assert torch.equal(kernels.accept_scan(*given), reference.accept_scan(*given)), f"{rows} x {m}"


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_opcheck_accepts_the_ops(compiled, ties):
    logits, arguments = draw(4, 40, ties=ties), key(4)
    torch.library.opcheck(ops.keyed_argmax, (logits, *arguments))
    torch.library.opcheck(ops.verify, (logits, torch.arange(4), 0.9, 7, 0.9, *arguments))
    guided = torch.tensor([True, False, True, True])
    torch.library.opcheck(ops.accept_scan, (logits.long(), logits.long(), torch.arange(4)))
    torch.library.opcheck(ops.accept_scan, (logits.long(), logits.long(), torch.arange(4), logits, logits.flip(0)))
    torch.library.opcheck(ops.draw_residual, residual_call(40, guided=True))
    torch.library.opcheck(ops.verify, (logits, torch.arange(4), 0.9, 7, 0.9, *arguments, draw(4, 40, 1, removed=0), 2.0, False, guided))


def test_compiled_graphs_contain_the_ops(compiled):
    logits, drafts, arguments = draw(4, 40), torch.arange(4), key(4)

    def both(logits):
        return kernels.keyed_argmax(logits, *arguments), *kernels.verify(logits, drafts, 1.0, 7, 0.9, *arguments)

    wanted = both(logits)  # back ends are chosen outside the graph
    graph = torch.compile(both, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(graph(logits), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_public_functions_take_any_float_type_and_leave_gradients_to_torch(compiled):
    logits, drafts, arguments = draw(4, 40, removed=0), torch.arange(4), key(4)
    for dtype in (torch.bfloat16, torch.float64):
        cast = logits.to(dtype)
        halves = kernels.verify(cast, drafts, 1.0, 7, 0.9, *arguments, cast.flip(0).float(), 1.5)
        combined = reference.guide(cast, cast.flip(0), 1.5)
        for ours, theirs in zip(halves, ops.verify(combined, drafts, 1.0, 7, 0.9, *arguments), strict=True):
            assert torch.equal(ours, theirs), dtype
        for ours, theirs in zip(
            kernels.verify(cast, drafts, 1.0, 7, 0.9, *arguments), ops.verify(cast.float(), drafts, 1.0, 7, 0.9, *arguments), strict=True
        ):
            assert torch.equal(ours, theirs), dtype
        assert torch.equal(kernels.keyed_argmax(cast, *arguments), ops.keyed_argmax(cast.float(), *arguments))
    assert kernels.fuses_noise(logits) and not kernels.fuses_noise(logits.clone().requires_grad_())
    logits.requires_grad_()
    kernels.verify(logits, drafts, 1.0, 0, 1.0, *arguments)[2].sum().backward()  # the gradient of log-sum-exp is the softmax
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1))


def test_reference_can_be_chosen(monkeypatch):
    logits, drafts, arguments = draw(9, 40), torch.arange(9), key(9)
    monkeypatch.setitem(reference.NOISE_ELEMENTS, "cpu", 100)  # two rows of noise at a time
    try:
        kernels.set_backend("reference")
        assert not kernels.fuses_noise(logits)
        found, codes = kernels.verify(logits, drafts, 1.0, 7, 0.9, *arguments), kernels.keyed_argmax(logits, *arguments)
    finally:
        kernels.set_backend("auto")
    monkeypatch.setitem(reference.NOISE_ELEMENTS, "cpu", 1 << 16)
    assert torch.equal(codes, reference.keyed_argmax(logits, *arguments))
    for ours, theirs in zip(found, reference.verify(logits, drafts, 1.0, 7, 0.9, *arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logits": torch.zeros(4)}, "one row of V >= 1"),
        ({"logits": torch.zeros(4, 0)}, "one row of V >= 1"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"ids has shape \(3,\)"),
        ({"positions": torch.zeros(4)}, "positions has shape .* torch.float32"),
        ({"drafts": torch.zeros(4, 1, dtype=torch.int64)}, "drafts has shape"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused_by_name(change, words):
    given = {name: torch.zeros(4, dtype=torch.int64) for name in ("drafts", "ids", "positions")}
    given = {"logits": torch.zeros(4, 9), **given, **change}
    with pytest.raises(ConfigError, match=words):
        kernels.verify(given["logits"], given["drafts"], 1.0, 0, 1.0, 0, given["ids"], given["positions"], 0)
    if "drafts" not in change:
        with pytest.raises(ConfigError, match=words):
            kernels.keyed_argmax(given["logits"], 0, given["ids"], given["positions"], 0)


def test_halves_of_two_shapes_are_refused():
    ids = torch.arange(4)
    with pytest.raises(ConfigError, match=r"halves have shapes \(4, 9\) and \(4, 8\)"):
        kernels.verify(torch.zeros(4, 9), ids, 1.0, 0, 1.0, 0, ids, ids, 0, 0, torch.zeros(4, 8))


def test_a_draft_outside_the_vocabulary_is_refused(compiled):
    ids = torch.arange(2)
    with pytest.raises(RuntimeError, match="draft 9 is not among 9 codes"):
        ops.verify(torch.zeros(2, 9), torch.tensor([8, 9]), 1.0, 0, 1.0, 0, ids, ids, 0)
