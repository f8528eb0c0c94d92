"""``arsp quantize`` as a user meets it: bundles that every other command takes as models and teachers."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_models
import tiny_quant
from command_line import invoke, record_of

from arsp import kernels
from arsp.quant import sensitivity
from arsp.runs import sha256_file
from arsp.zoo import bundle
from arsp.zoo.load import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("calibration.num=4", "calibration.check=4", "calibration.batch_size=2")
EXAMPLES = Path(__file__).parents[2] / "examples"


def quantize(model, *words):
    return invoke("quantize", "--model", model, *words, *FEW)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models by kind, and each of them quantised (``q-KIND``)."""
    folder = tmp_path_factory.mktemp("models")
    for kind in tiny_quant.KINDS:
        tiny_quant.make(kind, folder / kind)
        record_of(quantize(folder / kind, "--out", folder / f"q-{kind}", "--json"))
    record_of(quantize(folder / "var", "--recipe", "litevar", "--out", folder / "q-litevar", "--json"))
    return folder


# -- the command --------------------------------------------------------------------------------------------------------------


def test_the_record_says_what_was_made_of_what(place, tmp_path):
    record = record_of(quantize(place / "var", "--recipe", "w4a8-gptq", "--group", 32, "--out", tmp_path / "q", "--json"))
    assert record["command"] == "quantize" and record["status"] == "ok"
    assert record["stack"] == {"name": "var-w4a8-gptq", "model": str(place / "var"), "kind": "teacher"}
    assert record["config"]["weights"]["rounding"] == "gptq" and record["config"]["weights"]["group_size"] == 32
    metrics = {metric["name"]: metric for metric in record["metrics"]}
    assert metrics.keys() == {"top1_agreement", "kl", "sqnr_db", "compression"}
    assert metrics["kl"]["n"] == 4 * 21 and metrics["kl"]["protocol"] == "4 own samples, teacher-forced" and not metrics["kl"]["comparable"]
    sizes = [sum(line[key] for line in record["layers"]) for key in ("fp16_bytes", "bytes")]
    assert metrics["compression"]["value"] == pytest.approx(sizes[0] / sizes[1]) and record["cost"]["quantised_bytes"] == sizes[1]
    assert record["cost"]["simulated"] is False
    assert record["layers"][0].keys() == {"layer", "format", "bytes", "fp16_bytes", "sqnr_db"}
    assert {artifact["kind"] for artifact in record["artifacts"]} == {"bundle"} and record["parents"] == [f"{place / 'var'}@bundle"]
    assert (tmp_path / "q" / "bundle" / "arsp.json").is_file()


def test_the_table_tells_formats_agreement_and_where_the_bundle_lies(place, tmp_path):
    result = quantize(place / "llamagen", "--recipe", "w8a8", "--out", tmp_path / "q")
    assert result.exit_code == 0
    for text in (
        "llamagen-w8a8 (packed integers)",
        "layers.attention.wqkv",
        "W8A8 rotated",
        "same most likely code",
        f"{tmp_path / 'q'}/bundle",
    ):
        assert text in result.stdout.replace("\n", ""), text
    simulated = invoke("quantize", "--model", place / "var", "--recipe", "litevar", *FEW, "--out", tmp_path / "s")
    assert "simulated: rounded in floating point" in simulated.stdout and "packed" not in simulated.stdout.partition("Beside")[0]


def test_the_same_command_finds_what_it_made(place, tmp_path):
    words = (place / "llamagen", "--recipe", "w4a8-awq", "--out", tmp_path / "q", "--json")
    first = record_of(quantize(*words))
    digest = sha256_file(tmp_path / "q" / "bundle" / "model.safetensors")
    assert record_of(quantize(*words)) == first
    again = record_of(quantize(*words, "--no-resume"))
    assert again["id"] != first["id"] and sha256_file(tmp_path / "q" / "bundle" / "model.safetensors") == digest


def test_a_stopped_search_is_continued(place, tmp_path, monkeypatch):
    """Layers that were measured before the stop are not measured again."""
    words = (place / "llamagen", "--budget", "0.4x", "layers.only=[layers.0.*]", "--out", tmp_path / "q", "--json")
    real, measured = sensitivity.quantise_layers, []

    def stop(module, formats, *more):
        measured.append(*formats)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return real(module, formats, *more)

    monkeypatch.setattr(sensitivity, "quantise_layers", stop)
    assert quantize(*words).exit_code == 130
    run = tmp_path / "q"
    kept = json.loads((run / "sensitivity.json").read_text())
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted" and not (run / "bundle").exists()
    assert 1 <= len(kept) < 5 and not kept.keys() & {measured[-1]}
    again = []
    monkeypatch.setattr(
        sensitivity, "quantise_layers", lambda module, formats, *more: (again.append(*formats), real(module, formats, *more))[1]
    )
    record = record_of(quantize(*words))
    assert record["status"] == "ok" and not set(again) & kept.keys() and set(again) | kept.keys() == {x["layer"] for x in record["layers"]}
    assert {artifact["kind"] for artifact in record["artifacts"]} == {"bundle", "picture"}


@pytest.mark.parametrize("budget", ["0.4x", "65KB"])
def test_a_budget_is_a_limit_on_the_bytes(place, tmp_path, budget):
    record = record_of(quantize(place / "llamagen", "--budget", budget, "layers.only=[layers.*]", "--out", tmp_path / "q", "--json"))
    spent, whole = (sum(line[key] for line in record["layers"]) for key in ("bytes", "fp16_bytes"))
    assert spent <= (0.4 * whole if budget == "0.4x" else 65_000) and (tmp_path / "q" / "sensitivity.png").is_file()


def test_a_dry_run_lists_layers_and_writes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    plan = record_of(quantize(place / "var", "--group", 32, "--out", tmp_path / "q", "--dry-run", "--json"))["plan"]
    assert plan["formats"]["blocks.0.ffn.fc1"] == "W4g32" and "word_embed" not in plan["formats"]
    assert plan["recipe"] == "w4a8" and plan["calibration"]["num"] == 4 and not (tmp_path / "q").exists()


@pytest.mark.parametrize("recipe", ["w4a8", "mixdq", "litevar"])
def test_the_printed_configuration_is_taken_back(place, tmp_path, recipe):
    words = ("quantize", "--model", place / "var", "--recipe", recipe, *FEW)
    printed = invoke(*words, "--print-config")
    assert printed.exit_code == 0 and printed.stdout.count("recipe:") == 1
    (tmp_path / "c.yaml").write_text(printed.stdout)
    assert invoke("quantize", "-c", tmp_path / "c.yaml", "--print-config").stdout == printed.stdout
    plans = [record_of(invoke(*each, "--dry-run", "--json")) for each in (words, ("quantize", "-c", tmp_path / "c.yaml"))]
    assert plans[0] == plans[1]


def test_an_example_is_a_recipe(place, tmp_path):
    by_file = record_of(quantize(place / "llamagen", "-c", EXAMPLES / "quantize-w8a8.yaml", "--out", tmp_path / "a", "--json"))
    by_name = record_of(quantize(place / "llamagen", "--recipe", "w8a8", "--out", tmp_path / "b", "--json"))
    assert by_file["config_sha256"] == by_name["config_sha256"]
    digests = {sha256_file(tmp_path / name / "bundle" / "model.safetensors") for name in "ab"}
    assert len(digests) == 1


def test_values_of_a_recipe_can_be_changed_by_name(place, tmp_path):
    words = ("--recipe", "w8a8", "balance.rotate=false", "layers.keep=[]", "--out", tmp_path / "q", "--json")
    record = record_of(quantize(place / "var", *words))
    formats = {line["layer"]: line["format"] for line in record["layers"]}
    assert formats["word_embed"] == "W8A8" and formats["blocks.1.ffn.fc2"] == "W8A8 shifted"


def test_what_changes_nothing_is_said(place, tmp_path):
    result = invoke("quantize", "--model", place / "llamagen", "--num", 8, "calibration.check=4", "--out", tmp_path / "q")
    assert result.exit_code == 0 and "warning: recipe w4a8 reads the weights alone" in result.stderr


def test_the_embedded_model_is_quantised_by_default(tmp_path):
    record = record_of(invoke("quantize", "calibration.check=2", "--out", tmp_path / "q", "--json"))
    assert record["stack"]["name"] == "llamagen-w4a8" and record["parents"] == ["llamagen@embedded"]
    metrics = {metric["name"]: metric["value"] for metric in record["metrics"]}
    assert metrics["compression"] > 3.5 and metrics["top1_agreement"] > 0.5
    sampled = record_of(invoke("sample", "--model", tmp_path / "q", "--num", 2, "--json"))
    assert sampled["stack"]["model"] == str(tmp_path / "q") and not sampled["cost"]["simulated"]


def test_a_gate_can_be_set_on_the_agreement(place, tmp_path):
    result = quantize(place / "llamagen", "--out", tmp_path / "q", "--fail-if", "top1_agreement<1.1")
    assert result.exit_code == 7 and (tmp_path / "q" / "bundle").is_dir()


# -- a quantised model is a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*tiny_quant.KINDS, "litevar"])
def test_sample_takes_it(place, tmp_path, kind):
    words = ("sample", "--num", 3, "--seed", 1, "--json")
    record = record_of(invoke(*words, "--model", place / f"q-{kind}", "--out", tmp_path / "q"))
    assert record["cost"]["simulated"] is (kind == "litevar")
    base = record_of(invoke(*words, "--model", place / kind.replace("litevar", "var"), "--out", tmp_path / "base"))
    if kind == "litevar":
        assert record["cost"]["weight_bytes"] == base["cost"]["weight_bytes"]
    else:
        assert record["cost"]["weight_bytes"] < 0.5 * base["cost"]["weight_bytes"]
    assert len(list((tmp_path / "q").rglob("*.png"))) == len(list((tmp_path / "base").rglob("*.png")))


@pytest.fixture
def any_backend():
    yield
    kernels.set_backend("auto")


@pytest.mark.parametrize("kind", ["llamagen", "var"])
@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--kernels", "reference"), ("--dtype", "bfloat16", "--kernels", "reference")])
def test_sample_takes_it_in_every_precision_and_with_torch_alone(place, any_backend, kind, words):
    record = record_of(invoke("sample", "--model", place / f"q-{kind}", "--num", 2, *words, "--json"))
    assert record["status"] == "ok" and record["cost"]["weight_bytes"] < 200_000


@pytest.mark.parametrize("model", ["llamagen", "var", "llamagen-dd1"])
def test_evaluate_takes_the_run_its_bundle_and_its_record(tmp_path, model):
    """The embedded ones: pictures of the size that references have."""
    record_of(invoke("quantize", "--model", model, "--recipe", "w8a8", "--out", tmp_path / "q", "calibration.check=2", "--json"))
    values = []
    for words in (("--model", tmp_path / "q"), (tmp_path / "q" / "bundle",), (tmp_path / "q" / "run.json",)):
        record = record_of(invoke("eval", *words, "--metric", "fid", "--num", 6, "bootstrap=0", "--json"))
        values.append([metric["value"] for metric in record["metrics"]])
    assert len(values[0]) == 1 and values[0] == values[1] == values[2]


@pytest.mark.parametrize("words", [("--mode", "sjd"), ("--mode", "mc")])
def test_speculate_takes_it_as_its_teacher(place, words):
    record = record_of(invoke("speculate", "--model", place / "q-llamagen", *words, "--num", 2, "--json"))
    assert record["status"] == "ok" and record["cost"]["passes"] <= 16


def test_bench_takes_it_but_not_the_official_loop(place):
    for kind in ("llamagen", "var", "llamagen-student"):
        record = record_of(invoke("bench", place / f"q-{kind}", "--num", 1, "--repeats", 1, "--json"))
        assert record["cost"]["weight_bytes"] < 200_000 and not record["cost"]["simulated"]
    for kind in ("llamagen", "var"):
        result = invoke("bench", place / f"q-{kind}", "--baseline", "eager", "--num", 1)
        assert result.exit_code == 3 and "is quantised" in result.stderr and "base model" in result.stderr and result.stdout == ""


def test_schedules_and_shared_maps_take_it(place, tmp_path):
    shared = record_of(invoke("sample", "--model", place / "q-var", "--share", "map", "--num", 2, "--json"))
    assert shared["status"] == "ok"
    collab = f"{place / 'var'}:{place / 'q-var'}@2"
    both = record_of(invoke("sample", "--model", place / "var", "--collab", collab, "--num", 2, "--json"))
    assert both["status"] == "ok"
    (tmp_path / "rows.yaml").write_text(f"- {{scales: 1-2, model: {place / 'q-var'}, precision: bfloat16}}\n")
    record_of(invoke("sample", "--model", place / "var", "--schedule", tmp_path / "rows.yaml", "--num", 2, "--json"))


def test_sparsify_takes_it(place, tmp_path):
    few = ("--num", 2, "--cut", 0, "--share", "map")
    record_of(invoke("sparsify", "--model", place / "q-var", *few, "--out", tmp_path / "p", "--json"))
    words = ("--model", place / "q-var", "--apply", f"litevar={tmp_path / 'p'}", "--num", 2, "--json")
    assert record_of(invoke("sample", *words))["cost"]["attention"]


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_distill_takes_it_as_its_teacher(place, kind):
    plan = invoke("distill", "--teacher", place / f"q-{kind}", "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    few = (
        "trajectories.num=8", "trajectories.held_out=2", "trajectories.shard_size=4", "trajectories.batch_size=4", "optim.steps=1",
        "optim.batch_size=2", "optim.warmup=1", "optim.eval_every=1", "optim.checkpoint_every=1", "probe_images=0",
    )  # fmt: skip
    record = record_of(invoke("distill", "--teacher", place / f"q-{kind}", *few, "--json"))
    student = load_model(record["run_dir"])
    assert student.source.kind == "student" and "quantization" not in student.source.card
    teacher = load_model(str(place / kind)).module.state_dict()
    name = "layers.0.attention.wqkv.weight" if kind == "llamagen" else "blocks.0.attn.mat_qkv.weight"
    assert tiny_quant.sqnr_db(teacher[name], student.module.state_dict()[name]) > 12  # it starts from what the integers stand for


# -- what it says of itself ---------------------------------------------------------------------------------------------------


def test_info_tells_formats_bytes_by_part_and_the_base(place, monkeypatch):
    weights = load_model(str(place / "var")).module
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    facts = record_of(invoke("models", "info", place / "q-var", "--json"))
    lines = json.loads((place / "q-var" / "run.json").read_text())["layers"]
    assert (
        facts["recipe"] == "w4a8" and facts["formats"] == Counter(line["format"].split()[0] for line in lines) and facts["layers_kept"] == 2
    )
    assert "parameters" not in facts and "bytes_bf16" not in facts and facts["simulated"] is None
    base = record_of(invoke("models", "info", place / "var", "--json"))
    assert facts["base"]["model"] == str(place / "var") and facts["base"]["parameters"] == base["parameters"]
    assert facts["base"]["sha256"] == sha256_file(place / "var" / "model.safetensors")
    parts = facts["bytes_by_part"]
    assert list(parts) == ["codes", "scales", "zero_points", "balancing", "embeddings", "blocks", "head"]
    sizes = {line["layer"]: weights.get_submodule(line["layer"]).weight.numel() for line in lines}
    codes = sum(sizes[line["layer"]] if line["format"].startswith("W8") else sizes[line["layer"]] // 2 + 16 for line in lines)
    assert parts["codes"] == codes
    header = facts["files"]["model.safetensors"] - sum(parts.values())
    assert 0 < header < 20_000
    table = invoke("models", "info", place / "q-var").stdout
    assert "bytes_by_part" in table and "W4A8 8" in table and "codes" in table


def test_info_calls_a_simulated_bundle_what_it_is(place):
    facts = record_of(invoke("models", "info", place / "q-litevar", "--json"))
    assert (
        facts["simulated"] == "litevar"
        and sum(facts["formats"].values()) == 9
        and "W4A8 simulated" in facts["formats"]
        and "codes" not in facts["bytes_by_part"]
    )


def test_info_of_a_plain_bundle_has_its_parts_too(place):
    for kind in tiny_quant.KINDS:
        facts = record_of(invoke("models", "info", place / kind, "--json"))
        state = load_model(str(place / kind)).module.state_dict()
        assert list(facts["bytes_by_part"]) == ["embeddings", "blocks", "head"]
        assert sum(facts["bytes_by_part"].values()) == sum(value.nbytes for value in state.values())


def test_verify_takes_it(place):
    assert record_of(invoke("models", "verify", place / "q-llamagen", "--json"))["ok"]


def test_tiny_layers_that_no_group_divides_are_quantised(tmp_path):
    """16 wide: one scale an output, whatever was asked for."""
    model = tiny_models.teacher_bundle(tmp_path / "tiny")
    record = record_of(quantize(model, "--group", 32, "--out", tmp_path / "q", "--json"))
    assert {line["format"] for line in record["layers"] if line["layer"].startswith("layers.")} == {"W4A8 rotated"}
    record_of(invoke("sample", "--model", tmp_path / "q", "--num", 2, "--json"))
