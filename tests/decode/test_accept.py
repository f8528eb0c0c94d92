"""Acceptance rules: the valid scheme on recorded decisions and in its corners, and what each relaxed rule computes."""

import math

import pytest
import torch

import arsp.decode.jacobi
from arsp.decode.accept import RESIDUAL_FLOOR, ExactRule, GroupRule, LanternRule, group_ratio, resample, residual
from arsp.decode.drafts import ONE_HOT, UNIFORM, Tape
from arsp.decode.filters import LogitsPipeline
from arsp.decode.jacobi import Chain, Redraw
from arsp.decode.law import Law
from arsp.errors import ConfigError, NumericalError
from arsp.kernels.reference import leading
from arsp.protocols import Request
from arsp.rng import Purpose
from arsp.testing.golden import find_cases
from arsp.tokenizers.geometry import CodebookGeometry


def random_laws(rows, positions, codes, seed=0, spread=1.5):
    return torch.softmax(spread * torch.randn(rows, positions, codes, generator=torch.Generator().manual_seed(seed)), -1)


def tape_of(q_BmV, drafts_Bm, seed=0):
    """Drafts for the first positions whose recorded laws are ``q``."""
    num, m, V = q_BmV.shape
    tape = Tape.of(Request(torch.arange(num), seed), m + 1, V)
    tape.codes_BL[:, :m] = drafts_Bm
    tape.source_BL[:, :m] = torch.arange(m)
    tape.laws, tape.drafted_B = Law.of_weights(q_BmV.log()), torch.full((num,), m)
    return tape


def positions_of(drafts_Bm):
    return torch.arange(drafts_Bm.shape[1]).expand(drafts_Bm.shape)


def law_of(p_BmV):
    return LogitsPipeline().law(p_BmV.log())


def exact_ratio(p, q, drafts):
    positions, law = positions_of(drafts), law_of(p)
    log_p = law.log_prob(drafts.unsqueeze(-1)).squeeze(-1)
    return ExactRule().ratio(law, log_p, tape_of(q, drafts), positions, drafts)


# -- one draft, exactly -----------------------------------------------------------------------------------------------------


def test_accept_or_residual_gives_the_law_itself():
    """Summed over all drafts and outcomes, in closed form: q(y) min(1, p/q) + (1 - sum) R = p."""
    p, q = random_laws(40, 1, 9, 0), random_laws(40, 1, 9, 1)
    every = torch.arange(9).expand(40, 9)
    ratio = exact_ratio(p.expand(-1, 9, -1), q.expand(-1, 9, -1), every)
    accepted = q[:, 0] * ratio.clamp(max=1)
    out = accepted + (1 - accepted.sum(-1, keepdim=True)) * residual(p, q)[:, 0]
    worst = (out - p[:, 0]).abs().max().item()
    assert worst < 1e-6, worst


def test_a_draft_from_the_law_itself_is_never_rejected():
    p = random_laws(50, 3, 11)
    drafts = torch.randint(0, 11, (50, 3), generator=torch.Generator().manual_seed(1))
    tape = tape_of(p, drafts)
    ratio = exact_ratio(p, p, drafts)
    assert (ratio > tape.uniform_BL[:, :3]).all() and (ratio - 1).abs().max() < 1e-5
    assert torch.equal(residual(p, p), p), "nothing is left of p - p: p itself"


def test_a_residual_without_mass_is_the_law_and_has_no_nan():
    p = random_laws(1, 1, 6)
    q = p.clone()
    q[..., 0] += 0.5 * RESIDUAL_FLOOR
    assert torch.equal(residual(p, q), p)
    one = torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(residual(one, one), one)


def test_the_residual_is_normalised_and_lives_where_p_exceeds_q():
    p, q = random_laws(200, 1, 7, 2), random_laws(200, 1, 7, 3)
    r = residual(p, q)
    assert (r.sum(-1) - 1).abs().max() < 1e-6 and ((r > 0) == (p > q)).all()


def test_greedy_laws_accept_the_best_code_and_nothing_else():
    """p one-hot: the drafts equal to the argmax stand, others are replaced by it, whatever the draft's law."""
    logits = torch.randn(20, 1, 8, generator=torch.Generator().manual_seed(4))
    law = LogitsPipeline(temperature=0.0).law(logits)
    best = logits.argmax(-1)
    for drafts in (best, (best + 1) % 8):
        tape = tape_of(random_laws(20, 1, 8, 5), drafts)
        ratio = ExactRule().ratio(law, law.log_prob(drafts.unsqueeze(-1)).squeeze(-1), tape, positions_of(drafts), drafts)
        assert (ratio >= 1).all() if drafts is best else (ratio == 0).all(), ratio
    codes = resample(law, tape, torch.arange(20), torch.zeros(20, 1, dtype=torch.int64), torch.zeros(20, 1).long(), Purpose.RESAMPLE)
    assert torch.equal(codes, best)


def test_a_draft_its_law_does_not_know_stands_if_the_target_does():
    p = torch.tensor([[[0.5, 0.5, 0.0]]])
    q = torch.tensor([[[0.0, 1.0, 0.0]]])
    for code, expected in ((0, math.inf), (1, 0.5), (2, 0.0)):
        assert exact_ratio(p, q, torch.tensor([[code]])).item() == pytest.approx(expected), code


def test_a_certain_guess_stands_with_the_probability_of_its_code():
    p, drafts = random_laws(5, 2, 4), torch.tensor([[0, 1]]).expand(5, 2)
    tape = tape_of(p, drafts)
    tape.source_BL[:, :2] = torch.tensor([ONE_HOT, UNIFORM])
    law = law_of(p)
    ratio = ExactRule().ratio(law, law.log_prob(drafts.unsqueeze(-1)).squeeze(-1), tape, positions_of(drafts), drafts)
    torch.testing.assert_close(ratio, torch.stack((p[:, 0, 0], 4 * p[:, 1, 1]), 1), rtol=1e-5, atol=0)


def test_leading_counts_up_to_the_first_failure():
    assert leading(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()).tolist() == [2, 0, 4]
    assert leading(torch.zeros(3, 0, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_resampling_follows_the_residual():
    """30 000 draws of 6 codes: total variation 0.03 would need luck of less than 1e-6; the seed is fixed."""
    p, q = random_laws(1, 1, 6, 6), random_laws(1, 1, 6, 7)
    num, zeros = 30_000, torch.zeros(30_000, 1, dtype=torch.int64)
    tape = tape_of(q.expand(num, 1, 6), zeros)
    codes = resample(law_of(p.expand(num, 1, 6)), tape, torch.arange(num), zeros, zeros, Purpose.RESAMPLE)
    frequencies = torch.bincount(codes.flatten(), minlength=6) / num
    assert 0.5 * (frequencies - residual(p, q)[0, 0]).abs().sum() < 0.03


# -- recorded decisions -----------------------------------------------------------------------------------------------------


class RecordedTape(Tape):
    """With the recorded uniforms of residuals, and what was drawn from with them."""

    residual_uniform: torch.Tensor
    drawn_from: dict


def recorded_resample(law, tape, rows, index, positions, purpose, stream=0):
    """The smallest code whose cumulative probability under the residual exceeds the recorded uniform."""
    p = residual(law.at(rows, index.clamp_min(0)).log_probs().exp(), tape.q(rows, positions))[:, 0]
    tape.drawn_from.update({row: p[row] for row in (index[:, 0] >= 0).nonzero().flatten().tolist()})
    return (p.double().cumsum(-1) > tape.residual_uniform[:, None]).to(torch.int8).argmax(-1, keepdim=True)


class Recorded:
    """Decoder, drafter and pipeline of one recorded pass."""

    def __init__(self, io):
        self.io = io

    def step(self, state, codes, nodes=None):
        assert torch.equal(codes, self.io["draft_tokens"][:, 1:])
        return self.io["advanced_prob"].log()

    def fill(self, tape, stop_B):
        assert (stop_B == tape.drafted_B).all()

    def verify(self, logits, drafts, seed, ids, positions, purpose, stream=0):
        law = LogitsPipeline().law(logits)
        return law, self.io["advanced_tokens"], law.log_prob(drafts.unsqueeze(-1)).squeeze(-1)


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="sjd_verify"), ids=str)
def test_a_pass_decides_like_the_official_one_on_its_uniforms(case, monkeypatch):
    """Accepted counts and all codes exact, residual laws to 1e-6."""
    B, L, V = (case.config[key] for key in "BLV")
    io = case.io
    tape = RecordedTape(**vars(tape_of(io["draft_prob"][:, 1:], io["draft_tokens"][:, 1:])))
    tape.uniform_BL[:, : L - 1] = io["uniforms"][:, 1:]
    tape.residual_uniform, tape.drawn_from, recorded = io["residual_uniform"], {}, Recorded(io)
    monkeypatch.setattr(arsp.decode.jacobi, "resample", recorded_resample)
    advance = Chain(recorded, recorded, ExactRule(), Redraw("fresh")).advance(recorded, None, tape, L - 1)

    assert torch.equal(tape.known_B, io["first_misaligned"]), "codes of a pass: accepted drafts and one more"
    assert torch.equal(advance.accepted_B, io["first_misaligned"] - 1) and (advance.tested_B == L - 1).all()
    assert torch.equal(tape.codes_BL, io["output_tokens"]), "committed codes, then the next drafts"
    rejected = (io["first_misaligned"] < L).nonzero().flatten().tolist()
    assert sorted(tape.drawn_from) == rejected
    for row in rejected:
        worst = (tape.drawn_from[row] - io["residual_prob"][row]).abs().max().item()
        assert worst < 1e-6, f"residual of row {row} differs by {worst:.1e}"
    q = tape.q(torch.arange(B), positions_of(tape.codes_BL))
    behind = torch.arange(L) >= tape.known_B[:, None]
    worst = (q - io["advanced_prob"])[behind].abs().max().item()
    assert worst < 1e-6, f"the law recorded for the next drafts is p; it differs by {worst:.1e}"


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="gsd_group"), ids=str)
def test_groups_give_the_recorded_ratios(case):
    """Ratios to 1e-5, the first rejection exact; through the whole rule as through its parts."""
    config, io = case.config, case.io
    drafts, p, q = io["draft_tokens"][:, 1:], io["advanced_prob"][:, :-1], io["draft_prob"][:, 1:]
    rule = GroupRule(io["embedding"], config["half_window"], config["p_thr"], config["d_thr"])
    own = drafts.unsqueeze(-1)
    plain = p.gather(-1, own).squeeze(-1) / q.gather(-1, own).squeeze(-1)
    group, inside = rule.group(io["advanced_logits"][:, :-1], p, drafts)
    parts = group_ratio(p.gather(-1, group), q.gather(-1, group), inside, plain)
    law = law_of(p)
    whole = rule.ratio(law, law.log_prob(own).squeeze(-1), tape_of(q, drafts), positions_of(drafts), drafts)
    for name, ratio in (("parts", parts), ("rule", whole)):
        worst = (ratio.clamp(max=1) - io["accept_ratio"][:, 1:]).abs().max().item()
        assert worst < 1e-5, f"{name}: {worst:.1e}"
        assert torch.equal(1 + leading(io["uniforms"][:, 1:] < ratio), io["first_misaligned"]), name
    worst = (plain.clamp(max=1) - io["plain_ratio"]).abs().max().item()
    assert worst < 1e-5, f"plain ratios: {worst:.1e}"


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="lantern"), ids=str)
def test_relaxed_probabilities_are_the_recorded_ones(case):
    """Probabilities to 1e-5, sizes of the sets and nearest codes exact, for every recorded bound."""
    io, every = case.io, torch.arange(case.config["V"])
    nearest = CodebookGeometry(io["codebook"]).nearest(case.config["V"] - 1)
    assert torch.equal(nearest, io["nearest"])
    near = nearest[:, : case.config["k"]]
    p = io["target_prob"]
    for i, delta in enumerate(case.config["deltas"]):
        added, count = LanternRule(near, delta).borrowed(p, p[near])
        worst = (p + added - io[f"relaxed_prob.{i}"]).abs().max().item()
        assert worst < 1e-5 and torch.equal(count, io[f"set_size.{i}"]), f"delta {delta}: {worst:.1e}"
        law, q = law_of(p.expand(1, len(p), -1)), random_laws(1, len(p), len(p), 3)
        tape = tape_of(q, every[None])
        ratio = LanternRule(near, delta).ratio(law, p.log()[None], tape, positions_of(every[None]), every[None])
        torch.testing.assert_close(ratio[0], io[f"relaxed_prob.{i}"] / q[0].diagonal(), rtol=1e-4, atol=1e-5)


# -- relaxed rules ----------------------------------------------------------------------------------------------------------


def test_a_group_of_one_is_the_exact_rule():
    """No code is near another one: each group holds its draft alone, and the ratio is p / q."""
    p, q = random_laws(4, 3, 30, 0), random_laws(4, 3, 30, 1)
    drafts = torch.randint(0, 30, (4, 3), generator=torch.Generator().manual_seed(2))
    far = GroupRule(100 * torch.eye(30), half_window=3)
    group, inside = far.group(p, p, drafts)
    ratio = group_ratio(p.gather(-1, group), q.gather(-1, group), inside, torch.full(drafts.shape, torch.nan))
    reached = inside.any(-1)
    assert reached.any() and (inside.sum(-1) <= 1).all() and (group[inside] == drafts[reached]).all()
    torch.testing.assert_close(ratio[reached], exact_ratio(p, q, drafts)[reached], rtol=1e-5, atol=0)


def test_the_group_falls_back_where_ranks_run_out_and_is_cut_at_the_top():
    p = torch.arange(1.0, 7.0).div(21)[None, None]
    rule = GroupRule(torch.zeros(6, 2), half_window=2, p_distance=1.0)
    for code, members in ((0, []), (1, []), (2, [0, 1, 2, 3]), (4, [2, 3, 4, 5]), (5, [3, 4, 5])):
        group, inside = rule.group(p, p, torch.tensor([[code]]))
        assert sorted(group[inside].tolist()) == members, code
    q = torch.full((1, 1, 6), 1 / 6)
    law = law_of(p)
    ratio = rule.ratio(law, p.log()[..., 5], tape_of(q, torch.tensor([[5]])), torch.zeros(1, 1).long(), torch.tensor([[5]]))
    assert ratio.item() == pytest.approx((4 + 5 + 6) / 21 / 0.5)


def test_a_group_without_draft_probability_is_rejected():
    inside = torch.tensor([[[True, True]], [[False, False]]])
    ratio = group_ratio(torch.full((2, 1, 2), 0.25), torch.zeros(2, 1, 2), inside, torch.tensor([[7.0], [7.0]]))
    assert ratio.flatten().tolist() == [0.0, 7.0], "no mass: 0; no group: the plain ratio"


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_out_of_range_is_refused(bound):
    with pytest.raises(ConfigError, match="bound"):
        LanternRule(torch.zeros(3, 2, dtype=torch.int64), bound)


def test_what_is_borrowed_never_exceeds_the_bound_and_says_so():
    p = random_laws(1, 200, 40, 8).squeeze(0)
    near = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:12] for i in range(40)])
    own = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(9))
    own_p, near_p = p.gather(1, own[:, None]).squeeze(1), p.gather(1, near[own])
    for bound in (0.01, 0.3, 1.0, 1.5, 4.0):
        rule = LanternRule(near, bound)
        added, count = rule.borrowed(own_p, near_p)
        limit = torch.full_like(own_p, bound) if bound <= 1 else (bound - 1) * own_p
        assert (added <= limit).all() and (count > 0).any(), bound
        assert rule.exactness == (f"bounded({bound:g})" if bound <= 1 else f"bounded({bound - 1:g} p)")
        longer = near_p.cumsum(-1).gather(1, count.clamp(max=11)[:, None]).squeeze(1)
        assert ((longer > limit) | (count == 12)).all(), "the prefix is the longest one"


def test_a_broken_promise_is_an_error():
    """Probabilities that are none: a prefix whose mass shrinks again would lend more than the bound."""
    rule = LanternRule(torch.zeros(3, 2, dtype=torch.int64), 0.1)
    with pytest.raises(NumericalError, match="beyond the bound"):
        rule.borrowed(torch.tensor([0.5]), torch.tensor([[0.3, -0.25]]))
