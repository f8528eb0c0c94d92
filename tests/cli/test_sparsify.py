"""``arsp sparsify`` on a tiny random VAR: from samples to a profile that other commands take."""

from dataclasses import asdict

import pytest
import torch
from command_line import invoke, record_of, refused

from arsp.models.var import VAR, VARConfig
from arsp.sparse.profile import load_profile
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig
from arsp.zoo.bundle import save_bundle

SIDES = (1, 2, 3, 4, 6)
CONFIG = VARConfig(depth=2, embed_dim=32, num_heads=2, num_classes=3, vocab_size=13, code_dim=8, patch_nums=SIDES)
TOKENIZER = VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, vocab_size=13, patch_nums=SIDES)
FEW = ("--num", 3, "--batch-size", 2, "--cut", 0)


def plain(config):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def var_bundle(path, seed=0):
    torch.manual_seed(seed)
    model, tokenizer = VAR(CONFIG), VQVAE(TOKENIZER)
    model.init_weights(torch.Generator().manual_seed(seed), adaln_gamma=1.0)
    for block in model.blocks:  # sharp attention, so that windows have something to find
        block.attn.scale_mul_1H11.data.fill_(4.0)
    return save_bundle(
        path, family="var", kind="teacher", config=plain(CONFIG), model=model.state_dict(), tokenizer={"config": plain(TOKENIZER)},
        tokenizer_weights=tokenizer.state_dict(), classes=["ant", "bee", "cat"], sampling={"cfg": 1.5, "top_k": 0, "top_p": 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return var_bundle(tmp_path_factory.mktemp("models") / "a")


def sparsify(model, *words):
    return record_of(invoke("sparsify", "--model", model, *FEW, *words, "--json"))


def test_a_profile_is_calibrated_written_and_used(model, tmp_path, monkeypatch):
    monkeypatch.setattr("arsp.sparse.policy.skips_windows", lambda *tensors: True)  # also where nothing can be compiled
    record = sparsify(model, "--share", "map", "--tau", 0.6, "--out", tmp_path / "run")
    profile = load_profile(tmp_path / "run")
    assert (profile.depth, profile.heads, profile.patch_nums, profile.tau) == (2, 2, SIDES, 0.6)
    assert (profile.win[:, :, :3] == -1).all() and (profile.win[:, :, 3:, 3:] >= 0).any() and (profile.share == 1).all()
    assert profile.calibration["num"] == 3 and len(profile.calibration["share_error"]) == 2
    metrics = {metric["name"]: metric["value"] for metric in record["metrics"]}
    assert metrics["attention_kept"] == pytest.approx(profile.kept_total()) and metrics["attention_kept"] < 1
    assert [line["name"] for line in record["attention"]][:3] == [
        "attention, dense",
        "attention, windowed",
        "attention, windowed and shared",
    ]
    assert {artifact["kind"] for artifact in record["artifacts"]} == {"profile", "picture"} and not record["cost"]["simulated"]
    assert (tmp_path / "run" / "kept.png").read_bytes().startswith(b"\x89PNG")

    counted = record_of(invoke("bench", "cost", "--model", model, "--apply", f"litevar={tmp_path / 'run'}", "--json"))
    assert counted["counted"]["attention"] == record["attention"]
    sampled = record_of(invoke("sample", "--model", model, "--num", 2, "--json", f"stack.apply=[litevar={tmp_path / 'run'}]"))
    (report,) = sampled["cost"]["attention"]
    assert report["policy"] == "litevar" and report["executed_share"] == pytest.approx(1 - record["attention"][-1]["saved"])


def test_images_of_the_calibration_differ_by_seed_and_the_run_continues(model, tmp_path):
    first = sparsify(model, "--out", tmp_path / "a")
    assert sparsify(model, "--out", tmp_path / "a")["id"] == first["id"]
    other = sparsify(model, "--seed", 5, "--out", tmp_path / "b")
    assert other["config"]["seed"] == 5 and first["config"]["seed"] != 0
    errors = [load_profile(tmp_path / name).calibration["share_error"] for name in "ab"]
    assert errors[0] != errors[1]


def test_batches_add_up_to_the_same_profile(model, tmp_path):
    whole, parts = (load_profile(sparsify(model, "--batch-size", size)["run_dir"]) for size in (3, 1))
    assert (whole.win == parts.win).all()


@pytest.mark.parametrize("words", [("--windows", "1d"), ("--mask", "official-post")])
def test_what_is_only_masked_is_called_simulated(model, words):
    record = sparsify(model, "--tau", 0.6, *words)
    assert record["cost"]["simulated"] is True
    assert record["attention"][-1]["saved"] == 0 < record["attention"][1]["saved"]
    assert "simulated" in invoke("sparsify", "--model", model, *FEW, "--tau", 0.6, *words).stdout


def test_sharing_can_be_limited_by_the_error(model):
    profile = load_profile(sparsify(model, "--share", "output", "--max-share-error", 0)["run_dir"])
    assert (profile.share == 0).all()
    every = load_profile(sparsify(model, "--share", "output", "--max-share-error", 100)["run_dir"])
    assert (every.share == 2).all()


def test_a_profile_of_other_weights_is_refused_before_loading(model, tmp_path):
    sparsify(model, "--out", tmp_path / "run")
    other = var_bundle(tmp_path / "other", seed=1)
    use = f"litevar={tmp_path / 'run'}"
    refused(invoke("bench", "cost", "--model", other, "--apply", use), 4, "calibrated on", "arsp sparsify")
    refused(invoke("sample", "--model", other, f"stack.apply=[{use}]"), 4, "calibrated on", "arsp sparsify")


def test_official_files_are_told_apart_by_their_content(model, tmp_path):
    from safetensors.torch import load_file, save_file

    levels = torch.repeat_interleave(torch.arange(len(SIDES)), torch.tensor([side**2 for side in SIDES]))
    weights = {**load_file(model / "model.safetensors"), "lvl_1L": levels[None]}
    save_file(weights, tmp_path / "var.safetensors")
    save_file(load_file(model / "tokenizer.safetensors"), tmp_path / "vq.safetensors")
    files = ("--model", tmp_path / "var.safetensors", "--tokenizer", tmp_path / "vq.safetensors")
    record_of(invoke("sparsify", *files, *FEW, "--out", tmp_path / "run", "--json"))
    use = ("--apply", f"litevar={tmp_path / 'run'}")
    record_of(invoke("bench", "cost", "--model", tmp_path / "var.safetensors", *use, "--json"))
    weights["head.bias"] += 1
    save_file(weights, tmp_path / "var.safetensors")
    refused(invoke("bench", "cost", "--model", tmp_path / "var.safetensors", *use), 4, "calibrated on")


def test_a_profile_is_described_and_generates_nothing(model, tmp_path):
    sparsify(model, "--out", tmp_path / "run")
    facts = record_of(invoke("models", "info", tmp_path / "run", "--json"))
    assert facts["kind"] == "profile" and facts["parameters"] == 0 and facts["config"]["patch_nums"] == list(SIDES)
    refused(invoke("sample", "--model", tmp_path / "run"), 3, "profile", "generates nothing")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--model", "llamagen"), 3, "no next-scale teacher"),
        (("--tau", "0"), 3, "tau"),
        (("--windows", "3d"), 3, "windows"),
        (("--policy", "fastvar"), 3, "policy"),
        (("--share", "map", "--cfg", "0"), 2, "no halves"),
        (("--max-share-error", "0.1"), 2, "--share"),
        (("--model", "var-d16"), 4, "not on this machine"),
    ],
)
def test_bad_input_is_refused(model, words, code, message):
    refused(invoke("sparsify", "--model", model, *words), code, message)
