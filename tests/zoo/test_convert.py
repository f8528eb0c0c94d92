import argparse
import math
import os
import pickle
from dataclasses import asdict, replace

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from arsp.errors import InputError
from arsp.models.llamagen import GPT, VARIANTS, GPTConfig
from arsp.models.student import LlamaGenStudent
from arsp.tokenizers.llamagen_vq import VARIANTS as VQ_VARIANTS
from arsp.tokenizers.llamagen_vq import VQModel
from arsp.zoo import convert
from arsp.zoo.load import load_model, load_tokenizer, resolve

C2I = tiny_models.GPT_CONFIG
T2I = replace(C2I, model_type="t2i", cls_token_num=5, caption_dim=24)

# llamagen.md 2.2: parameters of the named sizes at 16384 codes; c2i with 1000 classes, t2i without its constant buffer
PARAMETERS = {
    "GPT-B": (110_888_448, 112_282_368), "GPT-L": (342_910_976, 345_031_680), "GPT-XL": (774_699_520, 777_678_080),
    "GPT-XXL": (1_410_972_672, 1_414_940_160), "GPT-XXXL": (3_893_027_840, 3_902_261_760), "GPT-1B": (1_199_616_000, 1_205_954_560),
    "GPT-3B": (3_096_659_200, 3_110_249_600), "GPT-7B": (6_614_589_440, 6_635_655_168),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_size_is_a_named_one(monkeypatch):
    monkeypatch.setitem(convert._HEADS, (C2I.n_layer, C2I.dim), C2I.n_head)


def same(found, expected):
    assert found.keys() == expected.keys(), f"keys differ: {found.keys() ^ expected.keys()}"
    unequal = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not unequal, f"other values in {unequal}"


def meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_named_sizes_have_the_published_number_of_parameters_and_are_told_by_shapes(name, kind, tmp_path):
    more = {"model_type": "t2i", "cls_token_num": 120} if kind == "t2i" else {}
    model = meta(lambda: GPT(GPTConfig(**VARIANTS[name], **more)))
    expected, found = PARAMETERS[name][kind == "t2i"], sum(p.numel() for p in model.parameters())
    assert found == expected, f"{name} {kind}: {found:,} parameters, published {expected:,}"
    config = convert.gpt_config(model.state_dict(), tmp_path / f"{name}_384.pt")
    full = GPTConfig.from_dict(config)
    assert full == replace(model.config, block_size=576), f"{name} {kind}: {config}"


@pytest.mark.parametrize("name", VQ_VARIANTS)
def test_tokenizer_sizes_are_told_by_shapes(name, tmp_path):
    expected = VQ_VARIANTS[name]
    found = convert.vq_config(meta(lambda: VQModel(expected)).state_dict(), tmp_path)
    assert found == {k: list(v) if k == "ch_mult" else v for k, v in asdict(expected).items() if k != "image_size"}


@pytest.mark.parametrize(("name", "layers", "dim", "keys", "millions"), [("GPT-B", 12, 768, 93, 98.32), ("GPT-L", 24, 1024, 177, 326.16)])
def test_released_students_have_the_published_keys_and_parameters(name, layers, dim, keys, millions, tmp_path):
    student = meta(lambda: LlamaGenStudent(GPTConfig(**VARIANTS[name]), 8))
    weights = student.state_dict()
    assert len(weights) == keys, f"{len(weights)} keys, published {keys}"
    found = sum(p.numel() for p in student.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.01), f"{found:.2f} M parameters, published {millions} M"
    config = convert.gpt_config(weights, tmp_path / "llamagen-B.pt")
    assert (config["n_layer"], config["dim"], config["code_dim"], config["block_size"]) == (layers, dim, 8, 256)


WRAPPINGS = {
    "ddp": lambda w: {"model": w, "optimizer": {"state": {}}, "steps": 5, "args": argparse.Namespace(gpt_model="GPT-B", lr=1e-4)},
    "deepspeed": lambda w: {"module": w},
    "state_dict": lambda w: {"state_dict": w},
    "ema": lambda w: {"ema": w, "args": argparse.Namespace()},
    "fsdp": lambda w: w,
    "ddp-prefix": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "compiled": lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}},
    "compiled-ddp": lambda w: {"model": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
    "ddp-compiled": lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    "stray-rope": lambda w: {"model": {**w, "freqs_cis": torch.zeros(17, 2, 2)}},
    "cache": lambda w: {
        "model": {**w, "layers.0.attention.kv_cache.k_cache": torch.zeros(1, 2, 17, 8), "module.freqs_cis": torch.zeros(3)}
    },
}


@pytest.mark.parametrize("config", [C2I, T2I], ids=["c2i", "t2i"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_official_wrapping_gives_the_same_weights(wrapping, config, tmp_path):
    weights = tiny_models.gpt_model(config).state_dict()
    path = tmp_path / "c2i_tiny_256.pt"
    torch.save(WRAPPINGS[wrapping](weights), path)
    found, sizes = convert.read_llamagen(path)
    same(found, weights)
    GPT(GPTConfig.from_dict(sizes)).load_state_dict(found, strict=True)
    assert sizes["model_type"] == config.model_type and sizes["block_size"] == 256


def test_the_trained_weights_of_a_teacher_are_preferred_to_its_average(tmp_path):
    raw, average = tiny_models.gpt_model(seed=1).state_dict(), tiny_models.gpt_model(seed=2).state_dict()
    torch.save({"ema": average, "model": raw}, tmp_path / "x256.pt")
    same(convert.read_llamagen(tmp_path / "x256.pt")[0], raw)


def test_the_average_of_a_student_is_preferred_as_its_authors_sample_it(tmp_path):
    raw, average = tiny_models.student_model(seed=1).state_dict(), tiny_models.student_model(seed=2).state_dict()
    torch.save({"model": raw, "ema": {**average, "freqs_cis": torch.zeros(2)}}, tmp_path / "llamagen-B.pt")
    found, sizes = convert.read_llamagen(tmp_path / "llamagen-B.pt")
    same(found, average)
    assert sizes["code_dim"] == 4 and sizes["student"]


@pytest.mark.parametrize(("name", "tokens"), [("c2i_B_256.pt", 256), ("c2i_XL_384.pt", 576), ("t2i_XL_stage2_512.pt", 1024)])
def test_the_grid_comes_from_the_file_name(name, tokens, tmp_path):
    assert convert.gpt_config(tiny_models.gpt_model().state_dict(), tmp_path / name)["block_size"] == tokens


def test_a_file_name_without_resolution_is_refused_with_the_way_out(tmp_path):
    torch.save({"model": tiny_models.gpt_model().state_dict()}, tmp_path / "mine.pt")
    with pytest.raises(InputError, match="256, 384 or 512") as caught:
        resolve(str(tmp_path / "mine.pt"))
    assert "Rename" in caught.value.hint


def test_safetensors_are_read_like_pickles(tmp_path):
    weights = tiny_models.gpt_model().state_dict()
    save_file(weights, tmp_path / "c2i_256.safetensors")
    same(convert.read_llamagen(tmp_path / "c2i_256.safetensors")[0], weights)


def test_a_tokenizer_file_prefers_its_average_and_gets_its_usage_queue(tmp_path):
    raw, average = tiny_models.vq_model(seed=1).state_dict(), tiny_models.vq_model(seed=2).state_dict()
    average.pop("quantize.codebook_used")
    torch.save({"model": raw, "ema": average, "discriminator": {}, "optimizer": {}}, tmp_path / "vq.pt")
    found, sizes = convert.read_llamagen_vq(tmp_path / "vq.pt")
    queue = found.pop("quantize.codebook_used")
    same(found, average)
    assert queue.shape == (65536,) and not queue.any()
    assert sizes["codebook_size"] == 16 and sizes["ch_mult"] == [1, 1]


class Surprise:
    def __reduce__(self):
        return os.system, ("touch surprise",)


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny_models.gpt_model().state_dict(), "args": Surprise()}, tmp_path / "c2i_256.pt")
    (tmp_path / "bare_256.pt").write_bytes(pickle.dumps(Surprise()))
    for name in ("c2i_256.pt", "bare_256.pt"):
        with pytest.raises(InputError) as caught:
            convert.read_llamagen(tmp_path / name)
        assert name in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "surprise").exists()


def broken(tmp_path):
    good = {"model": tiny_models.gpt_model().state_dict()}
    torch.save(good, tmp_path / "good_256.pt")
    content = (tmp_path / "good_256.pt").read_bytes()
    (tmp_path / "truncated_256.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text_256.pt").write_text("<html>Not Found</html>")
    (tmp_path / "empty_256.pt").write_bytes(b"")
    (tmp_path / "bad_256.safetensors").write_bytes(b"\xff" * 100)
    torch.save(torch.zeros(3), tmp_path / "tensor_256.pt")
    torch.save([1, 2], tmp_path / "list_256.pt")
    torch.save({"model": {"conv1.weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "resnet_256.pt")
    # a language model with the same embedding name, width and depth as a named size
    torch.save(
        {"tok_embeddings.weight": torch.zeros(8, 16), "layers.0.attention.wq.weight": torch.zeros(16, 16)}, tmp_path / "llama_256.pt"
    )
    torch.save({"model": {**good["model"], "tok_embeddings.weight": torch.zeros(16)}}, tmp_path / "flat_256.pt")
    deep = {k.replace("layers.0", "layers.3"): v for k, v in good["model"].items() if k.startswith("layers.0")}
    torch.save({"model": {**good["model"], **deep}}, tmp_path / "deep_256.pt")
    return [p for p in sorted(tmp_path.glob("*_256.*")) if not p.name.startswith("good")]


def test_corrupt_and_foreign_files_end_in_one_message_that_names_them(tmp_path):
    for path in broken(tmp_path):
        with pytest.raises(InputError) as caught:
            resolve(str(path))
        assert path.name in caught.value.message, f"{path.name}: {caught.value.message}"
        assert "\n" not in caught.value.message and len(caught.value.message) < 600, caught.value.message
        with pytest.raises(InputError, match=path.name):
            convert.read_llamagen_vq(path)


def test_a_file_with_a_missing_or_foreign_key_is_refused_when_loaded(tmp_path):
    weights = tiny_models.gpt_model().state_dict()
    del weights["norm.weight"]
    torch.save({"model": {**weights, "lora.weight": torch.zeros(2)}}, tmp_path / "c2i_256.pt")
    with pytest.raises(InputError, match=r"missing 1 \(norm.weight\); unexpected 1 \(lora.weight\)"):
        load_model(str(tmp_path / "c2i_256.pt"))


def official_pair(folder, student=False):
    """A GPT or student file of 256 codes and a VQ-16-shaped tokenizer file, 16 codes wide."""
    vq = tiny_models.vq_model(replace(tiny_models.VQ, ch_mult=(1, 1, 1, 1, 1)))
    model = tiny_models.student_model() if student else tiny_models.gpt_model()
    torch.save({"ema" if student else "model": model.state_dict()}, folder / ("llamagen-B.pt" if student else "c2i_B_256.pt"))
    torch.save({"model": vq.state_dict()}, folder / "vq_ds16.pt")
    return folder / ("llamagen-B.pt" if student else "c2i_B_256.pt"), folder / "vq_ds16.pt"


def test_official_teacher_and_tokenizer_files_make_a_model(tmp_path):
    model, vq = official_pair(tmp_path)
    loaded = load_model(str(model), tokenizer=str(vq))
    assert (loaded.source.kind, loaded.source.origin, loaded.source.layout.num_tokens) == ("teacher", "file", 256)
    assert loaded.tokenizer.config.image_size == 256 and loaded.codebook_VE.shape == (16, 4)
    assert loaded.source.card["sampling"]["cfg"] == 2.0


def test_official_student_file_makes_a_student_of_one_or_two_steps(tmp_path):
    model, vq = official_pair(tmp_path, student=True)
    loaded = load_model(str(model), tokenizer=str(vq))
    assert isinstance(loaded.module, LlamaGenStudent)
    assert (loaded.source.kind, loaded.source.card["code_dim"], loaded.source.card["known"]) == ("student", 4, [0, 80])
    assert not loaded.source.capabilities.teacher and math.isfinite(loaded.weight_bytes())


def test_an_official_file_does_not_serve_as_tokenizer_by_itself(tmp_path):
    model, _ = official_pair(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(str(model))
