"""``arsp distill`` of a tiny VAR and ``arsp sample`` of its student: records, continued runs, and the released script's prefix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_var
import torch
from command_line import invoke, record_of, refused
from PIL import Image

from arsp.decode.few_step import nearest_codes
from arsp.models.var import VARConfig
from arsp.protocols import Request
from arsp.runs import sha256_file
from arsp.stack import StackConfig, build
from arsp.testing.golden import find_cases
from arsp.testing.tolerance import assert_close, assert_same
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.train import loop
from arsp.zoo import bundle
from arsp.zoo.bundle import read_manifest, save_bundle

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "trajectories.num=24", "trajectories.held_out=8", "trajectories.shard_size=16", "trajectories.batch_size=8",
    "trajectories.solver_steps=4", "probe_images=0", "optim.batch_size=8", "optim.warmup=2", "optim.eval_every=3",
    "optim.checkpoint_every=4", "optim.steps=9",
]  # fmt: skip
FLAG = "--compat-official-prefix"
SHORT = ["objective.short=0.5", "objective.short_codes=5"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a teacher and a student of three scales, and a raster student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    tiny_var.student_bundle(tmp_path / "student", tiny_var.teacher_bundle(tmp_path / "teacher"))
    return tmp_path


def distill(out, *more, teacher="teacher"):
    return invoke("distill", "--teacher", teacher, "--out", out, "--json", *SMALL, *more)


def sample(*words, num=3):
    return record_of(invoke("sample", "--model", "student", "--num", num, "--json", "-q", *words))


def pixels(record):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((Path(record["run_dir"]) / "images").glob("*.png"))]).astype(int)


def digest(out):
    return sha256_file(Path(out) / "bundle" / "model.safetensors")


# -- distillation -----------------------------------------------------------------------------------------------------------


def test_a_student_of_a_var_says_where_it_comes_from_and_samples(place):
    record = record_of(distill("fresh"))
    names = {metric["name"] for metric in record["metrics"]}
    assert {"heldout_ce", "heldout_accuracy", "heldout_accuracy_t1", "heldout_ce_shuffled_noise"} <= names
    assert len(record["curves"]["accuracy_by_position"]) == tiny_var.LAYOUT.num_tokens
    manifest = read_manifest(place / "fresh" / "bundle")
    assert (manifest["family"], manifest["kind"], manifest["known"], manifest["code_dim"]) == ("var", "student", [0, 1], 4)
    assert manifest["parents"][0]["sha256"] == sha256_file(place / "teacher" / "model.safetensors")
    for words, passes in (([], 1), (["--student-steps", 2], 2), (["--teacher-range", "2-3"], 3)):
        made = record_of(invoke("sample", "--model", "fresh", "--num", 2, "--class", "cat", "--json", "-q", *words))
        assert made["cost"]["passes"] == passes and made["stack"]["family"] == "var"


class Dies(Exception):
    pass


@pytest.mark.parametrize("more", [[], [*SHORT, "optim.ema=0.9"]], ids=["plain", "short-ema"])
def test_a_killed_distillation_continues_to_the_same_weights(place, monkeypatch, more):
    whole, calls, update = record_of(distill("whole", *more)), [], loop._update

    def dying(*arguments):
        calls.append(arguments[3])
        if len(calls) == 6:
            raise Dies("killed")
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", dying)
    assert distill("parts", *more).exit_code == 1
    result = distill("parts", *more)
    assert "resumed at step 4" in result.stderr and calls[5:7] == [5, 4], calls
    assert record_of(result)["metrics"] == whole["metrics"] and digest("parts") == digest("whole")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["second_step_at=4"], "ends of scales, [0, 1, 5, 21]"),
        (["second_step_at=21"], "ends of scales"),
        (["--student-steps", 3], "student_steps"),
        (["objective.short=0.5", "objective.short_codes=6"], "here [5]"),
        (["trajectories.cfg=-1"], "cfg"),
        (["--method", "dd3"], "dd1"),
        (["--teacher", "student"], "student"),
        (["--tokenizer", "tok.safetensors"], "--tokenizer"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(place, monkeypatch, words, said):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    refused(distill("out", *words), 3, said)
    assert not (place / "out").exists() and not (place / "runs").exists()


# -- sampling a student -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--student-steps", 2, "--split", 5], ["--teacher-range", "2-3"]])
def test_images_of_a_student_do_not_depend_on_the_batch_size(place, words):
    whole = pixels(sample(*words, "--seed", 5, "--batch-size", 5, "--out", "a", num=5))
    parts = pixels(sample(*words, "--seed", 5, "--batch-size", 2, "--out", "b", num=5))
    assert np.abs(whole - parts).max() <= 1, "levels"


def test_the_released_prefix_is_an_option_with_an_effect_and_a_name(place):
    plain, official = (sample("--teacher-range", "2-3", "--out", name, *more, num=64) for name, more in (("a", []), ("b", [FLAG])))
    assert (pixels(plain) != pixels(official)).any()
    assert official["stack"]["name"] == plain["stack"]["name"] + " (official prefix)"
    assert official["cost"]["passes"] == plain["cost"]["passes"]
    assert official["config"]["stack"]["compat_official_prefix"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "student", FLAG], "no scales are handed to a teacher"),
        (["--model", "student", FLAG, "--teacher-range", "1-3"], "N above 1"),
        (["--model", "teacher", FLAG], "belongs to a distilled student"),
        (["--model", "raster-student", FLAG, "--teacher-range", "3-5"], "a student of a VAR"),
        (["--model", "student", "--teacher-range", "2-4"], "<= 3 in scales"),
        (["--model", "student", "--split", 2], "ends of scales"),
        (["--model", "student", "--apply", "litevar"], "next-scale teacher"),
        (["--model", "student", "--collab", "student:student@1"], "next-scale teacher"),
    ],
)
def test_options_without_effect_are_refused(place, words, said):
    tiny_models.student_bundle(place / "raster-student", tiny_models.teacher_bundle(place / "raster"))
    refused(invoke("sample", *words), 3, said)
    assert not (place / "runs").exists()


def bundles_of(case, place):
    """Student and teacher of a recorded case as bundles; the recorded tokenizer has no networks, random ones stand in."""
    config, fixed = case.config, case.meta["fixed_config"]
    sizes = VARConfig.from_dict({**fixed, **config, "vocab_size": config["V"], "code_dim": config["Cvae"]})
    vq = replace(
        tiny_var.VQ, z_channels=config["Cvae"], vocab_size=config["V"], patch_nums=sizes.patch_nums,
        **{key: fixed[key] for key in ("quant_resi", "share_quant_resi", "using_znorm")},
    )  # fmt: skip
    tokenizer = VQVAE(VQVAEConfig(**vars(vq)))
    tokenizer.load_state_dict(case.load("vae_quantize"), strict=False)
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    parts = {"student": case.weights, "teacher": case.load("teacher")}
    for kind, weights in parts.items():
        more = {"code_dim": config["Cvae"], "known": [0], "teacher": str(place / "teacher")} if kind == "student" else {}
        save_bundle(
            place / kind, family="var", kind=kind, config=tiny_var.plain(sizes), tokenizer={"config": tiny_var.plain(vq)},
            model={key: value for key, value in weights.items() if not key.endswith(derived)},
            tokenizer_weights=tokenizer.state_dict(), sampling={"cfg": config["cfg"]}, **more,
        )  # fmt: skip
    return tokenizer.codebook_VE


@pytest.mark.golden
@pytest.mark.parametrize("official", [False, True], ids=["causal", "official"])
@pytest.mark.parametrize("case", [case for case in find_cases(kind="var_dd") if case.config["teacher_start"]], ids=str)
def test_both_recorded_prefixes_come_from_the_command_lines_configuration(case, official, tmp_path):
    book, io, config = bundles_of(case, tmp_path), case.io, case.config
    text = f"{config['teacher_start'] + 1}-{config['t2'] + 1}"
    ends = (0, *tiny_var.Layout.next_scale(tuple(config["patch_nums"])).ends)
    recipe = StackConfig(
        model=str(tmp_path / "student"), teacher_range=text, split=ends[config["split"]], temperature=0, compat_official_prefix=official
    )
    labels = io["in.labels"]
    made = build(recipe).generator.from_noise(Request(torch.arange(len(labels)), 0, labels_B=labels), io["in.noise"])
    prefix, tolerance = "official" if official else "causal", case.meta["tolerance"]["float_abs"]
    expected = nearest_codes(io[f"out.combine.mid.teacher_tokens_{prefix}"], book)
    assert_same(made.codes_BL[:, : ends[config["t2"]]], expected, "codes of prefix and teacher")
    vectors = book[made.codes_BL] if made.embeddings_BLE is None else made.embeddings_BLE
    assert_close(vectors, io[f"out.combine.mid.out_{prefix}"], abs_tol=tolerance, what="sample")


def test_the_teacher_may_be_called_model_as_everywhere_else():
    plans = [invoke("distill", option, "var", "--dry-run") for option in ("--teacher", "--model")]
    assert plans[0].exit_code == plans[1].exit_code == 0 and "teacher: var" in plans[1].stdout
    assert plans[0].stdout == plans[1].stdout
