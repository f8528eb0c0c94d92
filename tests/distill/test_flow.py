"""The flow map: parity with recorded tokens and scores, distribution, early stop, and the edge cases of the specification."""

import math

import pytest
import torch
from scipy import stats

from arsp.decode.filters import LogitsPipeline
from arsp.distill import flow
from arsp.distill.flow import (
    FlowSettings,
    codebook_scale,
    flow_map,
    keyed_noise,
    posterior,
    prepare_codebook,
    sample_through_map,
    score,
    velocity,
)
from arsp.errors import ConfigError, InputError, NumericalError
from arsp.protocols import Request
from arsp.testing.golden import find_cases
from arsp.testing.tabular import toy_teacher

CASES = find_cases(kind="flowmap")
REFERENCES = [FlowSettings(solver="adaptive"), FlowSettings(solver="midpoint", steps=250)]


def problem(num=400, num_codes=32, dim=8, scale=0.6, seed=0, logit_std=1.5):
    generator = torch.Generator().manual_seed(seed)
    codebook = scale * torch.randn(num_codes, dim, generator=generator)
    logp = torch.log_softmax(logit_std * torch.randn(num, num_codes, generator=generator), -1)
    return logp, torch.randn(num, dim, generator=generator), codebook


def peaked(num, weight, seed=0):
    """One law for all rows with ``weight`` on code 3 and the rest spread over 31 others."""
    generator = torch.Generator().manual_seed(seed)
    codebook = 0.6 * torch.randn(32, 8, generator=generator)
    p = torch.softmax(torch.randn(32, generator=generator), 0)
    p[3] = 0
    p *= (1 - weight) / p.sum()
    p[3] = weight
    return p.log().expand(num, 32), torch.randn(num, 8, generator=generator), codebook, p


def is_settled(x, t, j, logp, codebook):
    """Certificate that the flow from (x, t) ends at code j: the ball around c_j through y = x/(1-t) is invariant."""
    y, sigma = x / (1 - t), t / (1 - t)
    radius = (y - codebook[j]).norm()
    distance = (codebook - codebook[j]).norm(dim=1)
    others = (logp > -torch.inf) & (torch.arange(len(codebook)) != j)
    distance, ratio = distance[others], (logp[others] - logp[j]).exp()
    pull = (ratio * torch.exp(-(distance**2 - 2 * radius * distance) / (2 * sigma**2)) * distance).sum()
    return bool((distance > 2 * radius).all() and pull < radius)


def rows_of(case):
    num_noise = case.io["noise"].shape[1]
    return case.io["probs"].log().repeat_interleave(num_noise, 0), case.io["noise"].flatten(0, 1), case.io["codebook"]


@pytest.mark.golden
@pytest.mark.parametrize("settings", REFERENCES, ids=lambda s: s.solver)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_solvers_reach_every_robust_recorded_token(case, settings):
    codes, _ = flow_map(*rows_of(case), settings)
    robust = case.io["robust"].flatten()
    wrong = (codes != case.io["token"].flatten())[robust].sum().item()
    assert wrong == 0, f"{wrong} of {robust.sum().item()} robust tokens differ"


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_default_solver_reaches_the_recorded_tokens(case):
    codes, info = flow_map(*rows_of(case))
    robust = case.io["robust"].flatten()
    agreement = (codes == case.io["token"].flatten())[robust].float().mean().item()
    assert agreement >= 0.995, f"agreement {agreement:.4f} on {robust.sum().item()} robust tokens"
    assert info["nfe"] <= 65, f"{info['nfe']} evaluations a token"


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_near_zero_noise_is_the_recorded_one(case):
    """In float64; the float32 tolerance of the case applies where single precision is asked for."""
    robust = case.io["robust"].flatten()
    expected = case.io["x_t001"].flatten(0, 1)[robust]
    _, info = flow_map(*rows_of(case), FlowSettings(solver="adaptive", t_end=0.001, early_stop=1.0, tolerance=1e-8))
    worst = (info["state_NE"][robust] - expected).abs().max().item()
    assert worst < 1e-5, f"max difference of x(t=0.001) {worst}"
    weights = (info["weight_N"] - case.io["weight_max"].flatten())[robust].abs().max().item()
    assert weights < 1e-5, f"max difference of the final weight {weights}"


@pytest.mark.golden
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_posterior_mean_score_and_velocity_are_the_recorded_ones(case, dtype, tolerance):
    codebook, logp = case.io["codebook"].to(dtype), case.io["probs"].double().log().to(dtype)
    for i, t in enumerate(case.io["score.t"].tolist()):
        x = case.io["score.x_t"][i].to(dtype)
        _, mean = posterior(x, t, logp, codebook)
        for name, got in (("posterior_mean", mean), ("score", score(x, mean, t)), ("velocity", velocity(x, mean, t))):
            expected = case.io[f"score.{name}"][i]
            worst = ((got.double() - expected).abs().max() / expected.abs().max()).item()
            assert worst < tolerance, f"t = {t}: relative difference of {name} {worst:.2e}"


@pytest.mark.parametrize("early_stop", [0.95, 1.0])
def test_100000_draws_follow_the_law(early_stop):
    """Chi-square with cells expecting at least 5; p > 1e-3, which is the false-alarm rate; the seed is fixed."""
    generator = torch.Generator().manual_seed(21)
    codebook = 0.6 * torch.randn(32, 8, generator=generator)
    p = torch.softmax(1.5 * torch.randn(32, generator=generator), 0)
    noise = torch.randn(100_000, 8, generator=generator)
    codes, _ = flow_map(p.log().expand(100_000, 32), noise, codebook, FlowSettings(early_stop=early_stop))
    assert_follows(codes, p)


def assert_follows(codes, p):
    expected = p.double() / p.double().sum() * len(codes)
    counts = torch.bincount(codes, minlength=len(p)).double()
    large = expected >= 5
    observed = torch.cat((counts[large], counts[~large].sum()[None]))
    expected = torch.cat((expected[large], expected[~large].sum()[None]))
    used = expected > 0
    result = stats.chisquare(observed[used].numpy(), expected[used].numpy(), sum_check=False)
    assert result.pvalue > 1e-3, f"chi-square {result.statistic:.1f} on {int(used.sum()) - 1} df, p = {result.pvalue:.2e}"


@pytest.mark.parametrize("weight", [0.6, 0.97, 0.999])
def test_early_stop_changes_no_token_of_a_peaked_law(weight):
    """A law that gives one code 0.97 starts above a posterior weight of 0.95: stopping there would return it always."""
    logp, noise, codebook, p = peaked(20_000, weight)
    full, _ = flow_map(logp, noise, codebook, FlowSettings(early_stop=1.0))
    fast, info = flow_map(logp, noise, codebook)
    assert (full != fast).sum().item() == 0, f"{(full != fast).sum().item()} of 20000 tokens changed"
    assert info["nfe"] < 55, f"early stop saves nothing: {info['nfe']} evaluations"
    assert_follows(fast, p)


def test_early_stop_changes_no_token_of_ordinary_laws():
    logp, noise, codebook = problem(20_000)
    full, _ = flow_map(logp, noise, codebook, FlowSettings(early_stop=1.0))
    fast, info = flow_map(logp, noise, codebook)
    assert torch.equal(full, fast), f"{(full != fast).sum().item()} of 20000 tokens changed"
    assert 0.2 < info["stop_t_N"].mean() < 0.5, f"mean stop at t = {info['stop_t_N'].mean():.3f}"


def test_tokens_with_the_rigorous_certificate_are_final():
    logp, noise, codebook = (x.double() for x in problem(200))
    final, _ = flow_map(logp, noise, codebook, FlowSettings(solver="adaptive", t_end=0.001, early_stop=1.0))
    settings = FlowSettings(solver="adaptive", t_end=0.15, early_stop=1.0)
    early, info = flow_map(logp, noise, codebook, settings)
    settled = torch.tensor([is_settled(x, 0.15, j, lp, codebook) for x, j, lp in zip(info["state_NE"], early.tolist(), logp, strict=True)])
    assert settled.float().mean() > 0.3, f"only {settled.sum().item()} of 200 certificates"
    assert torch.equal(early[settled], final[settled])


@pytest.mark.parametrize(("solver", "steps"), [("euler", 400), ("midpoint", 100), ("2m", 64)])
def test_solvers_agree_with_the_adaptive_reference(solver, steps):
    logp, noise, codebook = problem(1000, seed=5)
    reference, _ = flow_map(logp, noise, codebook, FlowSettings(solver="adaptive"))
    codes, _ = flow_map(logp, noise, codebook, FlowSettings(solver=solver, steps=steps))
    agreement = (codes == reference).float().mean().item()
    assert agreement >= 0.995, f"{solver} with {steps} steps agrees on {agreement:.4f}"


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_one_hot_law_gives_its_code_whatever_the_noise(solver):
    logp = torch.full((50, 6), -torch.inf)
    logp[:, 4] = 0.0
    for stop in (0.95, 1.0):
        codes, info = flow_map(logp, 30 * torch.randn(50, 3), torch.randn(6, 3), FlowSettings(solver=solver, early_stop=stop))
        assert (codes == 4).all() and torch.isfinite(info["state_NE"]).all(), (stop, codes.tolist())


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_removed_codes_are_never_reached(solver):
    logp, noise, codebook = problem(300)
    logp = logp.masked_fill(torch.rand(300, 32, generator=torch.Generator().manual_seed(1)) < 0.7, -torch.inf)
    logp[:, 0] = 0.0
    codes, _ = flow_map(logp.log_softmax(-1), noise, codebook, FlowSettings(solver=solver))
    assert (logp.gather(1, codes[:, None]) > -torch.inf).all()


def test_codes_that_share_a_vector_return_the_likelier_one_then_the_lowest_id():
    codebook = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [-3.0, 0.0]])
    p = torch.tensor([[0.2, 0.25, 0.3, 0.25]]).expand(200, 4)
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    codes, info = flow_map(p.log(), noise, codebook)
    assert torch.equal(codes, torch.where(noise[:, 0] > 0, 2, 1)), codes.unique().tolist()
    assert info["nfe"] < 60, "shared mass must not prevent the early stop"


def test_shared_vectors_count_with_their_joint_mass():
    logp, noise, codebook = problem(500, num_codes=12, dim=3)
    share = torch.tensor([0.3, 0.7]).log()
    expected, _ = flow_map(logp, noise, codebook)
    codes, _ = flow_map(torch.cat((logp + share[0], logp + share[1]), 1), noise, codebook.repeat(2, 1))
    wrong = (codes != expected + 12).sum().item()
    assert wrong == 0, f"{wrong} of 500 tokens change when each code is split into two"


def test_unnormalised_laws_and_low_precision_inputs_are_accepted():
    logp, noise, codebook = problem(100)
    expected, _ = flow_map(logp, noise, codebook)
    assert torch.equal(flow_map(logp + 3.0, noise, codebook)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow_map(logp, noise, codebook)[0], expected), "autocast reached the integration"


@pytest.mark.parametrize("solver", ["2m", "adaptive"])
def test_chunks_and_compaction_do_not_change_results(monkeypatch, solver):
    logp, noise, codebook = problem(120)
    settings = FlowSettings(solver=solver, dtype="float64")
    whole, info = flow_map(logp, noise, codebook, settings)
    monkeypatch.setitem(flow._CHUNK_ELEMENTS, "cpu", 1)  # every row alone
    alone, info_alone = flow_map(logp, noise, codebook, settings)
    assert torch.equal(alone, whole)
    for key in ("stop_t_N", "weight_N", "state_NE"):
        worst = (info[key] - info_alone[key]).abs().max().item()
        assert worst < 1e-9, f"{key}: max difference {worst} between a batch and single rows"


def test_no_rows_give_no_codes():
    codes, info = flow_map(torch.zeros(0, 5), torch.zeros(0, 2), torch.randn(5, 2))
    assert codes.shape == (0,) and codes.dtype == torch.int64 and info["nfe"] == 0


def test_a_constant_scales_the_codebook_when_its_size_is_far_from_one():
    codebook = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert codebook_scale(codebook) == 1.0
    constant = codebook_scale(0.001 * codebook)
    assert math.isclose(constant * 0.001 * codebook.square().mean().sqrt().item(), 1.0, rel_tol=1e-5)
    logp, noise = problem(100, 64, 4)[:2]
    scaled, _ = flow_map(logp, noise, 0.5 * codebook, FlowSettings(scale=2.0))
    assert torch.equal(scaled, flow_map(logp, noise, codebook)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("solver", "heun"), ("steps", 0), ("t_end", 0.0), ("t_end", 1.0), ("early_stop", 0.4), ("scale", 0.0), ("dtype", "bfloat16"),
     ("tolerance", 0.0)],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        FlowSettings(**{field: value})


def test_wrong_shapes_and_broken_numbers_are_refused():
    logp, noise, codebook = problem(4)
    with pytest.raises(InputError, match=r"\(4, 31\)"):
        flow_map(logp[:, :31], noise, codebook)
    with pytest.raises(InputError, match="codebook"):
        flow_map(logp, noise, codebook * torch.nan)
    for bad_logp, bad_noise in ((logp * torch.nan, noise), (torch.full_like(logp, -torch.inf), noise), (logp, noise / 0)):
        with pytest.raises(NumericalError):
            flow_map(bad_logp, bad_noise, codebook)


def test_trajectories_are_the_map_applied_token_by_token():
    teacher, request = toy_teacher(), Request(torch.arange(64), seed=3)
    noise_fn = keyed_noise(request, 4)
    out = sample_through_map(teacher, request, noise_fn, LogitsPipeline(), teacher.codebook_VE)
    log_p = torch.log_softmax(teacher.teacher_forced(request, out.codes_BL), -1)
    for i in range(4):
        expected, _ = flow_map(log_p[:, i], noise_fn(torch.tensor([i]))[:, 0], teacher.codebook_VE)
        assert torch.equal(out.codes_BL[:, i], expected), f"position {i}"
    assert 1 <= out.stats["flow_nfe"] <= 65 and out.stats["passes"] == 4


def test_trajectories_do_not_depend_on_the_batch():
    teacher, book = toy_teacher(), prepare_codebook(toy_teacher().codebook_VE)

    def run(ids):
        request = Request(ids, 0)
        return sample_through_map(teacher, request, keyed_noise(request, 4), LogitsPipeline(), book).codes_BL

    whole = run(torch.arange(40))
    assert torch.equal(torch.cat([run(torch.arange(0, 13)), run(torch.arange(13, 40))]), whole)
