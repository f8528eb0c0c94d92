"""The allocation of bits equals brute force and MixDQ's recorded optima; impossible budgets name the smallest possible one."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arsp.errors import ConfigError, InputError
from arsp.quant.allocate import Option, allocate, smallest_budget, split_mean_bits, total_cost, total_score
from arsp.testing.golden import find_cases


def problem(seed, num_layers, bits=(2, 4, 8), scale=1.0):
    """Layers of unequal size whose scores grow with bits, with costs of whole bytes."""
    rng = random.Random(seed)
    layers = {}
    for index in range(num_layers):
        size, scores = rng.randrange(1, 40), sorted(rng.random() * scale for _ in bits)
        layers[f"layer.{index}"] = {b: Option(size * b, score) for b, score in zip(bits, scores, strict=True)}
    return layers


def brute_force(layers, budget, floor=-math.inf):
    choices = (dict(zip(layers, bits, strict=True)) for bits in itertools.product(*layers.values()))
    return max((total_score(layers, c) for c in choices if floor <= total_cost(layers, c) <= budget), default=None)


@pytest.mark.golden
@pytest.mark.parametrize("case", find_cases(kind="mixdq_ip"), ids=str)
def test_optima_equal_the_official_ones_and_what_they_leave_at_zero_bits_is_an_error(case):
    meta = case.meta
    for name, solved in meta["solutions"].items():
        size = sum(meta["ratio"][layer] for layer in solved["layers"])
        layers = {
            layer: {
                b: Option(b * meta["ratio"][layer] / size, meta["sensitivity"][layer][int(math.log2(b)) - 1]) for b in solved["candidates"]
            }
            for layer in solved["layers"]
        }
        floor, budget = solved["mean_bit"] - 0.02, solved["mean_bit"] + 0.02
        if solved["feasible"]:
            bits = allocate(layers, budget, floor)
            assert total_score(layers, bits) == pytest.approx(solved["official_objective"], abs=1e-9), name
            assert floor - 1e-9 <= total_cost(layers, bits) <= budget + 1e-9, name
        else:
            with pytest.raises(ConfigError, match="smallest feasible"):
                allocate(layers, budget, floor)
    split = meta["get_mean_bit"]
    got = split_mean_bits(split["average"], split["ssim2sqnr_ratio"], split["k"])
    assert got == pytest.approx((split["sqnr_bits"], split["ssim_bits"]), rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_the_choice_is_as_good_as_the_best_of_all(seed, scale):
    layers = problem(seed, 6, scale=scale)
    least, most = smallest_budget(layers), sum(options[8].cost for options in layers.values())
    for part in (0.0, 0.1, 0.45, 0.8, 1.0):
        budget = round(least + part * (most - least))
        bits = allocate(layers, budget)
        assert total_cost(layers, bits) <= budget
        assert total_score(layers, bits) == pytest.approx(brute_force(layers, budget), rel=1e-9), f"budget {budget}"


@pytest.mark.parametrize("seed", range(4))
def test_many_layers_are_solved_to_the_optimum_not_near_it(seed):
    """Against dynamic programming over whole costs."""
    layers = problem(seed, 80)
    budget = round(0.55 * sum(options[8].cost for options in layers.values()))
    best = np.zeros(budget + 1)
    for options in layers.values():
        shifted = np.full((len(options), budget + 1), -np.inf)
        for row, option in zip(shifted, options.values(), strict=True):
            row[option.cost :] = best[: budget + 1 - option.cost] + option.score
        best = shifted.max(0)
    assert total_score(layers, allocate(layers, budget)) == pytest.approx(best[budget], rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_floor_is_kept_too(seed):
    layers = problem(seed, 5)
    for options in layers.values():  # fewer bits are better: only the floor asks for more
        options.update({b: Option(option.cost, -option.score) for b, option in options.items()})
    middle = round(0.6 * sum(options[8].cost for options in layers.values()))
    expected = brute_force(layers, middle + 20, middle)
    assert total_score(layers, allocate(layers, middle + 20, middle)) == pytest.approx(expected, rel=1e-9)


def test_large_costs_never_exceed_the_budget_by_a_byte():
    layers = {f"layer.{i}": {4: Option(10**9 + i, 0.0), 8: Option(2 * 10**9 + 2 * i, 1.0 + i)} for i in range(5)}
    for chosen in itertools.product((4, 8), repeat=5):
        budget = total_cost(layers, dict(zip(layers, chosen, strict=True)))
        for exact in (budget, budget - 1):
            expected = brute_force(layers, exact)
            if expected is not None:
                bits = allocate(layers, exact)
                assert total_cost(layers, bits) <= exact and total_score(layers, bits) == pytest.approx(expected)


def test_an_infeasible_budget_names_the_smallest_feasible_one():
    layers = problem(3, 5)
    least = smallest_budget(layers)
    assert least == sum(options[2].cost for options in layers.values())
    with pytest.raises(ConfigError, match=f"smallest feasible budget is {least:.10g}"):
        allocate(layers, least - 1)
    assert set(allocate(layers, least).values()) == {2}
    gap = {"a": {4: Option(4, 0.0), 8: Option(8, 1.0)}}
    with pytest.raises(ConfigError, match="smallest feasible budget is 8"):
        allocate(gap, 7, floor=5)
    with pytest.raises(ConfigError, match="9 or more"):
        allocate(gap, 20, floor=9)


def test_mixed_bits_are_better_than_uniform_ones_of_the_same_mean():
    layers = problem(1, 40)
    uniform = dict.fromkeys(layers, 4)
    bits = allocate(layers, total_cost(layers, uniform))
    assert total_score(layers, bits) > total_score(layers, uniform)


def test_the_solver_writes_nothing_to_standard_output():
    """HiGHS of scipy 1.17 has a line of its own to say about this problem."""
    program = (
        "from test_allocate import allocate, problem\n"
        "layers = problem(20, 200)\n"
        "allocate(layers, round(0.55 * sum(options[8].cost for options in layers.values())))\n"
        "print('done')"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert run.stdout == "done\n"


def test_bad_problems_are_named():
    with pytest.raises(ConfigError, match="no layer"):
        allocate({}, 1)
    for options in ({}, {4: Option(1, float("nan"))}, {4: Option(float("inf"), 1)}):
        with pytest.raises(InputError, match="fc1"):
            allocate({"fc1": options}, 1)
