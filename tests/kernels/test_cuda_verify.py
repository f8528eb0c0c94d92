"""The CUDA kernels verify and keyed_argmax: the same integers from the key as on the CPU, on the emulated device and on a real one."""

import math

import pytest
import torch
from cuda_emulation import TARGETS
from verify_cases import draw, key, laws, residual_call, same_codes, same_residual_draws

from arsp.kernels import reference
from arsp.rng import keyed_uniform

SIZES = (1, 3, 17, 500, 1025, 2500)
RESULTS = ("codes", "log_p", "lse", "threshold", "last")
LAWS = [(1.0, k, p) for k in (0, 1, 5, 100, 2000) for p in (1.0, 0.9012, 0.0)]
LAWS += [(0.5, 0, 0.5012), (0.5, 100, 1.0), (0.0, 0, 1.0)]  # temperatures that are powers of two: torch divides by others in two ways


def kept_of(logits, temperature, found):
    threshold, last = found[3].unsqueeze(-1), found[4].unsqueeze(-1)
    scaled = logits / (max(temperature, 1e-5) if temperature else 1.0)
    return scaled, (scaled > threshold) | ((scaled == threshold) & (torch.arange(logits.shape[-1]) <= last))


@TARGETS
def test_the_noise_is_that_of_keyed_uniform_bit_for_bit(target):
    """Flat weights: the code of the largest uniform, the smallest on ties, among any subset of the codes."""
    for codes in SIZES:
        arguments = key(20, codes)
        kept = draw(20, codes, codes, removed=0.5).isfinite()
        flat = torch.zeros(20, codes).masked_fill(~kept, -torch.inf)
        uniform = keyed_uniform(*arguments[:4], codes, arguments[4]).masked_fill(~kept, -1)
        assert torch.equal(target("keyed_argmax", flat, *arguments), uniform.argmax(-1)), f"V={codes}"


@TARGETS
@pytest.mark.parametrize("spread", [0.01, 1.0, 1e6])
def test_draws_are_those_of_the_reference(target, spread):
    for codes in SIZES:
        log_w, arguments = spread * draw(10, codes, codes), key(10, codes)
        found = target("keyed_argmax", log_w, *arguments)
        same_codes(found, reference.keyed_argmax(log_w, *arguments), log_w, arguments, f"V={codes} spread {spread}")


@TARGETS
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_everything_is_that_of_the_reference(target, ties):
    for codes in (1, 17, 500, 2500):
        for temperature, top_k, top_p in LAWS:
            logits, arguments = draw(2, codes, codes, ties), key(2, codes)
            call = (logits, torch.tensor([-1, codes // 2]), temperature, top_k, top_p, *arguments)
            found, wanted, what = target("verify", *call), reference.verify(*call), f"V={codes} {temperature, top_k, top_p}"
            scaled, kept = kept_of(logits, temperature, wanted)
            same_codes(found[0], wanted[0], (scaled - wanted[2].unsqueeze(-1)).masked_fill(~kept, -torch.inf), arguments, what)
            for name, ours, theirs in zip(("log_p", "lse"), found[1:3], wanted[1:3], strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0, msg=lambda m, n=name, w=what: f"{n}, {w}: {m}")
            assert torch.equal(found[3], wanted[3]) and torch.equal(found[4], wanted[4]), f"cut of {what}"


@TARGETS
@pytest.mark.parametrize("ramp", [False, True], ids=["scale", "ramp"])
def test_guidance_is_rounded_as_torch_rounds_it(target, ramp):
    """All results are those of the combined logits, to the bit; rows that are not guided do not look at their other half."""
    for codes, dtype in ((1, torch.float32), (17, torch.bfloat16), (500, torch.float32), (1025, torch.bfloat16), (20000, torch.float32)):
        both, arguments = torch.cat((draw(4, codes, codes), draw(4, codes, codes + 1, removed=0))).to(dtype), key(4)
        cond, uncond = both.chunk(2)
        drafts = torch.tensor([-1, codes // 2, 0, codes - 1])
        for guided in (None, torch.tensor([True, False, True, True])):
            if guided is not None:
                uncond[1] = torch.nan
            rows = reference.guide(cond, uncond, 1.7, ramp, None if guided is None else guided[:, None])
            for law in ((1.0, 0, 1.0), (0.5, 100, 0.9)) if codes < 20000 else ((1.0, 900, 1.0),):
                found = target("verify", cond, drafts, *law, *arguments, uncond, 1.7, ramp, guided)
                for name, ours, theirs in zip(RESULTS, found, target("verify", rows, drafts, *law, *arguments), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True, msg=f"{name}, V={codes} {law} {guided}")


@TARGETS
@pytest.mark.parametrize("codes", [16384, 20000, 65536])  # 20 000 and more do not fit into shared memory
def test_large_vocabularies_are_cut_where_float64_cuts_them(target, codes):
    logits, arguments = 2.5 * draw(2, codes, removed=0) / 3, key(2)
    for top_k, top_p in ((2000, 1.0), (0, 0.95), (900, 0.96)):
        call = (logits, torch.tensor([-1, 5]), 1.0, top_k, top_p, *arguments)
        found, wanted = target("verify", *call), reference.verify(*call)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[3], wanted[3]) and torch.equal(found[4], wanted[4]), f"{top_k, top_p}"
        torch.testing.assert_close(found[2], wanted[2], atol=2e-6, rtol=0)


@TARGETS
def test_values_of_every_magnitude_are_told_apart(target):
    """Selections whose bins hold next to everything: a narrow row with one value far away, neighbouring floats, signed zeros."""
    narrow = 1 + torch.arange(3000) * 2.0**-23
    far = torch.cat([narrow, torch.tensor([-1e30, 3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0])])
    powers = -torch.exp2(torch.arange(-140, 127).float())
    for row in (narrow, far, powers, torch.zeros(2000), torch.cat([torch.zeros(900), -torch.zeros(900)])):
        logits, arguments = torch.stack([row, row.flip(0)]), key(2)
        for top_k, top_p in ((1, 1.0), (7, 1.0), (len(row) // 2, 1.0), (len(row) - 1, 1.0), (0, 0.3107), (50, 0.7103)):
            call = (logits, torch.tensor([0, 1]), 1.0, top_k, top_p, *arguments)
            found, wanted = target("verify", *call), reference.verify(*call)
            assert torch.equal(found[3], wanted[3]) and torch.equal(found[4], wanted[4]), f"{len(row)} codes, {top_k, top_p}"
            torch.testing.assert_close(found[1:3], wanted[1:3], atol=2e-6, rtol=1e-6)


@TARGETS
def test_equal_logits_at_the_cut_keep_the_smaller_ids(target):
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 2, 1, 2, 2, 0]]).mul(math.log(2))  # masses 2 4 4 2 4 4 2 4 4 1 of 31
    for top_p, kept in ((0.0, [1]), (4.1 / 31, [1, 2]), (12.1 / 31, [1, 2, 4, 5]), (24.1 / 31, [0, 1, 2, 4, 5, 7, 8])):
        found = target("verify", logits, torch.tensor([2]), 1.0, 0, top_p, *key(1))
        assert kept_of(logits, 1.0, found)[1][0].nonzero().flatten().tolist() == kept, f"top_p {top_p:.3f}"
        assert found[1].isfinite().item() == (2 in kept)


@TARGETS
@pytest.mark.parametrize("law", [(1.0, 0, 1.0), (0.5, 3, 0.9), (0.0, 0, 1.0)], ids=str)
def test_rows_without_a_finite_maximum_are_marked_and_leave_the_others_alone(target, law):
    for codes in (1, 20, 1131):
        logits, arguments = draw(5, codes, removed=0), key(5)
        drafts = torch.tensor([0, 0, -1, 0, 0])
        clean = target("verify", logits, drafts, *law, *arguments)
        logits[1] = -torch.inf
        logits[2, codes // 2] = torch.nan
        logits[3, codes - 1] = torch.inf
        assert target("keyed_argmax", logits, *arguments)[1:4].tolist() == [-1] * 3
        found, wanted = target("verify", logits, drafts, *law, *arguments), reference.verify(logits, drafts, *law, *arguments)
        for ours, theirs, before in zip(found, wanted, clean, strict=True):
            torch.testing.assert_close(ours[1:4], theirs[1:4], atol=0, rtol=0, equal_nan=True)
            assert torch.equal(ours[[0, 4]], before[[0, 4]])


@TARGETS
def test_rows_may_be_views(target):
    logits, drafts, arguments = draw(3, 97), torch.arange(3), key(3)
    halves = torch.cat((logits, draw(3, 97, 1, removed=0), torch.full((3, 9), torch.nan)), 1)
    apart = target("verify", logits, drafts, 1.0, 4, 0.8, *arguments, halves[:, 97:194], 1.7)
    for ours, theirs in zip(
        target("verify", halves[:, :97], drafts, 1.0, 4, 0.8, *arguments, halves[:, 97:194].clone(), 1.7), apart, strict=True
    ):
        assert torch.equal(ours, theirs)
    wide = torch.full((3, 110), torch.nan)
    wide[:, 3:100] = logits
    wanted = target("verify", logits, drafts, 1.0, 4, 0.8, *arguments)
    for view in (wide[:, 3:100], logits.t().contiguous().t()):
        for ours, theirs in zip(target("verify", view, drafts, 1.0, 4, 0.8, *arguments), wanted, strict=True):
            assert torch.equal(ours, theirs)
    none = torch.zeros(0, dtype=torch.int64)
    assert target("keyed_argmax", torch.zeros(0, 9), 0, none, none, 0).shape == (0,)


@TARGETS
def test_scans_stop_at_the_first_draft_that_falls(target):
    """Rows in which all stand, none stands or one in the middle falls; some are known already, however they compare."""
    generator = torch.Generator().manual_seed(0)
    for rows, m in ((1, 1), (3, 7), (5, 32), (40, 33), (2, 100)):
        drafts, known = torch.randint(5, (rows, m), generator=generator), torch.randint(0, m + 1, (rows,), generator=generator) // 2
        drawn = torch.where(torch.rand(rows, m, generator=generator) < 1 - 2 / m, drafts, drafts + 1)
        ratio, uniform = 3 * torch.rand(rows, m, generator=generator), torch.rand(rows, m, generator=generator)
        drawn[0], ratio[0], known[-1] = drafts[0], torch.inf, m
        drawn[-1], ratio[-1] = -1, torch.nan
        wide = [torch.cat((x, x), 1)[:, :m] for x in (drafts, drawn, ratio, uniform)]
        for given in ((drafts, drawn, known), (drafts, drawn, known, ratio, uniform), (*wide[:2], known), (*wide[:2], known, *wide[2:])):
            found, wanted = target("accept_scan", *given), reference.accept_scan(*given)
            assert torch.equal(found, wanted) and wanted[0] == m == wanted[-1], f"{rows} x {m}"
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert target("accept_scan", none, none, none[:, 0]).shape == (0,)


@TARGETS
def test_residual_draws_are_those_of_the_definition(target):
    for codes in (1, 2, 17, 500, 1025):
        for law in ((1.0, 0, 1.0), (0.5, 40, 0.9), (0.0, 0, 1.0)):
            for dtype, guided in ((torch.float32, False), (torch.bfloat16, True)):
                call = residual_call(codes, law, dtype=dtype, guided=guided)
                same_residual_draws(target("draw_residual", *call), call, f"V={codes} {law} {dtype}")
                same_residual_draws(reference.draw_residual(*call), call, f"reference, V={codes} {law} {dtype}")
    call = residual_call(20000, (1.0, 900, 1.0), guided=True)  # does not fit into shared memory
    same_residual_draws(target("draw_residual", *call), call, "V=20000")


@TARGETS
def test_residuals_without_mass_are_drawn_from_the_law(target):
    """p against itself and a certain draft that is the only possible code; a law with NaN or nothing at all gives -1; no recorded laws."""
    for codes in (1, 33, 1100):
        p, how = laws(4, codes, (1.0, 0, 1.0), codes)
        at, drafts = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        found = target("draw_residual", p, how, at, p, how, at, drafts, None, None, *key(4))
        log_p = reference.log_law(p, how, at)
        same_codes(found, reference.keyed_argmax(log_p, *key(4)), log_p, key(4), f"V={codes}")
        p[0][:3, 1:] = -torch.inf  # one code is left
        p[0][1, 0], p[0][2, 0] = torch.nan, -torch.inf
        found = reference.verify(p[0], drafts, 1.0, 0, 1.0, *key(4))
        call = ([*p[:3], *found[2:]], how, at, [], [], torch.tensor([-1, -1, -2, -1]), drafts, None, None, *key(4))
        found = target("draw_residual", *call)
        assert found[:3].tolist() == [0, -1, -1] and torch.equal(found, reference.draw_residual(*call))


@TARGETS
def test_draws_from_laws_that_are_not_there_give_no_code(target):
    call = list(residual_call(20))
    found = target("draw_residual", *call)
    for i, row, value in ((2, 0, 27), (5, 0, 4), (8, 6, 3), (8, 7, -1)):
        wrong = call.copy()
        wrong[i] = call[i].clone()
        wrong[i][row] = value
        assert target("draw_residual", *wrong).tolist() == [-1 if r == row else code for r, code in enumerate(found.tolist())]


@TARGETS
def test_a_draw_depends_on_its_own_row_alone(target):
    call = residual_call(300)
    found = target("draw_residual", *call)
    some = torch.tensor([7, 0, 3])
    picked = [x[some] if i in (2, 5, 6, 8, 10, 11) else x for i, x in enumerate(call)]
    assert torch.equal(target("draw_residual", *picked), found[some])
    none = [x[:0] if i in (2, 5, 6, 8, 10, 11) else x for i, x in enumerate(call)]
    assert target("draw_residual", *none).shape == (0,)
