"""``arsp sample`` on tiny VARs: schedules, two models in one image, windows and sharing, and what the record says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_var
import torch
from command_line import invoke, record_of, refused
from PIL import Image
from safetensors.torch import save_file

from arsp import stack as stacks
from arsp.zoo import bundle
from arsp.zoo.load import load_model, resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = (1, 2, 3, 4)
CONFIG, VQ = replace(tiny_var.CONFIG, patch_nums=SIDES), replace(tiny_var.VQ, patch_nums=SIDES)
SMALL = replace(CONFIG, depth=1, embed_dim=8)
TENSORS = ("model.safetensors", "tokenizer.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a big and a small teacher of four scales and a profile of the big one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(stacks, "cache_root", lambda: tmp_path / "cache")
    tiny_var.teacher_bundle(tmp_path / "big", CONFIG, vq=VQ)
    tiny_var.teacher_bundle(tmp_path / "small", SMALL, seed=5, vq=VQ)
    tiny_var.profile_bundle(tmp_path / "profile", resolve("big"), 1)
    return tmp_path


def arsp(*words):
    return invoke("sample", *words)


def sample(*words, model="big", num=3):
    return record_of(arsp("--model", model, "--num", num, "--json", "-q", *words))


def pixels(record):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((Path(record["run_dir"]) / "images").glob("*.png"))]).astype(int)


def equal(a, b, levels=0):
    gap = np.abs(pixels(a) - pixels(b)).max()
    assert gap <= levels, f"images differ by {gap} levels, allowed {levels}"


def other(a, b):
    assert (pixels(a) != pixels(b)).any(), "the option has no effect on the images"


def column(record, name):
    return [row[name] for row in record["stack"]["schedule"]]


def test_a_plain_run_has_a_pass_a_scale_and_no_schedule(place):
    record = sample()
    assert record["stack"]["family"] == "var" and record["stack"]["num_tokens"] == 30 and record["stack"]["cfg"] == 0.5
    assert record["cost"]["passes"] == len(SIDES) and record["cost"]["simulated"] is False
    assert "schedule" not in record["stack"] and "attention" not in record["cost"]
    # keys and values of both halves, all layers, every scale but the last, float32
    assert record["cost"]["kv_bytes"] == 3 * 2 * 2 * CONFIG.depth * CONFIG.embed_dim * (1 + 4 + 9) * 4
    assert sample("--cfg", 0)["cost"]["kv_bytes"] == record["cost"]["kv_bytes"] / 2


OPTIONS = [
    [],
    ["--collab", "big:small@2"],
    ["--apply", "litevar=profile"],
    ["--share", "map"],
    ["--more-smooth"],
    ["--collab", "big:small@3", "--apply", "litevar=profile", "--share", "map"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_images_do_not_depend_on_the_batch_size_or_on_how_many_are_made(place, options):
    whole = sample(*options, "--seed", 5, "--batch-size", 5, "--out", "a", num=5)
    equal(whole, sample(*options, "--seed", 5, "--batch-size", 2, "--out", "b", num=5), levels=1)
    few = sample(*options, "--seed", 5, "--batch-size", 1, "--out", "c")
    assert np.abs(pixels(whole)[:3] - pixels(few)).max() <= 1
    other(whole, sample(*options, "--seed", 6, "--out", "d", num=5))


@pytest.mark.parametrize("options", OPTIONS[1:], ids=" ".join)
def test_every_option_has_an_effect_that_its_record_names(place, options):
    record = sample(*options)
    other(sample(), record)
    assert len(record["stack"]["schedule"]) == len(SIDES) and record["stack"]["name"].startswith("big + ")
    assert column(record, "side") == list(SIDES) and column(record, "precision") == ["float32"] * 4


def test_two_models_share_an_image(place):
    record = sample("--collab", "big:small@3")
    assert column(record, "model") == ["big", "big", "big", "small"]
    equal(record, record_of(arsp("--collab", "big:small@3", "--num", 3, "--json", "--out", "bare")))
    (place / "rows.yaml").write_text("- {scales: 3, model: small}\n")
    equal(record, sample("--schedule", "rows.yaml"))
    other(record, sample(model="small"))
    other(record, sample("--collab", "big:small@1"))


def test_the_drafter_as_refiner_makes_the_plain_images(place):
    plain = sample()
    for count in (1, 2, 3):
        equal(plain, sample("--collab", f"big:big@{count}"))


def test_a_schedule_fills_every_column(place):
    (place / "rows.yaml").write_text(
        "- {scales: 0, precision: bfloat16}\n"
        "- {scales: 1, depth: 2, cfg: shared}\n"
        "- {scales: 2, depth: 1, cfg: shared}\n"
        "- {scales: 3, model: small, cfg: off, depth: 1}\n"
    )
    record = sample("--schedule", "rows.yaml")
    assert column(record, "precision") == ["bfloat16", "float32", "float32", "float32"]
    assert column(record, "depth") == [None, 2, 1, 1] and column(record, "cfg") == ["full", "shared", "shared", "off"]
    assert column(record, "model") == ["big", "big", "big", "small"] and column(record, "attention") == ["dense"] * 4
    other(record, sample())


@pytest.mark.parametrize(
    "row",
    ["precision: bfloat16", "depth: 1", "cfg: shared", "cfg: off", "model: small", "attention: litevar=profile"],
)
def test_each_column_alone_changes_the_images(place, row):
    (place / "rows.yaml").write_text(f"- {{scales: 1-3, {row}}}\n")
    other(sample("--dtype", "float32"), sample("--schedule", "rows.yaml"))


def test_a_schedule_of_defaults_is_the_plain_sampler(place):
    (place / "rows.yaml").write_text("- {scales: 0-3, precision: float32, attention: dense, cfg: full, depth: 2}\n")
    equal(sample(), sample("--schedule", "rows.yaml"))


def test_the_record_says_what_attention_was_left_out(place, monkeypatch):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    record = sample("--collab", "big:small@3", "--apply", "litevar=profile")
    (report,) = record["cost"]["attention"]
    assert report["model"] == "big" and [entry["scale"] for entry in report["scales"]] == [0, 1, 2]
    # both halves share the map: half of the first product is gone, and nothing else (the windows are those of the last scale)
    assert report["executed_share"] == 0.75 and report["pairs"]["windowed"] == report["pairs"]["dense"]
    assert column(record, "attention") == ["litevar=profile"] * 3 + ["dense"] and record["cost"]["simulated"] is False
    report = sample("--apply", "litevar=profile")["cost"]["attention"][0]
    assert [entry["scale"] for entry in report["scales"]] == [0, 1, 2, 3] and report["pairs"]["windowed"] < report["pairs"]["dense"]


def test_what_is_only_masked_is_called_simulated(place):
    tiny_var.profile_bundle(place / "official", resolve("big"), 1, mask="official-logit0")
    record = sample("--apply", "litevar=official")
    assert record["cost"]["simulated"] is True and record["cost"]["attention"][0]["mask"] == "official-logit0"


def test_a_profile_of_sparsify_is_taken(place):
    made = record_of(invoke("sparsify", "--model", "big", "--num", 2, "--batch-size", 2, "--share", "map", "--json"))
    record = sample("--apply", f"litevar={made['run_dir']}")
    assert record["cost"]["attention"][0]["policy"] == "litevar"
    refused(arsp("--model", "small", "--apply", f"litevar={made['run_dir']}"), 4, "layers", "arsp sparsify --model small")


def test_sharing_maps_stores_fewer_keys(place):
    plain, shared = sample(), sample("--share", "map")
    assert shared["cost"]["kv_bytes"] == 0.75 * plain["cost"]["kv_bytes"] and column(shared, "cfg") == ["shared"] * 4


def test_smoothed_pictures_are_called_so(place):
    assert sample("--more-smooth")["stack"]["sampler"] == "more-smooth"


def test_a_dry_run_prints_a_row_a_scale_and_reads_no_weights(place, monkeypatch):
    real = bundle.load_weights
    reads = lambda path, name, manifest: real(path, name, manifest) if name not in TENSORS else pytest.fail(f"{name} was read")
    monkeypatch.setattr(bundle, "load_weights", reads)
    words = ("--collab", "big:small@3", "--apply", "litevar=profile", "--share", "map", "--dtype", "bfloat16", "--dry-run")
    rows = record_of(arsp(*words, "--json"))["plan"]["schedule"]
    assert [(row["scale"], row["side"], row["model"], row["attention"]) for row in rows] == [
        (0, 1, "big", "litevar=profile"),
        (1, 2, "big", "litevar=profile"),
        (2, 3, "big", "litevar=profile"),
        (3, 4, "small", "dense"),
    ]
    assert all(row["cfg"] == "shared" and row["precision"] == "bfloat16" and row["depth"] is None for row in rows)
    assert len(record_of(arsp("--model", "big", "--dry-run", "--json"))["plan"]["schedule"]) == 4
    assert "litevar=profile" in arsp(*words).stdout and not (place / "runs").exists()


def test_a_dry_run_of_a_raster_model_has_no_schedule(place):
    assert "schedule" not in record_of(arsp("--model", "llamagen", "--dry-run", "--json"))["plan"]


def test_controls_of_a_next_scale_teacher(place):
    plain, made = sample(), {}
    for baseline in ("skip-1", "skip-2", "naive", "mode"):
        made[baseline] = sample("--baseline", baseline, "--class", "bee")
        assert made[baseline]["stack"]["sampler"] == baseline and made[baseline]["stack"]["name"] == f"big {baseline}"
        other(plain, made[baseline])
    assert made["skip-1"]["cost"]["passes"] == 3 and made["skip-2"]["cost"]["passes"] == 2
    assert (pixels(made["mode"]) == pixels(made["mode"])[:1]).all() and (pixels(made["naive"])[0] != pixels(made["naive"])[1]).any()
    assert sample("--baseline", "skip-1", "--collab", "big:small@2")["stack"]["name"] == "big skip-1 + big:small@2"


def test_the_torch_stream_is_reproducible_and_differs_from_the_keyed_one(place):
    a, b = (sample("--rng", "torch", "--batch-size", 2, "--out", name) for name in "ab")
    equal(a, b)
    other(a, sample("--batch-size", 2))


def test_half_precision_and_resizing_run(place):
    record = sample("--dtype", "bfloat16", "--image-size", 12, "--collab", "big:small@2")
    assert pixels(record).shape == (3, 12, 12, 3) and column(record, "precision") == ["bfloat16"] * 4


def official(place, config, seed=2):
    """Weights of a tiny model with the level ids that tell its scales."""
    sizes = torch.tensor([side * side for side in config.patch_nums])
    levels = torch.arange(len(sizes)).repeat_interleave(sizes)[None]
    path = place / f"var-{config.depth}.safetensors"
    save_file({**tiny_var.var_model(config, seed).state_dict(), "lvl_1L": levels}, path)
    return path.name


def test_official_files_with_a_tokenizer_of_another_number_of_scales(place):
    save_file(tiny_var.tokenizer_model(replace(VQ, patch_nums=(1, 2, 3, 5, 6, 8))).state_dict(), "vq.safetensors")
    big, small = official(place, CONFIG), official(place, SMALL, 5)
    files = ("--tokenizer", "vq.safetensors", "--cfg", 1, "--top-k", 0)
    record = sample(*files, model=big)
    assert record["stack"]["origin"] == "file" and record["stack"]["num_tokens"] == 30 and pixels(record).shape == (3, 8, 8, 3)
    assert load_model(big, tokenizer="vq.safetensors").tokenizer.config.patch_nums == SIDES
    two = sample(*files, "--collab", f"{big}:{small}@2", model=big)
    assert column(two, "model") == ["var-2", "var-2", small, small]
    refused(arsp("--model", big, "--num", 1), 4, "tokenizer", "--tokenizer FILE")


def test_weights_that_changed_since_the_images_were_made_are_noticed(place):
    sample("--collab", "big:small@2")
    tiny_var.teacher_bundle(place / "small", SMALL, seed=6, vq=VQ)
    refused(arsp("--model", "big", "--num", 3, "--collab", "big:small@2"), 8, "other weights of small", "--no-resume")
    tiny_var.profile_bundle(place / "profile", resolve("big"), 1)
    sample("--apply", "litevar=profile")
    tiny_var.profile_bundle(place / "profile", resolve("big"), 2)
    refused(arsp("--model", "big", "--num", 3, "--apply", "litevar=profile"), 8, "other weights of profile", "--no-resume")
    assert sample("--apply", "litevar=profile", "--no-resume")["stack"]["parts"].keys() == {"profile"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--collab", "big:small@4"], 3, "1 <= N <= 3"),
        (["--collab", "big:small"], 3, "BIG:SMALL@N"),
        (["--collab", "small:big@2", "--model", "big"], 3, "big model"),
        (["--model", "llamagen", "--collab", "big:small@2"], 3, "next-scale"),
        (["--model", "big", "--schedule", "none.yaml"], 4, "none.yaml"),
        (["--model", "big", "--apply", "litevar"], 3, "no packaged profile"),
        (["--model", "small", "--apply", "litevar=profile"], 4, "arsp sparsify"),
        (["--model", "big", "--apply", "faster=1"], 3, "litevar=PROFILE"),
        (["--model", "big", "--share", "output"], 3, "share"),
        (["--model", "big", "--share", "map", "--cfg", 0], 3, "no halves"),
        (["--model", "big", "--cfg-interval", 1], 3, "--cfg-interval"),
        (["--model", "big", "--more-smooth", "--rng", "torch"], 3, "--more-smooth"),
        (["--model", "big", "--baseline", "skip-4"], 3, "skip-N"),
        (["--model", "big", "--baseline", "naive", "--collab", "big:small@2"], 3, "Drop --collab"),
        (["--model", "big", "--student-steps", 1], 3, "--student-steps"),
    ],
)
def test_bad_input_ends_in_its_exit_code_and_one_message(place, words, code, said):
    refused(arsp(*words), code, said)
    assert not (place / "runs").exists()


def test_the_labels_and_the_record_are_complete(place):
    record = sample("--class", "cat", "--class", 0, "--collab", "big:small@2")
    assert json.loads((Path(record["run_dir"]) / "labels.json").read_text()) == [2, 0, 2]
    assert json.loads((Path(record["run_dir"]) / "run.json").read_text()) == record
