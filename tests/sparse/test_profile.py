"""Profiles: what is written is read back; what contradicts itself or belongs to another model is refused with the reason."""

import json
from dataclasses import replace

import numpy as np
import pytest

from arsp.errors import ConfigError, InputError
from arsp.sparse.profile import TENSORS, Profile, load_profile, save_profile, uniform_share
from arsp.sparse.window import empty_windows, uniform_2d

SIDES = (1, 2, 3, 4, 6, 8)


@pytest.fixture
def profile():
    win = empty_windows(len(SIDES), 2, 3)
    win[0, 1, 5, 3:], win[1, 2, 5, 4] = 1, 0
    share = uniform_share("none", 2, len(SIDES))
    share[0, 4:] = 1
    return Profile("var", "ab" * 32, SIDES, win, share, tau=0.9, calibration={"num": 8, "seed": 1})


def test_a_profile_is_read_back_as_it_was_written(tmp_path, profile):
    read = load_profile(save_profile(tmp_path / "p", profile))
    assert (read.win == profile.win).all() and (read.share == profile.share).all() and read.win.dtype == np.int16
    for name in ("model", "fingerprint", "patch_nums", "geometry", "mask", "tau", "cut", "calibration"):
        assert getattr(read, name) == getattr(profile, name), name
    assert read.share_of(0, 3) == "none" and read.share_of(0, 5) == "map"


def test_a_run_directory_that_holds_one_is_accepted(tmp_path, profile):
    save_profile(tmp_path / "run" / "bundle", profile)
    assert load_profile(tmp_path / "run").model == "var"


def test_kept_share_counts_pairs():
    win = empty_windows(len(SIDES), 1, 2)
    win[0, 0] = uniform_2d(SIDES, 1)
    profile = Profile("var", None, SIDES, win, uniform_share("none", 1, len(SIDES)))
    kept = profile.kept()
    assert kept.shape == (1, 6) and kept[0, 0] == 1.0
    assert 0.5 < kept[0, 5] < 0.6  # one head sees a few keys, the other all
    assert kept[0, 5] < profile.kept_total() < 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_nums": (1, 2, 3, 4, 5, 6)}, "patch_nums"),
        ({"depth": 3}, "layers"),
        ({"heads": 4}, "heads"),
        ({"fingerprint": "cd" * 32}, "weights abababababab, var-b has cdcdcdcdcdcd"),
    ],
)
def test_profiles_of_another_model_are_refused(profile, change, words):
    facts = {"patch_nums": SIDES, "depth": 2, "heads": 3, "fingerprint": "ab" * 32}
    profile.check_model("var-b", **facts)
    profile.check_model("var-b", **{**facts, "fingerprint": None})
    with pytest.raises(InputError, match=words):
        profile.check_model("var-b", **{**facts, **change})


def test_windows_that_drop_all_keys_are_refused(profile):
    win = profile.win.copy()
    win[1, 2, 4, :5] = 0
    with pytest.raises(ConfigError, match="scale 4 of layer 1, head 2 drops all keys"):
        replace(profile, win=win)


def test_sharing_may_not_shrink_within_a_layer(profile):
    share = profile.share.copy()
    share[0] = [0, 0, 1, 2, 1, 2]
    with pytest.raises(ConfigError, match="layer 0 shares 'output' at scale 3 and 'map' at scale 4"):
        replace(profile, share=share)


@pytest.mark.parametrize(
    "change",
    [
        {"win": empty_windows(5, 2, 3)},
        {"share": uniform_share("none", 2, 5)},
        {"geometry": "3d"},
        {"mask": "soft"},
        {"share": uniform_share("none", 2, 6) + 3},
        {"win": empty_windows(6, 2, 3) - 1},
    ],
)
def test_impossible_arrays_and_names_are_refused(profile, change):
    with pytest.raises(ConfigError):
        replace(profile, **change)


def test_damaged_newer_and_foreign_bundles_are_refused(tmp_path, profile):
    path = save_profile(tmp_path / "p", profile)
    manifest = json.loads((path / "arsp.json").read_text())

    def rewritten(**change):
        (path / "arsp.json").write_text(json.dumps({**manifest, **change}))
        return path

    with pytest.raises(InputError, match="profile format 2"):
        load_profile(rewritten(config={**manifest["config"], "format": 2}))
    with pytest.raises(InputError, match="schema"):
        load_profile(rewritten(schema=99))
    with pytest.raises(InputError, match="kind 'teacher'"):
        load_profile(rewritten(kind="teacher"))
    with pytest.raises(InputError, match="tau"):
        load_profile(rewritten(config={k: v for k, v in manifest["config"].items() if k != "tau"}))
    rewritten()
    data = bytearray((path / TENSORS).read_bytes())
    data[-1] ^= 1
    (path / TENSORS).write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged"):
        load_profile(path)
    with pytest.raises(InputError, match="not a bundle"):
        load_profile(tmp_path / "nothing")
