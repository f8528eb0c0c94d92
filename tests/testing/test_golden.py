"""Finding recorded cases: by kind, in any directory, with clear errors; kinds without code are listed, not failed."""

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arsp.errors import InputError
from arsp.testing.golden import find_cases, golden_root, not_covered


@pytest.fixture
def folder(tmp_path):
    for name, kind in (("b/one", "alpha"), ("a", "alpha"), ("c", "beta")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "golden.json").write_text(json.dumps({"kind": kind, "config": {"V": 3}}))
        save_file({"x": torch.ones(2)}, tmp_path / name / "io.safetensors")
    save_file({"y": torch.zeros(1)}, tmp_path / "a" / "inputs.safetensors")
    return tmp_path


def test_cases_are_found_by_kind_in_sorted_order(folder):
    assert [str(case) for case in find_cases(folder, "alpha")] == ["a", "one"]
    assert [case.kind for case in find_cases(folder)] == ["alpha", "alpha", "beta"]
    assert find_cases(folder, "gamma") == []


def test_inputs_and_outputs_are_read_together(folder):
    case = find_cases(folder, "alpha")[0]
    assert set(case.io) == {"x", "y"} and case.config == {"V": 3}


def test_kinds_without_code_are_listed(folder):
    assert not_covered(folder, {"alpha"}) == ["beta"]


def test_weights_without_a_file_come_from_their_recipe(folder):
    meta = {"kind": "gamma", "weights_recipe": {"seed": 5}, "state_dict_shapes": {"a.norm.weight": [3], "a.bias": [2], "b.weight": [2, 4]}}
    (folder / "c" / "golden.json").write_text(json.dumps(meta))
    weights = find_cases(folder, "gamma")[0].weights
    assert {key: list(value.shape) for key, value in weights.items()} == meta["state_dict_shapes"]
    normal = np.random.RandomState((zlib.crc32(b"b.weight") + 5) % 2**32).standard_normal((2, 4)).astype(np.float32)
    assert torch.equal(weights["b.weight"], torch.from_numpy(normal / 2)), "divided by the root of the inputs of an output"
    assert (weights["a.norm.weight"] - 1).abs().max() < 0.5 and weights["a.bias"].abs().max() < 0.25


def test_missing_and_damaged_files_are_input_errors(folder):
    with pytest.raises(InputError, match="weights"):
        _ = find_cases(folder, "beta")[0].weights
    (folder / "c" / "io.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="io"):
        _ = find_cases(folder, "beta")[0].io
    (folder / "c" / "golden.json").write_text("{")
    with pytest.raises(InputError, match="golden"):
        find_cases(folder)


def test_the_directory_can_be_given_in_the_environment(folder, monkeypatch):
    monkeypatch.setenv("ARSP_GOLDEN", str(folder))
    assert golden_root() == folder and len(find_cases()) == 3


@pytest.mark.golden
@pytest.mark.parametrize("kind", not_covered())
def test_every_recorded_kind_is_covered(kind):
    pytest.skip(f"not covered: no code for cases of kind '{kind}' yet")
