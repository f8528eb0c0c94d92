from dataclasses import replace

import pytest
import tiny_models
import tiny_var
import torch

from arsp import stack as stacks
from arsp.errors import ArspError, ConfigError, InputError
from arsp.stack import StackConfig
from arsp.zoo import bundle, convert, load


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Names of a teacher, a student of it, a student without teacher, and a tokenizer."""
    monkeypatch.setattr(stacks, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(load, "cache_root", lambda: tmp_path / "cache")
    teacher = tiny_models.teacher_bundle(tmp_path / "teacher")
    return {
        "teacher": str(teacher),
        "student": str(tiny_models.student_bundle(tmp_path / "student", teacher)),
        "orphan": str(tiny_models.student_bundle(tmp_path / "orphan")),
        "one-step": str(tiny_models.student_bundle(tmp_path / "one", known=(0,))),
        "tokenizer": str(tiny_models.tokenizer_bundle(tmp_path / "tokenizer")),
    }


IMPOSSIBLE = [
    ("tokenizer", {}, "tokenizer"),
    ("teacher", {"student_steps": 1}, "--student-steps"),
    ("teacher", {"split": 3}, "--split"),
    ("teacher", {"teacher_range": "1-4"}, "--teacher-range"),
    ("teacher", {"sampler": "at"}, "ar"),
    ("teacher", {"baseline": "nave"}, "naive"),
    ("teacher", {"baseline": "skip-16"}, "skip"),
    ("teacher", {"baseline": "skip-0"}, "skip"),
    ("teacher", {"baseline": "mode", "rng": "torch"}, "--rng"),
    ("teacher", {"tokenizer": "vq.pt"}, "--tokenizer"),
    ("student", {"baseline": "mode"}, "--baseline"),
    ("student", {"sampler": "other"}, "--sampler"),
    ("student", {"rng": "torch"}, "--rng"),
    ("student", {"cfg": 2.0}, "--cfg"),
    ("student", {"temperature": 0.5, "top_k": 3}, "--temperature, --top-k"),
    ("student", {"cfg_interval": 3}, "--cfg-interval"),
    ("student", {"split": 17}, "split"),
    ("student", {"teacher_range": "4-4"}, "teacher range"),
    ("student", {"teacher_range": "1-17"}, "teacher range"),
    ("student", {"teacher_range": "few"}, "teacher range"),
    ("orphan", {"teacher_range": "1-4"}, "teacher"),
    ("one-step", {"student_steps": 2}, "student steps"),
]


@pytest.mark.parametrize(("model", "options", "words"), IMPOSSIBLE)
def test_impossible_stacks_are_refused_before_any_weight_is_read(models, monkeypatch, model, options, words):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(ConfigError) as caught:
        stacks.build(StackConfig(model=models[model], **options))
    assert words in caught.value.message + (caught.value.hint or "")


@pytest.mark.parametrize(
    "options",
    [{"cfg": -1}, {"top_p": 1.5}, {"temperature": -0.1}, {"top_k": -2}, {"student_steps": 3}, {"rng": "numpy"}, {"image_size": 0}],
)
def test_values_outside_their_range_are_config_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        StackConfig(**options)


@pytest.mark.parametrize(("name", "words"), [("lamagen", "llamagen"), ("llamagen-xl-38", "llamagen-xl-384")])
def test_an_unknown_model_gets_the_nearest_names(name, words):
    with pytest.raises(ConfigError) as caught:
        stacks.check(StackConfig(model=name))
    assert words in caught.value.hint.partition("?")[0]


def test_a_path_that_is_not_there_is_an_input_error():
    with pytest.raises(InputError, match="no such file"):
        stacks.check(StackConfig(model="runs/none"))


def test_an_official_model_without_its_files_says_where_they_belong(models):
    with pytest.raises(InputError) as caught:
        stacks.build(StackConfig(model="llamagen-b-256"))
    assert "c2i_B_256.pt" in caught.value.hint and "checkpoints" in caught.value.hint


def test_an_official_student_without_tokenizer_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    torch.save({"ema": tiny_models.student_model().state_dict()}, tmp_path / "llamagen-B.pt")
    monkeypatch.setattr(load, "_weights", lambda source: pytest.fail("weights were read"))
    with pytest.raises(InputError) as caught:
        stacks.build(StackConfig(model=str(tmp_path / "llamagen-B.pt")))
    assert "--tokenizer" in caught.value.hint


def test_a_student_whose_tokenizer_has_other_codes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    torch.save({"ema": tiny_models.student_model(code_dim=8).state_dict()}, tmp_path / "llamagen-B.pt")
    torch.save({"model": tiny_models.vq_model().state_dict()}, tmp_path / "vq.pt")
    with pytest.raises(ArspError, match="8-vectors"):
        stacks.build(StackConfig(model=str(tmp_path / "llamagen-B.pt"), tokenizer=str(tmp_path / "vq.pt")))


POSSIBLE = [
    ("teacher", {}, 16),
    ("teacher", {"top_k": 3, "cfg": 3.0, "cfg_interval": 4}, 16),
    ("teacher", {"temperature": 0.0}, 16),
    ("teacher", {"top_p": 0.0}, 16),
    ("teacher", {"top_h": 0.4}, 16),
    ("teacher", {"baseline": "skip-4"}, 12),
    ("teacher", {"image_size": 12}, 16),
    ("student", {}, 1),
    ("student", {"student_steps": 2}, 2),
    ("student", {"student_steps": 2, "split": 5}, 2),
    ("student", {"split": 0}, 1),
    ("student", {"teacher_range": "1-5"}, 5),
    ("student", {"teacher_range": "3-6", "cfg": 2.0}, 5),
    ("student", {"teacher_range": "3-6", "split": 9}, 5),
]


@pytest.mark.parametrize(("model", "options", "passes"), POSSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_possible_stack_makes_the_same_images_in_any_batch(models, model, options, passes, dtype):
    stack = stacks.build(StackConfig(model=models[model], **options), dtype=dtype)
    labels = stacks.labels_for(stack, 7, 5, None)
    whole = [stack.generator.generate(stack.request(ids, 5, labels[ids])) for ids in torch.arange(7).split(7)][0]
    parts = [stack.generator.generate(stack.request(ids, 5, labels[ids])) for ids in torch.arange(7).split(2)]
    assert whole.stats["passes"] == passes
    if dtype == torch.float32:
        differ = (whole.codes_BL != torch.cat([p.codes_BL for p in parts])).sum()
        assert differ == 0, f"{differ} of {whole.codes_BL.numel()} codes depend on the batch size"
        a, b = stack.decode(whole), torch.cat([stack.decode(p) for p in parts])
        gap = (a.int() - b.int()).abs().max()
        assert gap <= 1, f"pixels differ by {gap} levels"
    images = stack.images(stack.request(torch.arange(7), 5, labels))
    side = options.get("image_size", 8)
    assert images.dtype == torch.uint8 and images.shape == (7, 3, side, side)
    assert stack.describe()["kind"] == model and stack.cost()["images_per_s"] > 0


@pytest.mark.parametrize("baseline", ["mode", "naive"])
def test_controls_count_the_teacher_once_and_reuse_the_table(models, baseline, monkeypatch):
    said = []
    make = lambda: stacks.build(StackConfig(model=models["teacher"], baseline=baseline), log=said.append)
    first = make()
    ids = torch.arange(6)
    labels = stacks.labels_for(first, 6, 0, [0, 1, 2])
    codes = first.generator.generate(first.request(ids, 0, labels)).codes_BL
    again = make()
    assert torch.equal(again.generator.generate(again.request(ids, 0, labels)).codes_BL, codes)
    assert len(said) == 1 and "counting" in said[0], said
    assert torch.equal(codes[0], codes[3]) == (baseline == "mode")


def test_a_damaged_table_of_frequencies_says_what_to_delete(models, tmp_path):
    stacks.build(StackConfig(model=models["teacher"], baseline="mode"))
    (table,) = (tmp_path / "cache" / "frequencies").iterdir()
    table.write_bytes(b"nothing")
    with pytest.raises(InputError, match=table.name) as caught:
        stacks.build(StackConfig(model=models["teacher"], baseline="mode"))
    assert "Delete" in caught.value.hint


def test_labels_are_keyed_or_the_given_ones_in_turn(models):
    stack = stacks.build(StackConfig(model=models["teacher"]))
    assert stacks.labels_for(stack, 5, 0, [2, 1]).tolist() == [2, 1, 2, 1, 2]
    assert torch.equal(stacks.labels_for(stack, 5, 3, None), stacks.labels_for(stack, 9, 3, None)[:5])


def test_random_weights_need_no_file():
    stack = stacks.build(StackConfig(model="llamagen-b-256", random_weights=True))
    assert stack.model.sha256 is None and sum(p.numel() for p in stack.model.module.parameters()) == 110_888_448


def test_sample_images_is_the_whole_pipeline_in_one_call(models):
    images, labels, block, cost = stacks.sample_images(models["student"], 5, 1, batch_size=2, student_steps=2)
    assert images.shape == (5, 3, 8, 8) and len(labels) == 5 and block["name"].endswith("2-step") and cost["passes"] == 2


# -- next-scale models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scales(models, tmp_path):
    """The models above with VAR counterparts: two of one tokenizer, one of another, a student, a profile of the big one."""
    big = tiny_var.teacher_bundle(tmp_path / "big")
    small = tiny_var.teacher_bundle(tmp_path / "small", replace(tiny_var.CONFIG, depth=1, embed_dim=8), seed=5)
    profiles = {
        f"{name}-profile": str(tiny_var.profile_bundle(tmp_path / f"{name}-profile", load.resolve(str(path)), 1))
        for name, path in {"big": big, "small": small}.items()
    }
    return models | profiles | {
        "big": str(big),
        "small": str(small),
        "foreign": str(tiny_var.teacher_bundle(tmp_path / "foreign", tokenizer_seed=9)),
        "var-student": str(tiny_var.student_bundle(tmp_path / "var-student")),
    }  # fmt: skip


def recipe(models, tmp_path, options):
    """Options with NAME in braces replaced by the path of that model; ``schedule`` holds the rows."""
    filled = {key: value.format(**models) if isinstance(value, str) else value for key, value in options.items()}
    if "schedule" in filled:
        (tmp_path / "schedule.yaml").write_text(filled["schedule"])
        filled["schedule"] = str(tmp_path / "schedule.yaml")
    return filled


IMPOSSIBLE_SCALES = [
    ("big", {"collab": "{big}:{foreign}@1"}, "different tokenizers", 3),
    ("big", {"collab": "{big}:{var-student}@1"}, "var student", 3),
    ("big", {"collab": "{big}:{teacher}@1"}, "llamagen teacher", 3),
    ("big", {"collab": "{big}:{small}@0"}, "1 <= N <= 2", 3),
    ("big", {"collab": "{big}:{small}@3"}, "1 <= N <= 2", 3),
    ("big", {"collab": "{big}"}, "BIG:SMALL@N", 3),
    ("big", {"collab": "{small}:{big}@1"}, "the big model is not --model", 3),
    ("big", {"collab": "{big}:lamagen@1"}, "unknown model", 3),
    ("big", {"collab": "{big}:runs/none@1"}, "no such file", 4),
    ("big", {"collab": "{big}:{small}@1", "schedule": "- {{scales: 0}}"}, "both choose models", 3),
    ("big", {"schedule": "- {{scales: 0-1, cfg: off}}\n- {{scales: 2}}"}, "null half cannot come back", 3),
    ("big", {"schedule": "- {{scales: 0-1, cfg: shared}}"}, "were not stored", 3),
    ("big", {"schedule": "- {{scales: 0-1, depth: 1}}"}, "deeper than scale 1", 3),
    ("big", {"schedule": "- {{scales: 1-2, depth: 3}}"}, "has 2", 3),
    ("big", {"schedule": "- {{scales: 1, model: {small}}}"}, "a model comes back", 3),
    ("big", {"schedule": "- {{scales: 2, model: {foreign}}}"}, "different tokenizers", 3),
    ("big", {"schedule": "- {{scales: 0-2, depth: 1, attention: litevar={big-profile}}}"}, "both a depth and litevar", 3),
    ("big", {"schedule": "- {{scales: 3}}"}, "within 0-2", 3),
    ("big", {"schedule": "scales: 3"}, "expected a list", 4),
    ("big", {"apply": "fastvar=x"}, "litevar=PROFILE", 3),
    ("big", {"apply": "litevar"}, "no packaged profile", 3),
    ("big", {"apply": "litevar=runs/none"}, "runs/none", 4),
    ("big", {"apply": "litevar={small-profile}"}, "layers", 4),
    ("big", {"apply": ["litevar=a", "litevar=b"]}, "--apply litevar=b", 3),
    ("big", {"share": "map", "cfg": 0.0}, "no halves to share", 3),
    ("big", {"share": "map", "schedule": "- {{scales: 0-2, cfg: off}}"}, "--share map", 3),
    ("big", {"cfg_interval": 1}, "--cfg-interval", 3),
    ("big", {"more_smooth": True, "rng": "torch"}, "--more-smooth", 3),
    ("big", {"more_smooth": True, "baseline": "skip-1"}, "--more-smooth", 3),
    ("big", {"baseline": "skip-3"}, "0 < N < 3", 3),
    ("big", {"baseline": "mode", "share": "map"}, "Drop --share", 3),
    ("big", {"student_steps": 1}, "var-dd1", 3),
    *((model, options, "needs a next-scale teacher", 3)
      for model in ("teacher", "student", "var-student")
      for options in ({"share": "map"}, {"more_smooth": True}, {"apply": "litevar"}, {"collab": "{big}:{small}@1"}, {"schedule": ""})),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "words", "code"), IMPOSSIBLE_SCALES)
def test_impossible_schedules_are_refused_before_any_weight_is_read(scales, tmp_path, monkeypatch, model, options, words, code):
    real = bundle.load_weights
    reads = lambda path, name, manifest: real(path, name, manifest) if name == "profile.safetensors" else pytest.fail(f"{name} was read")
    monkeypatch.setattr(bundle, "load_weights", reads)
    with pytest.raises(ArspError) as caught:
        stacks.build(StackConfig(**{"model": scales[model], **recipe(scales, tmp_path, options)}))
    assert words in caught.value.message + (caught.value.hint or "") and caught.value.exit_code == code


def test_a_profile_of_other_weights_of_the_same_sizes_is_refused(scales, tmp_path):
    other = tiny_var.teacher_bundle(tmp_path / "other", seed=8)
    with pytest.raises(InputError, match="calibrated on .*big with weights"):
        stacks.check(StackConfig(model=str(other), apply=f"litevar={scales['big-profile']}"))


def test_two_files_of_one_name_are_two_models(tmp_path):
    levels = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 16]))
    for folder, seed in (("x", 1), ("y", 2)):
        (tmp_path / folder).mkdir()
        bundle.save_file({**tiny_var.var_model(seed=seed).state_dict(), "lvl_1L": levels[None]}, tmp_path / folder / "var.safetensors")
    x, y = (str(tmp_path / folder / "var.safetensors") for folder in "xy")
    with pytest.raises(ConfigError, match="the big model is not --model"):
        stacks.check(StackConfig(model=x, collab=f"{y}:{x}@1"))
    assert stacks.check(StackConfig(collab=f"{x}:{y}@1")).path == tmp_path / "x" / "var.safetensors"


def test_collab_alone_names_the_model(scales):
    config = StackConfig(collab=f"{scales['big']}:{scales['small']}@2")
    assert config.model == scales["big"] and [row.model for row in stacks.schedule_rows(config, stacks.check(config))] == [
        "", "", scales["small"],
    ]  # fmt: skip


POSSIBLE_SCALES = [
    ({}, 3),
    ({"cfg": 0.0}, 3),
    ({"temperature": 0.0, "top_k": 3}, 3),
    ({"baseline": "skip-1"}, 2),
    ({"collab": "{big}:{small}@1"}, None),
    ({"collab": "{big}:{small}@2", "apply": "litevar={big-profile}", "share": "map"}, None),
    ({"apply": "litevar={big-profile}"}, 3),
    ({"share": "map"}, 3),
    ({"more_smooth": True}, 3),
    ({"schedule": "- {{scales: 1-2, depth: 1, cfg: shared}}"}, 3),
    ({"schedule": "- {{scales: 1, cfg: off}}\n- {{scales: 2, model: {small}, cfg: off, attention: litevar={small-profile}}}"}, None),
    ({"baseline": "skip-1", "schedule": "- {{scales: 2, cfg: off}}", "image_size": 12}, 2),
]


@pytest.mark.parametrize(("options", "passes"), POSSIBLE_SCALES)
def test_every_possible_schedule_makes_the_same_images_in_any_batch(scales, tmp_path, one_thread, options, passes):
    stack = stacks.build(StackConfig(**{"model": scales["big"], **recipe(scales, tmp_path, options)}))
    labels = stacks.labels_for(stack, 5, 5, None)
    make = lambda size: [stack.generator.generate(stack.request(ids, 5, labels[ids])) for ids in torch.arange(5).split(size)]
    (whole,), parts = make(5), make(2)
    assert passes in (None, whole.stats["passes"])
    differ = (whole.codes_BL != torch.cat([part.codes_BL for part in parts])).sum()
    assert differ == 0, f"{differ} of {whole.codes_BL.numel()} codes depend on the batch size"
    gap = (stack.decode(whole).int() - torch.cat([stack.decode(part) for part in parts]).int()).abs().max()
    assert gap <= 1, f"pixels differ by {gap} levels"
    images = stack.images(stack.request(torch.arange(5), 5, labels))
    side = options.get("image_size", 8)
    assert images.dtype == torch.uint8 and images.shape == (5, 3, side, side)
    assert ("schedule" in stack.describe()) == bool(options.keys() & {"collab", "schedule", "apply", "share", "more_smooth"})


def test_the_drafter_as_refiner_is_plain_sampling(scales, one_thread):
    plain = stacks.build(StackConfig(model=scales["big"]))
    labels = stacks.labels_for(plain, 6, 0, None)
    expected = plain.generator.generate(plain.request(torch.arange(6), 0, labels))
    for count in (1, 2):
        both = stacks.build(StackConfig(collab=f"{scales['big']}:{scales['big']}@{count}"))
        found = both.generator.generate(both.request(torch.arange(6), 0, labels))
        assert torch.equal(found.codes_BL, expected.codes_BL), f"other codes with a hand-over at scale {count}"
        assert found.stats["kv_bytes"] <= expected.stats["kv_bytes"]


def test_smoothed_pictures_are_called_so(scales):
    stack = stacks.build(StackConfig(model=scales["big"], more_smooth=True))
    assert stack.describe()["sampler"] == "more-smooth" and stack.name.endswith("more-smooth")


def test_weights_of_every_model_of_a_schedule_count(scales):
    alone, both = (
        stacks.build(config) for config in (StackConfig(model=scales["big"]), StackConfig(collab=f"{scales['big']}:{scales['small']}@1"))
    )
    small = sum(parameter.numel() for parameter in load.load_model(scales["small"]).module.parameters())
    assert both.cost()["weight_bytes"] == alone.cost()["weight_bytes"] + 4 * small


# -- the tokenizer's decoder -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["teacher", "big"])
def of_each_family(request, models, scales):
    """A tiny teacher of LlamaGen, then one of VAR."""
    return {**models, **scales}[request.param]


def decoded(name, **options):
    stack = stacks.build(StackConfig(model=name, **options))
    labels = stacks.labels_for(stack, 5, 0, None)
    return stack, stack.images(stack.request(torch.arange(5), 0, labels)).int()


def test_default_images_are_those_of_the_tokenizer_within_one_level(of_each_family, one_thread):
    stack, images = decoded(of_each_family)
    codes = stack.generator.generate(stack.request(torch.arange(5), 0, stacks.labels_for(stack, 5, 0, None))).codes_BL
    with torch.inference_mode():
        plain = stacks.to_uint8(load.load_model(of_each_family).tokenizer.decode_codes(codes)).int()
    assert (images - plain).abs().max() <= 1
    assert "decoder" not in stack.describe() and "decoder" not in stack.name


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"decoder_dtype": "bfloat16"}, 6),
        ({"decoder_dtype": "float16"}, 3),
        ({"decoder_chunk": 2}, 1),
        ({"decoder_channels_last": False}, 1),
        ({"decoder_channels_last": True, "decoder_chunk": 3}, 1),
    ],
)
def test_another_decoder_makes_the_same_pictures_and_the_record_names_it(of_each_family, one_thread, options, levels):
    _, plain = decoded(of_each_family)
    stack, images = decoded(of_each_family, **options)
    assert (images - plain).abs().max() <= levels, f"pixels differ by {(images - plain).abs().max()} levels"
    assert stack.describe()["decoder"] == {name.removeprefix("decoder_"): value for name, value in options.items()}
    assert (f" + {options.get('decoder_dtype')} decoder" in stack.name) == ("decoder_dtype" in options)
    assert all(parameter.dtype == torch.float32 for parameter in stack.model.tokenizer.parameters()), "f_hat needs the tokenizer as it was"


def test_a_16_bit_decoder_is_seen_in_the_pixels(of_each_family, one_thread):
    assert (decoded(of_each_family)[1] != decoded(of_each_family, decoder_dtype="bfloat16")[1]).any()


@pytest.mark.parametrize("wrong", [{"decoder_dtype": "int8"}, {"decoder_chunk": 0}, {"decoder_compile": "maybe"}])
def test_impossible_decoders_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        StackConfig(**wrong)


def test_a_decoder_needs_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    torch.save({"model": tiny_models.gpt_model().state_dict()}, tmp_path / "c2i_256.pt")
    plain = stacks.build(StackConfig(model=str(tmp_path / "c2i_256.pt")))
    assert plain.decoder is None, "codes alone can be made"
    with pytest.raises(InputError, match="no tokenizer to decode"):
        stacks.build(StackConfig(model=str(tmp_path / "c2i_256.pt"), decoder_dtype="bfloat16"))


def test_an_unknown_sampler_is_told_the_modes_too():
    with pytest.raises(ConfigError) as caught:
        stacks.check(StackConfig(sampler="mcc"))
    assert "mcc" in caught.value.message and "mc" in caught.value.hint and "seeded" in caught.value.hint
