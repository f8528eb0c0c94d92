import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import invoke, record_of, refused
from safetensors.torch import load_file

from arsp.data import shapes
from arsp.data.images import save_png_dir
from arsp.errors import Interrupted
from arsp.runs import sha256_file
from arsp.train import loop, pipeline, tasks
from arsp.zoo.load import load_model, load_tokenizer, resolve

SMALL = ["optim.batch_size=8", "optim.warmup=2", "optim.eval_every=3", "optim.checkpoint_every=4"]
GPT = ["gpt.dim=16", "gpt.n_layer=1", "gpt.n_head=2", "gpt.multiple_of=8"]
VQ = ["vq.ch=32", "vq.ch_mult=[1,1]", "vq.z_channels=32", "vq.codebook_size=16", "vq.codebook_embed_dim=4"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with 30 images of three classes and a tokenizer for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    pool = shapes.draw(30, 1)[0][:, :, ::4, ::4].contiguous()
    for i, name in enumerate(tiny_models.CLASSES):
        save_png_dir(pool[10 * i : 10 * i + 10], tmp_path / "photos" / name)
    tiny_models.tokenizer_bundle(tmp_path / "tok")
    return tmp_path


def teacher(out, *more):
    return ["train", "teacher", "--data", "photos", "--tokenizer", "tok", "--steps", 9, "--out", out, "--json", *SMALL, *GPT, *more]


def tokenizer(out, *more):
    return ["train", "tokenizer", "--data", "photos", "--steps", 9, "--out", out, "--json", *SMALL, *VQ, *more]


def features(out, *more):
    return ["train", "features", "--data", "shapes32-coarse", "--steps", 6, "--out", out, "--json", *SMALL, "optim.eval_every=6", *more]


def digest(out):
    return sha256_file(Path(out) / "bundle" / "model.safetensors")


def figures(record):
    return [(m["name"], m["value"]) for m in record["metrics"]]


def test_a_tokenizer_and_a_teacher_from_a_folder_make_images(place):
    record = record_of(invoke(*tokenizer("vq")))
    assert [a["kind"] for a in record["artifacts"]] == ["bundle"] and {"psnr_db", "codes_used", "loss"} <= record["curves"].keys()
    assert load_tokenizer("vq").config == tiny_models.VQ
    record_of(invoke("train", "teacher", "--data", "photos", "--tokenizer", "vq", "--steps", 2, "--out", "gpt", "--json", *SMALL, *GPT))
    loaded = load_model("gpt")
    assert loaded.source.card["classes"] == tiny_models.CLASSES and loaded.source.config["num_classes"] == 3
    for key, value in load_file("vq/bundle/model.safetensors").items():
        assert torch.equal(loaded.tokenizer.state_dict()[key], value), key
    sample = record_of(invoke("sample", "--model", "gpt", "--num", 2, "--class", "bee", "--json", "-q"))
    assert sample["stack"]["top_p"] == 0.95 and len(list((Path(sample["run_dir"]) / "images").iterdir())) == 2


def test_a_teacher_may_take_its_tokenizer_from_another_teacher(place):
    tiny_models.teacher_bundle(place / "other")
    record_of(invoke(*teacher("gpt", "tokenizer=other", "optim.steps=1")))
    assert load_model("gpt").tokenizer.config == tiny_models.VQ


def test_a_teacher_of_the_packaged_tokenizer_refers_to_it(place):
    for i, name in enumerate(("x", "y")):
        save_png_dir(shapes.draw(4, i)[0], place / "shapes" / name)
    record_of(invoke("train", "teacher", "--data", "shapes", "--steps", 1, "--out", "gpt", "--json", *SMALL, *GPT))
    assert not (place / "gpt" / "bundle" / "tokenizer.safetensors").exists()
    assert load_model("gpt").tokenizer.codebook_VE.shape == (256, 8)


class Dies(Exception):
    pass


@pytest.mark.parametrize("command", [teacher, tokenizer, features])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_training_continues_to_the_same_weights(place, monkeypatch, command, ema):
    more = [f"optim.ema={ema}"]
    whole = record_of(invoke(*command("whole", *more)))
    update, real = [], loop._update

    def dying(*arguments):
        update.append(arguments[3])
        if len(update) in (6, 8):  # at step 5, then, from the checkpoint of step 4, at step 5 again
            raise Dies("killed")
        return real(*arguments)

    monkeypatch.setattr(loop, "_update", dying)
    assert [invoke(*command("parts", *more)).exit_code for _ in range(2)] == [1, 1]
    result = invoke(*command("parts", *more))
    assert "resumed at step 4" in result.stderr and update[5:8] == [5, 4, 5], update
    again = record_of(result)
    assert digest("parts") == digest("whole") and figures(again) == figures(whole)
    assert again["curves"].keys() == whole["curves"].keys()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_training_stopped_by_a_signal_continues_to_the_same_weights(place, number, code):
    command = [*teacher("stopped", "optim.steps=300", "optim.checkpoint_every=5", "optim.eval_every=100"), "--threads", 1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "arsp", *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (place / "stopped" / "checkpoints" / "00000005").exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and out == "" and "Traceback" not in err and "run the same command again" in err, err
    assert json.loads((place / "stopped" / "run.json").read_text())["status"] == "interrupted"
    assert not (place / "stopped" / "bundle").exists()
    record = record_of(invoke(*command))
    assert record["status"] == "ok"
    whole = record_of(invoke(*teacher("whole", "optim.steps=300", "optim.checkpoint_every=5", "optim.eval_every=100")))
    assert digest("stopped") == digest("whole") and figures(record) == figures(whole)


def test_a_finished_training_is_not_repeated(place, monkeypatch):
    first = record_of(invoke(*teacher("a")))
    monkeypatch.setattr(loop, "_update", lambda *a: pytest.fail("trained again"))
    assert record_of(invoke(*teacher("a"))) == first


def test_another_configuration_in_the_same_directory_is_refused(place):
    record_of(invoke(*teacher("a", "optim.steps=1")))
    refused(invoke(*teacher("a", "optim.steps=2")), 8, "optim.steps: 1 there, 2 here")


def test_a_damaged_checkpoint_ends_in_one_message(place, monkeypatch):
    real = loop._update
    monkeypatch.setattr(loop, "_update", lambda *a: real(*a) if a[3] < 6 else (_ for _ in ()).throw(Dies("killed")))
    assert invoke(*teacher("a")).exit_code == 1
    file = place / "a" / "checkpoints" / "00000004" / "task.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(invoke(*teacher("a")), 4, "00000004", "Delete")


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ARSP_CACHE", str(folder))
    return folder / "codes"


def test_damaged_codes_of_the_images_end_in_one_message(place, cache):
    record_of(invoke(*teacher("a", "optim.steps=0")))
    (file,) = cache.glob("*.safetensors")
    file.write_bytes(b"nothing")
    refused(invoke(*teacher("b")), 4, file.name, "Delete")


def test_the_images_are_tokenised_once(place, cache, monkeypatch):
    record_of(invoke(*teacher("a", "optim.steps=0")))
    monkeypatch.setattr(pipeline, "tokenise", lambda *a: pytest.fail("the codes are in the cache"))
    record_of(invoke(*teacher("b", "optim.steps=0")))


def test_tokenising_can_be_stopped(place, cache, monkeypatch):
    def stop():
        raise Interrupted("stopped by SIGTERM", 143)

    monkeypatch.setattr(tasks, "check_stop", stop)
    refused(invoke(*teacher("a")), 143, "stopped")
    assert not list(cache.glob("*"))


def test_divergence_is_exit_6_and_keeps_the_last_checkpoint(place):
    refused(
        invoke(*teacher("a", "optim.lr=1e30", "optim.clip=1e30", "optim.warmup=0", "optim.checkpoint_every=1")), 6, "diverged", "optim.lr"
    )
    assert any((place / "a" / "checkpoints").glob("*/state.json")) and not (place / "a" / "bundle").exists()
    assert json.loads((place / "a" / "run.json").read_text())["status"] == "failed"


def bad_folders(place):
    (place / "empty").mkdir()
    (place / "hollow" / "a").mkdir(parents=True)
    (place / "words" / "a").mkdir(parents=True)
    (place / "words" / "a" / "x.png").write_text("no image")
    for name, side in (("a", 8), ("b", 16)):
        save_png_dir(torch.zeros(2, 3, side, side, dtype=torch.uint8), place / "mixed" / name)
    save_png_dir(torch.zeros(2, 3, 12, 12, dtype=torch.uint8), place / "other" / "a")
    save_png_dir(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), place / "odd" / "a")
    save_png_dir(torch.zeros(2, 3, 8, 16, dtype=torch.uint8), place / "wide" / "a")
    (place / "file.txt").write_text("x")


@pytest.mark.parametrize("command", [teacher, tokenizer])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("empty", "no sub-folders"),
        ("hollow", "holds no image"),
        ("words", "not a readable image"),
        ("mixed", "different sizes"),
        ("nowhere", "neither a folder"),
        ("file.txt", "neither a folder"),
    ],
)
def test_folders_that_are_no_training_set_are_exit_4(place, command, data, words):
    bad_folders(place)
    refused(invoke(*command("a"), "--data", data), 4, words)
    assert not (place / "a" / "bundle").exists() and not (place / "a" / "checkpoints").exists()


def test_images_that_do_not_fit_the_sizes_are_refused(place):
    bad_folders(place)
    refused(invoke(*teacher("a"), "--data", "other"), 4, "images of 12 px, the tokenizer takes 8 px")
    refused(invoke(*tokenizer("b"), "--data", "odd"), 3, "divisible by 2")
    refused(invoke(*tokenizer("c"), "--data", "wide"), 3, "squares")
    refused(invoke(*teacher("d"), "--data", "wide"), 4, "px")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "teachr"], 3, "Did you mean: teacher"),
        (["train"], 2, ""),
        (["train", "tokenizer", "--tokenizer", "x"], 3, "--tokenizer"),
        (["train", "features", "--data", "photos"], 3, "shapes32"),
        (["train", "teacher", "--steps", -1], 3, "optim.steps"),
        (["train", "teacher", "--lr", 0], 3, "optim.lr"),
        (["train", "teacher", "--batch-size", 0], 3, "optim.batch_size"),
        (["train", "teacher", "--seed", 1 << 64], 3, "optim.seed"),
        (["train", "teacher", "--seed", -1], 3, "optim.seed"),
        (["train", "teacher", "gpt.width=3"], 3, "gpt.width"),
        (["train", "teacher", "gpt.dim=30", "--data", "photos", "--tokenizer", "tok"], 3, "dim 30"),
        (["train", "teacher", "sampling.topp=0.5"], 3, "sampling.top_p"),
        (["train", "teacher", "sampling.top_k=0.5"], 3, "sampling.top_k"),
        (["train", "tokenizer", "vq.ch=33"], 3, "vq.ch"),
        (["train", "tokenizer", "vq.ch_mult=[]"], 3, "vq.ch_mult"),
        (["train", "tokenizer", "vq.ch_mult=[1,0]"], 3, "vq.ch_mult"),
        (["train", "teacher", "--tokenizer", "shape-vq16"], 3, "shape-vq16"),
        (["train", "teacher", "--tokenizer", "runs/none"], 4, "no such file"),
    ],
)
def test_bad_options_end_in_their_exit_code(place, words, code, said):
    result = invoke(*words)
    assert result.exit_code == code and said in result.stderr and "Traceback" not in result.stderr, (
        f"exit {result.exit_code}: {result.stderr}"
    )
    assert not list((place / "runs").glob("*/checkpoints"))


def test_a_feature_network_is_described_and_not_taken_for_a_model(place):
    record_of(invoke(*features("net", "optim.steps=1")))
    assert resolve("net").kind == "features"
    assert record_of(invoke("models", "info", "net", "--json"))["parameters"] == 387_643
    refused(invoke("sample", "--model", "net"), 3, "features")
    refused(invoke("distill", "--teacher", "net"), 3, "features")
    refused(invoke(*teacher("a"), "--tokenizer", "net"), 4, "feature network")


def test_a_large_seed_is_a_seed_of_its_own(place):
    for seed in (0, (1 << 64) - 1):
        record_of(invoke(*teacher(f"s{seed}", f"optim.seed={seed}", "optim.steps=2")))
    assert digest("s0") != digest(f"s{(1 << 64) - 1}")


def test_a_dry_run_writes_nothing(place):
    before = sorted(place.rglob("*"))
    assert record_of(invoke(*teacher("a"), "--dry-run"))["plan"]["gpt"]["dim"] == 16
    assert sorted(place.rglob("*")) == before


def test_the_exported_average_is_not_the_last_raw_weights(place):
    record_of(invoke(*teacher("a", "optim.ema=0.9")))
    raw = load_file("a/checkpoints/00000009/task.safetensors")
    exported = load_file("a/bundle/model.safetensors")
    assert any(not torch.equal(raw[f"trained.{key}"], value) for key, value in exported.items())
