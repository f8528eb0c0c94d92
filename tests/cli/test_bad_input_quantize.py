"""What cannot be quantised, or used once it is: one message, the documented exit code, nothing written."""

import json

import pytest
import tiny_quant
import torch
from command_line import invoke, refused
from safetensors.torch import load_file, save_file

from arsp.data.images import save_png_dir
from arsp.runs import sha256_file, write_json
from arsp.zoo.bundle import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("calibration.num=4", "calibration.check=4", "calibration.batch_size=2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by name, ``q`` a quantised run of ``llamagen``, ``nan`` one whose weights are not finite."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llamagen", "var", "llamagen-student"):
        tiny_quant.make(kind, folder / kind)
    assert invoke("quantize", "--model", folder / "llamagen", *FEW, "--out", folder / "q").exit_code == 0
    changed(folder / "llamagen", folder / "nan", {"layers.1.attention.wo.weight": torch.full((64, 64), torch.nan)})
    changed(folder / "llamagen", folder / "nan-kept", {"tok_embeddings.weight": torch.full((16, 64), torch.inf)})
    (folder / "empty").mkdir()
    save_png_dir(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), folder / "large")
    return folder


def changed(source, target, weights=None, block=None):
    """A copy of a bundle with other tensors (None: left out) or another quantisation, its hashes correct."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors") | (weights or {})
    save_file({key: value for key, value in tensors.items() if value is not None}, target / "model.safetensors")
    (target / "tokenizer.safetensors").write_bytes((source / "tokenizer.safetensors").read_bytes())
    manifest = json.loads((source / MANIFEST).read_text())
    if block is not None:
        manifest["quantization"] = block(manifest["quantization"])
    manifest["sha256"]["model.safetensors"] = sha256_file(target / "model.safetensors")
    write_json(target / MANIFEST, manifest)
    return target


@pytest.fixture
def place(models, monkeypatch, tmp_path):
    """The models by name; nothing may be written beside them or as a run."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    before = sorted(models.rglob("*"))
    yield tmp_path
    assert not (tmp_path / "runs").exists() and sorted(models.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--group", 96], 3, "group sizes are 32, 64, 128, or -1"),
        (["--group", 0], 3, "group sizes are"),
        (["weights.group_size=16"], 3, "group sizes are"),
        (["layers.formats={'*.wo': [4, 48]}"], 3, "group sizes are"),
        (["weights.bits=3"], 3, "weights.bits"),
        (["--recipe", "w4a4"], 3, "Did you mean: w4a8"),
        (["--recipe", ""], 3, "unknown recipe"),
        (["recipes=w4a8"], 3, "unknown key 'recipes'"),
        (["weights.bit=4"], 3, "weights.bits"),
        (["layers.only=[attention]"], 3, "names no layer"),
        (["layers.only=[]"], 3, "layers.only"),
        (["layers.keep=['*']"], 3, "names no layer"),
        (["calibration.num=0"], 3, "calibration.num"),
        (["--num", 0], 3, "calibration.num"),
        (["--calib-source", "empty"], 4, "empty holds no image"),
        (["--recipe", "w4a8-gptq", "--calib-source", "empty"], 4, "empty holds no image"),
        (["--calib-source", "missing"], 4, "missing is not a folder"),
        (["--budget", "0.05x"], 3, "smallest feasible one is 0."),
        (["--budget", "1KB"], 3, "KB"),
        (["--budget", "half"], 3, "a budget of bytes is written"),
        (["--budget", "2ms"], 3, "a budget of bytes is written"),
        (["--budget", "0.3x", "--group", 32], 2, "--group has no effect"),
        (["--recipe", "w8a8", "--group", 32], 2, "--group has no effect"),
        (["--recipe", "litevar", "balance.rotate=true"], 3, "simulate: litevar"),
        (["activations.scales=static", "balance.rotate=false"], 3, "next-scale"),
        (["--recipe", "w8a8", "activations.scales=static", "--model", "var"], 3, "rotated input"),
        (["--model", "q"], 3, "quantised already"),
        (["--model", "q/bundle", "--recipe", "w8a8"], 3, "quantised already"),
        (["--model", "nan"], 4, "layers.1.attention.wo.weight holds NaN"),
        (["--model", "nan", "--recipe", "w4a8-gptq"], 4, "layers.1.attention.wo.weight holds NaN"),
        (["--model", "nan-kept"], 4, "tok_embeddings.weight holds NaN"),
        (["--model", "missing"], 3, "unknown model 'missing'"),
        (["--model", "./missing"], 4, "no such file"),
        (["--model", "empty"], 4, "not a bundle"),
        (["--model", "llamagen-b-256"], 4, "not on this machine"),
        (["--model", "llamagen-t2i-xl-256"], 3, "conditioned on text"),
        (["--model", "llamagen-student", "--calib-source", "large"], 3, "its own noise"),
        (["--tokenizer", "vq.pt"], 3, "--tokenizer"),
        (["-c", "missing.yaml"], 4, "missing.yaml"),
        (["--cfg", -1], 3, "cfg"),
        (["rest=int8"], 3, "rest"),
        (["--device", "cuda:99"], 5, "--device cuda:99"),
    ],
)
def test_quantize_refuses(place, words, code, said):
    model = [] if "--model" in words else ["--model", "./llamagen"]
    refused(invoke("quantize", *model, *words), code, said)


def test_a_budget_that_is_named_as_the_smallest_is_accepted(place, tmp_path):
    for budget in ("0.05x", "1KB"):
        message = invoke("quantize", "--model", "./llamagen", "--budget", budget).stderr
        least = message.partition("Give --budget ")[2].split()[0]
        assert invoke("quantize", "--model", "./llamagen", "--budget", least, "--dry-run").exit_code == 0, message


def test_images_of_another_size_make_no_bundle(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    words = ("--recipe", "w4a8-gptq", "--calib-source", "large", "--out", tmp_path / "run")
    refused(invoke("quantize", "--model", "./llamagen", *words, *FEW), 3, "images of 16x16")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed" and not (tmp_path / "run" / "bundle").exists()


def test_a_directory_of_another_configuration_is_left_alone(models, monkeypatch):
    monkeypatch.chdir(models)
    before = (models / "q" / "run.json").read_bytes()
    refused(invoke("quantize", "--model", "./llamagen", "--recipe", "w8a8", *FEW, "--out", "q"), 8, "another configuration")
    assert (models / "q" / "run.json").read_bytes() == before


@pytest.mark.parametrize("command", [["sample", "--num", 1], ["eval", "--num", 4], ["bench", "--num", 1], ["speculate", "--num", 1]])
def test_damaged_bundles_are_refused_by_every_command(models, tmp_path, runs_dir, command):
    """Newer formats, tensors that are missing, blocks without meaning: exit code 4 and no image."""
    name = "layers.0.attention.wo"
    newer = lambda block: {**block, "arsp": {**block["arsp"], "format_version": 9}}
    for i, (weights, block, said) in enumerate(
        [
            (None, newer, "quantised format 9; this arsp reads up to 1"),
            (None, lambda block: {"quant_method": "gptq"}, "not of arsp"),
            ({f"{name}.weight_packed": None}, None, f"{name}"),
            ({f"{name}.weight_scale": torch.full((64, 1), torch.nan)}, None, "not finite"),
        ]
    ):
        bundle = changed(models / "q" / "bundle", tmp_path / f"{command[0]}{i}", weights, block)
        target = ["--model", bundle] if command[0] in ("sample", "speculate", "eval") else [bundle]
        refused(invoke(command[0], *target, *command[1:]), 4, said)
    assert not list(runs_dir.rglob("*.png"))


def test_recipes_are_not_applied_to_what_is_quantised(place):
    refused(invoke("sample", "--model", "q", "--apply", "w4a8", "--num", 1), 3, "quantised already")
    refused(invoke("sample", "--model", "./llamagen", "--apply", "w4a8-gptq", "--num", 1), 3, "own samples")
    refused(invoke("sample", "--model", "./llamagen", "--apply", "w4a8", "--apply", "w8a8", "--num", 1), 3, "one recipe at a time")


def test_an_official_loop_on_integers_is_refused(place):
    refused(invoke("bench", "q", "--baseline", "eager", "--num", 1), 3, "is quantised", "base model")


def test_random_weights_of_a_quantised_model_mean_nothing(place):
    refused(invoke("bench", "q", "--random-weights", "--num", 1), 3, "random weights have no integers")
