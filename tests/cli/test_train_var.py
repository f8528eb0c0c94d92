"""``arsp train`` of the VAR family at tiny sizes: tokenizer, teacher, and a refiner or drafter made from a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import tiny_var
import torch
from command_line import invoke, record_of, refused
from safetensors.torch import load_file

from arsp.data import shapes
from arsp.data.images import save_png_dir
from arsp.runs import sha256_file
from arsp.train import loop
from arsp.zoo import bundle
from arsp.zoo.load import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["optim.batch_size=8", "optim.warmup=2", "optim.eval_every=3", "optim.checkpoint_every=4", "optim.autocast=off"]
VQ = ["vq.ch=32", "vq.ch_mult=[1,1]", "vq.z_channels=4", "vq.vocab_size=16", "vq.patch_nums=[1,2,4]"]
SIZES = ["var.depth=2", "var.embed_dim=16", "var.num_heads=2"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with 30 images of three classes, a tokenizer for them and a teacher on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    pool = shapes.draw(30, 1)[0][:, :, ::4, ::4].contiguous()
    for i, name in enumerate(tiny_models.CLASSES):
        save_png_dir(pool[10 * i : 10 * i + 10], tmp_path / "photos" / name)
    tiny_var.tokenizer_bundle(tmp_path / "tok")
    tiny_var.teacher_bundle(tmp_path / "big")
    tiny_models.tokenizer_bundle(tmp_path / "raster-tok")
    return tmp_path


def train(what, out, *more):
    return invoke("train", what, "--data", "photos", "--steps", 9, "--out", out, "--json", *SMALL, *more)


def tokenizer(out, *more):
    return train("tokenizer", out, "--family", "var", *VQ, *more)


def teacher(out, *more):
    return train("teacher", out, "--tokenizer", "tok", *SIZES, *more)


def refiner(out, *more):
    return train("teacher", out, "--tokenizer", "big", "--init", "big", "--scales", "2", *more)


def digest(out):
    return sha256_file(Path(out) / "bundle" / "model.safetensors")


def figures(record):
    return {m["name"]: m["value"] for m in record["metrics"]}


def test_a_tokenizer_and_a_teacher_from_a_folder_make_images(place):
    record = record_of(tokenizer("vq"))
    assert {"psnr_db", "codes_used", "first_scale_codes", "psnr_db_scale_0", "psnr_db_scale_1"} <= figures(record).keys()
    assert load_tokenizer("vq").config == tiny_var.VQ
    made = record_of(train("teacher", "mine", "--tokenizer", "vq", *SIZES, "optim.steps=2", "sampling.cfg=0.75"))
    assert {"nats_per_token", "nats_per_image", "nats_scale_0", "nats_scale_2"} <= figures(made).keys()
    loaded = load_model("mine")
    assert loaded.source.family.name == "var" and loaded.source.card["classes"] == tiny_models.CLASSES
    assert loaded.module.config == tiny_var.CONFIG
    for key, value in load_file("vq/bundle/model.safetensors").items():
        assert torch.equal(loaded.tokenizer.state_dict()[key], value), key
    sample = record_of(invoke("sample", "--model", "mine", "--num", 2, "--class", "bee", "--json", "-q"))
    assert sample["stack"]["cfg"] == 0.75 and sample["cost"]["passes"] == 3
    assert len(list((Path(sample["run_dir"]) / "images").iterdir())) == 2


def test_a_tokenizer_bundle_holds_the_tokenizer_alone(place):
    record_of(tokenizer("vq", "optim.steps=1"))
    assert load_file("vq/bundle/model.safetensors").keys() == tiny_var.tokenizer_model().state_dict().keys()


class Dies(Exception):
    pass


@pytest.mark.parametrize("command", [tokenizer, teacher, refiner])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_training_continues_to_the_same_weights(place, monkeypatch, command, ema):
    more = [f"optim.ema={ema}"]
    whole = record_of(command("whole", *more))
    update, real = [], loop._update

    def dying(*arguments):
        update.append(arguments[3])
        if len(update) in (6, 8):  # at step 5, then, from the checkpoint of step 4, at step 5 again
            raise Dies("killed")
        return real(*arguments)

    monkeypatch.setattr(loop, "_update", dying)
    assert [command("parts", *more).exit_code for _ in range(2)] == [1, 1]
    result = command("parts", *more)
    assert "resumed at step 4" in result.stderr and update[5:8] == [5, 4, 5], update
    assert figures(record_of(result)) == figures(whole) and digest("parts") == digest("whole")


def test_a_refiner_starts_from_its_teacher_and_learns_its_own_scales(place):
    record = record_of(refiner("refined", "optim.lr=0.02", "optim.steps=20", "optim.eval_every=1"))
    assert "nats_scale_2" in figures(record) and "nats_scale_1" not in figures(record)
    manifest = bundle.read_manifest(place / "refined" / "bundle")
    assert manifest["scales"] == [2, 2] and manifest["parents"] == [{"model": "big", "sha256": sha256_file("big/model.safetensors")}]
    curve = [point["y"] for point in record["curves"]["nats_scale_2"]]
    assert curve[-1] < 0.95 * curve[0], f"nats a code of its own scale: {curve}"
    assert load_model("refined").module.config == tiny_var.CONFIG
    sample = record_of(invoke("sample", "--collab", "big:refined@2", "--num", 2, "--json", "-q"))
    assert [row["model"] for row in sample["stack"]["schedule"]] == ["big", "big", "refined"]


def test_a_start_without_updates_is_the_teacher_itself(place):
    record_of(refiner("copy", "optim.steps=0"))
    for key, value in load_file("big/model.safetensors").items():
        assert torch.equal(load_file("copy/bundle/model.safetensors")[key], value), key


def test_an_expert_is_matched(place):
    tiny_var.teacher_bundle(place / "expert", seed=7)
    record = record_of(refiner("taught", "expert=expert", "expert_weight=1", "optim.lr=0.02", "optim.steps=30", "optim.eval_every=10"))
    kl = [point["y"] for point in record["curves"]["kl"]]
    assert kl[-1] < 0.9 * kl[0], f"KL to the expert: {kl}"
    assert [parent["model"] for parent in bundle.read_manifest(place / "taught" / "bundle")["parents"]] == ["big", "expert"]


def test_a_teacher_that_is_its_own_expert_does_not_follow_itself(place):
    record = record_of(refiner("own", "expert=big", "optim.lr=0.02"))
    assert record["curves"]["kl"][-1]["y"] > 1e-4, "the expert changed with the model"


def test_the_family_follows_the_tokenizer_or_the_start(place):
    assert record_of(invoke("train", "teacher", "--tokenizer", "tok", "--dry-run", "--json"))["plan"]["var"]["depth"] == 8
    assert record_of(invoke("train", "teacher", "--init", "big", "--dry-run", "--json"))["plan"]["init"] == "big"
    assert "gpt" in record_of(invoke("train", "teacher", "--tokenizer", "raster-tok", "--dry-run", "--json"))["plan"]
    assert "gpt" in record_of(invoke("train", "teacher", "--dry-run", "--json"))["plan"]
    assert "truncate" in record_of(invoke("train", "tokenizer", "--family", "var", "--dry-run", "--json"))["plan"]["vq"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["teacher", "--family", "vra"], 3, "Did you mean: var"),
        (["features", "--family", "var"], 3, "--family var"),
        (["teacher", "--family", "var", "--tokenizer", "raster-tok"], 3, "belongs to the family llamagen"),
        (["teacher", "--family", "llamagen", "--tokenizer", "tok"], 3, "belongs to the family var"),
        (["teacher", "--tokenizer", "tok", "gpt.dim=16"], 3, "gpt"),
        (["teacher", "--family", "llamagen", "--init", "big"], 3, "--init"),
        (["tokenizer", "--family", "var", "--scales", "1-2"], 3, "--scales"),
        (["teacher", "--tokenizer", "tok", "--scales", "1-3"], 3, "within 0-2"),
        (["teacher", "--tokenizer", "tok", "--scales", "2-1"], 3, "within 0-2"),
        (["teacher", "--tokenizer", "tok", "--init", "other"], 3, "another tokenizer"),
        (["teacher", "--tokenizer", "tok", "expert=other"], 3, "another tokenizer"),
        (["teacher", "--tokenizer", "tok", "--init", "student"], 3, "VAR teacher is needed"),
        (["teacher", "--tokenizer", "tok", "--init", "big", "var.depth=3"], 3, "--init"),
        (["teacher", "--tokenizer", "tok", "--init", "four"], 3, "four knows 4 classes"),
        (["teacher", "--tokenizer", "tok", "expert=four"], 3, "four knows 4 classes"),
        (["teacher", "--tokenizer", "tok", "var.embed_dim=15"], 3, "not divisible"),
        (["teacher", "--tokenizer", "tok", "short=1.5"], 3, "short"),
        (["teacher", "--tokenizer", "tok", "short_scales=3"], 3, "short_scales 3: no part of the trained scales 0-2"),
        (["teacher", "--tokenizer", "tok", "--scales", "1-2", "short_scales=1"], 3, "above 1 and below 3"),
        (["tokenizer", "--family", "var"], 3, "make 32 px"),
        (["tokenizer", "--family", "var", *VQ, "vq.patch_nums=[1,4,2]"], 3, "rising"),
        (["tokenizer", "--family", "var", *VQ, "vq.vocab_size=2"], 3, "vq.first_share"),
        (["tokenizer", "--family", "var", "vq.codebook_size=16"], 3, "vq.codebook_size"),
    ],
)
def test_bad_options_end_in_their_exit_code(place, words, code, said):
    tiny_var.teacher_bundle(place / "other", tokenizer_seed=9)
    tiny_var.student_bundle(place / "student")
    tiny_var.teacher_bundle(place / "four", replace(tiny_var.CONFIG, num_classes=4))
    refused(invoke("train", *words, "--data", "photos", "--steps", 2), code, said)
    assert not list((place / "runs").glob("*/checkpoints"))


def test_short_updates_that_the_model_has_no_scales_for_are_left_out_aloud(place):
    result = teacher("var", "optim.steps=1")
    assert record_of(result) and "short_scales 4: no part of the trained scales 0-2, so no update is short" in result.stderr
    assert "short_scales" not in teacher("other", "optim.steps=1", "short_scales=2").stderr


def test_a_folder_with_fewer_images_than_codes_trains_a_tokenizer(place, recwarn):
    record = record_of(tokenizer("vq", "vq.vocab_size=64", "optim.steps=3"))
    assert all(torch.isfinite(value).all() for value in load_file("vq/bundle/model.safetensors").values())
    assert record["status"] == "ok" and [str(w.message) for w in recwarn if "scipy" in w.filename] == []
