"""The CUDA kernel of the flow map against the reference and against arsp.distill.flow, on the emulated device and on a real one."""

import pytest
import torch
from cuda_emulation import TARGETS

from arsp.distill.flow import FlowSettings, flow_map, stop_weights
from arsp.kernels import reference

CASES = [(1, 1, 8), (5, 3, 8), (7, 40, 5), (4, 700, 12), (3, 1500, 32)]  # rows, codes, width


def draw(rows, codes, width, seed=0, removed=0.3):
    """Laws with some codes removed, noise and vectors; log-probabilities are normalised."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, codes, generator=generator)
    gone = torch.rand(rows, codes, generator=generator) < removed
    gone[:, -1] = False
    vectors = torch.randn(codes, width, generator=generator)
    vectors /= vectors.norm(dim=1, keepdim=True)
    return logits.masked_fill(gone, -torch.inf).log_softmax(1), torch.randn(rows, width, generator=generator), vectors


@TARGETS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("solver", ["euler", "2m", "midpoint"])
def test_codes_and_states_are_those_of_the_reference(target, case, solver):
    logp, noise, vectors = draw(*case)
    for early_stop, steps in ((1.0, 9), (0.95, 32)):
        arguments = (logp, noise, vectors, stop_weights(logp, early_stop), solver, steps, 0.02)
        found, wanted = target("flow_map", *arguments), reference.flow_map(*arguments)
        what = f"{case} {solver} {early_stop}"
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]), f"{what}: codes or times differ"
        assert torch.equal(found[3], wanted[3]), f"{what}: evaluations {found[3].tolist()} and {wanted[3].tolist()}"
        torch.testing.assert_close(found[2], wanted[2], atol=2e-4, rtol=0)
        torch.testing.assert_close(found[4], wanted[4], atol=2e-4, rtol=1e-4)


@TARGETS
def test_codes_are_those_of_the_map_of_distillation(target):
    logp, noise, vectors = draw(6, 300, 8, seed=3)
    codes, info = flow_map(logp, noise, vectors, FlowSettings(dtype="float64"))
    found = target("flow_map", logp, noise, vectors, stop_weights(logp, 0.95), "2m", 64, 0.02)
    assert torch.equal(found[0], codes)
    torch.testing.assert_close(found[1], info["stop_t_N"].float())


@TARGETS
def test_removed_codes_do_not_count_and_one_left_ends_at_once(target):
    logp, noise, vectors = draw(3, 90, 8)
    vectors[10] = torch.nan
    logp[:, 10] = -torch.inf
    logp[1] = -torch.inf
    logp[1, 77] = 0.0
    found = target("flow_map", logp, noise, vectors, stop_weights(logp, 0.95), "2m", 16, 0.02)
    assert found[0][1] == 77 and found[3][1] == 1 and found[1][1] == 1, "the only code there is"
    assert found[4].isfinite().all() and found[2].isfinite().all() and (found[0] != 10).all()


@TARGETS
def test_equal_weights_give_the_smallest_code(target):
    vectors = torch.ones(1100, 8)
    logp = torch.full((2, 1100), -torch.inf)
    logp[0, 3:] = 0
    logp[1, 600:] = 0
    found = target("flow_map", logp.log_softmax(1), torch.zeros(2, 8), vectors, torch.full((2,), 2.0), "euler", 3, 0.1)
    assert found[0].tolist() == [3, 600]


def test_the_reference_is_the_map_of_distillation():
    logp, noise, vectors = draw(32, 200, 8, seed=1)
    for solver in ("euler", "2m", "midpoint"):
        codes, info = flow_map(logp, noise, vectors, FlowSettings(solver=solver, steps=24))
        group, stop_t, weight, _, state = reference.flow_map(logp, noise, vectors, stop_weights(logp, 0.95), solver, 24, 0.02)
        assert torch.equal(group, codes) and torch.equal(stop_t, info["stop_t_N"]), solver
        torch.testing.assert_close(weight, info["weight_N"], atol=1e-4, rtol=0)
        torch.testing.assert_close(state, info["state_NE"], atol=1e-4, rtol=1e-4)
