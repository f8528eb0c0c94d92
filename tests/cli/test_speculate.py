"""``arsp speculate`` on tiny models: what it measures beside plain sampling, what it prints, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_var
import torch
from command_line import invoke, record_of, refused
from PIL import Image
from typer.testing import CliRunner

from arsp.bench import paired
from arsp.cli import speculate as cli
from arsp.cli.app import app
from arsp.cli.evaluate import image_artifact
from arsp.decode.modes import MODES
from arsp.zoo import bundle, convert, load

EXACT = {"seeded", "sjd", "mc", "pac", "vp", "draft-model", "kseq", "rsd"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_models.student_bundle(folder / "student", tiny_models.teacher_bundle(folder / "teacher"))
    tiny_var.teacher_bundle(folder / "var")
    torch.save({"model": tiny_models.gpt_model().state_dict()}, folder / "c2i_256.pt")
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """The models by name; runs go to ``tmp_path / "runs"``."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ARSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    return tmp_path


def speculate(*words):
    return record_of(invoke("speculate", *words, "--json"))


def tiny(*words):
    return speculate("--model", "teacher", "--num", 3, *words)


def values(record):
    return {metric["name"]: metric["value"] for metric in record["metrics"]}


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("*.png"))])


# -- what is measured -------------------------------------------------------------------------------------------------------


def test_the_default_mode_draws_the_images_of_arsp_sample(place):
    record = tiny("--seed", 1, "--window", 5)
    sampled = record_of(invoke("sample", "--model", "teacher", "--num", 3, "--seed", 1, "--json"))
    assert record["stack"]["verify"] == {"window": 5, "init": "random_uniform", "exactness": "exact"}
    assert values(record)["identical"] == 1 and record["differing"] == []
    expected = pixels(Path(sampled["run_dir"]) / "images")
    for name in ("images", "images-ar"):
        gap = np.abs(pixels(Path(record["run_dir"]) / name) - expected).max()
        assert gap <= 1, f"{name} is {gap} levels from arsp sample"
    assert values(record)["passes"] < 16 == record["plain"]["cost"]["passes"]


def test_a_record_holds_both_stacks_every_metric_and_the_pictures(place):
    record = tiny("--mode", "mc", "--batch-size", 2, "--grid", place / "deep" / "g.png")
    run, found = Path(record["run_dir"]), values(record)
    assert json.loads((run / "run.json").read_text()) == record and record["status"] == "ok" and record["command"] == "speculate"
    assert found.keys() == {
        "passes", "tokens_per_pass", "single_token_share", "acceptance", "speedup", "latency_ms", "ar_latency_ms",
    }  # fmt: skip
    report, cost = record["cost"]["verify"], record["cost"]
    assert found["tokens_per_pass"] == report["tokens_per_pass"] == cost["tokens_per_pass"] == pytest.approx(16 / found["passes"])
    assert sum(report["committed"].values()) == found["passes"] * 3 and report["images"] == 3
    assert [len(row) for row in report["acceptance_map"]] == [4, 4, 4, 4]
    assert 0 < report["state_bytes_per_image"] <= 17 * (16 * 4 + 16), "logits and what makes a law of them, for 17 positions"
    assert found["speedup"] == pytest.approx(np.median(np.divide(record["seconds"]["plain"], record["seconds"]["mode"])))
    assert cost["latency_ms"]["p50"] == pytest.approx(1e3 * np.median(record["seconds"]["mode"]))
    assert (record["stack"]["sampler"], record["plain"]["stack"]["sampler"]) == ("mc", "ar")
    assert record["plain"]["cost"]["latency_ms"]["p50"] == found["ar_latency_ms"]
    kinds = {artifact["path"]: artifact["kind"] for artifact in record["artifacts"]}
    assert kinds == {
        "images": "image-dir", "grid.png": "grid", "images-ar": "plain-image-dir", "grid-ar.png": "plain-grid", "decoding.png": "picture",
    }  # fmt: skip
    assert (place / "deep" / "g.png").read_bytes() == (run / "grid.png").read_bytes()
    assert len(json.loads((run / "labels.json").read_text())) == 3 and image_artifact(record)["path"] == "images"


def test_an_interval_needs_three_batches(place):
    interval = lambda record: next(metric for metric in record["metrics"] if metric["name"] == "speedup")["ci95"]
    low, high = interval(tiny("--mode", "sjd"))
    assert 0 < low <= high
    assert interval(tiny("--mode", "sjd", "--batch-size", 2)) is None


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_and_says_what_it_promises(place, mode):
    draft = ["--draft-model", "teacher"] if MODES[mode].needs_draft else []
    window = ["--window", 2] if MODES[mode].window else ["--branches", "2,1"]
    record = tiny("--mode", mode, *draft, *window, "--top-k", 9, "--cfg-interval", 5)
    exactness = record["stack"]["verify"]["exactness"]
    assert (exactness == "exact") == (mode in EXACT) and exactness.partition("(")[0] == cli.exactness_class(record)
    assert exactness.startswith(MODES[mode].exactness.partition("(")[0])
    assert ("identical" in values(record)) == (mode == "seeded")
    assert (record["cost"].get("draft_passes_per_batch", 0) > 0) == bool(draft)
    assert values(record)["passes"] < 16
    assert (values(record)["acceptance"] is None) == (mode == "zipar"), "no draft is tested there"


def test_where_no_draft_is_tested_there_is_no_acceptance(place):
    record = tiny("--mode", "zipar")
    assert record["cost"]["verify"]["acceptance_map"] == [[None] * 4] * 4
    assert "by place" not in invoke("speculate", "--model", "teacher", "--num", 3, "--mode", "zipar").stdout


def test_lantern_takes_a_tree_of_a_draft_model_too(place):
    record = tiny("--mode", "lantern", "--draft-model", "teacher", "--branches", "2,1", "--delta", 0.25)
    assert record["stack"]["verify"]["exactness"] == "bounded(0.25)" and record["cost"]["draft_passes_per_batch"] > 0


def test_the_planner_tells_its_windows_and_why(place):
    record = tiny("--window", "auto")
    assert record["planner"]["decision"] and {row["window"] for row in record["planner"]["windows"]} >= {0, 1, 2}
    text = invoke("speculate", "--model", "teacher", "--num", 3, "--window", "auto").stdout
    assert "Windows, relative to a token a pass" in text and "time of a pass" in text
    assert "planner" not in tiny("--window", 2)


def flip(monkeypatch, image):
    """Plain sampling draws another last code of one image."""
    real = paired.plain_stack

    def plain(stack):
        built = real(stack)
        generate = built.generator.generate

        def other(request):
            made = generate(request)
            made.codes_BL[request.sample_ids_B == image, -1] ^= 1
            return made

        built.generator.generate = other
        return built

    monkeypatch.setattr(paired, "plain_stack", plain)


def test_images_that_differ_are_counted_explained_and_can_fail_the_command(place, monkeypatch):
    flip(monkeypatch, image=1)
    result = invoke("speculate", "--model", "teacher", "--num", 4, "--fail-if", "identical<1", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 7 and "identical = 0.75" in result.stderr and "nearly tied" in result.stderr
    assert record["differing"] == [1] and values(record)["identical"] == 0.75 and record["status"] == "ok"
    text = invoke("speculate", "--model", "teacher", "--num", 4)
    assert text.exit_code == 0 and "3 of 4" in text.stdout


def test_a_measurement_is_never_reused(place):
    first, again = tiny(), tiny()
    assert first["run_dir"] == again["run_dir"] and first["id"] != again["id"]


def test_classes_and_the_printed_configuration(place):
    words = ("--model", "teacher", "--class", "cat", "--class", 0, "--num", 3, "--mode", "vp", "--gain", 2, "--window", 4)
    printed = invoke("speculate", *words, "--print-config").stdout
    (place / "c.yaml").write_text(printed)
    record = speculate(*words)
    assert json.loads((Path(record["run_dir"]) / "labels.json").read_text()) == [2, 0, 2]
    again = speculate("-c", place / "c.yaml", "classes=[2, 0]")
    assert again["run_dir"] == record["run_dir"] and again["stack"]["name"] == record["stack"]["name"]


def test_an_official_file_without_tokenizer_gives_codes_only(place):
    record = speculate("--model", "c2i_256.pt", "--num", 2, "--cfg", 1.5)
    assert values(record)["identical"] == 1 and [a["path"] for a in record["artifacts"]] == ["decoding.png"]


def test_random_weights_are_timed_without_pictures(place):
    record = tiny("--random-weights", "--mode", "sjd")
    assert [a["path"] for a in record["artifacts"]] == ["decoding.png"] and values(record)["speedup"] > 0


def test_the_embedded_teacher_and_its_drafter(place):
    record = speculate("--mode", "draft-model", "--draft-model", "llamagen-small", "--num", 2, "--batch-size", 2)
    assert record["stack"]["origin"] == "embedded" and values(record)["passes"] < 16
    record = speculate("--num", 2, "--batch-size", 2, "--seed", 1)
    sampled = record_of(invoke("sample", "--num", 2, "--seed", 1, "--json"))
    assert values(record)["identical"] == 1
    gap = np.abs(pixels(Path(record["run_dir"]) / "images") - pixels(Path(sampled["run_dir"]) / "images")).max()
    assert gap <= 1, f"{gap} levels from arsp sample"


# -- what is printed --------------------------------------------------------------------------------------------------------


def text_of(renderable, **options):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"), **options)  # noqa: SIM115
    console.print(renderable)
    return console.export_text(styles=bool(options))


def test_the_view_has_exactness_both_stacks_histogram_and_map(place):
    result = invoke("speculate", "--model", "teacher", "--mode", "lantern", "--num", 3, "--window", 4)
    for words in ("bounded(0.1)", "another law", "plain", "tokens a pass", "speed-up [95 % interval]", "state of an image beside it",
                  "Tokens committed by a pass", "█", "Accepted drafts by place", "arsp report"):  # fmt: skip
        assert words in result.stdout, f"{words} is missing in\n{result.stdout}"
    assert result.stdout.count("error") == 0 and "codes of plain sampling" not in result.stdout


def test_the_map_writes_percent_into_small_images_and_shades_into_large_ones():
    small = text_of(cli.heat_map([[0.0, 0.501], [1.0, None]]))
    assert small.splitlines()[1:] == ["   0  50", " 100   ·", ""]
    large = text_of(cli.heat_map([[0.0, 0.3, 0.6, 1.0, None] + [0.0] * 12]))
    assert large.splitlines()[1] == "░░▒▒▓▓██··" + "░░" * 12
    coloured = text_of(cli.heat_map([[0.0, 1.0]]), force_terminal=True, color_system="truecolor")
    assert "48;2;0;34;78" in coloured and "48;2;253;231;55" in coloured


def test_a_dry_run_settles_the_options_and_reads_nothing(place, monkeypatch):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    plan = record_of(invoke("speculate", "--model", "teacher", "--mode", "pac", "--dry-run", "--json"))["plan"]
    assert plan["verify"] == {"window": 16, "init": "random_uniform", "width": 3, "levels": 3} and plan["speculate"] == 16
    assert not (place / "runs").exists()


def test_every_mode_initialiser_and_option_is_in_the_help():
    from arsp.decode.drafts import INITIALISERS
    from arsp.decode.modes import VerifyConfig

    text = CliRunner().invoke(app, ["speculate", "--help"], terminal_width=200).stdout
    words = {word.strip(".,:;│") for word in text.split()}
    missing = [name for name in (*MODES, *INITIALISERS) if name not in words]
    missing += [name for name in VerifyConfig.model_fields if f"--{name.replace('_', '-')}" not in words]
    assert not missing, f"not in the help: {missing}"


# -- what is refused --------------------------------------------------------------------------------------------------------

TEACHER = ("--model", "teacher")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--model", "var"), 3, "next-scale teacher and cannot take codes back"),
        (("--model", "student"), 3, "needs an autoregressive teacher"),
        (("--model", "llamagen-t2i-xl-256"), 3, "text-conditional"),
        (("--model", "c2i_256.pt", "--mode", "lantern"), 4, "near codes need its codebook"),
        (("--model", "c2i_256.pt", "--mode", "lantern++"), 4, "--tokenizer"),
        (("--model", "c2i_256.pt", "--grid", "g.png"), 4, "--tokenizer"),
        ((*TEACHER, "--random-weights", "--grid", "g.png"), 3, "--grid"),
        ((*TEACHER, "--draft-model", "llamagen-small"), 3, "two models of one tokenizer"),
        ((*TEACHER, "--draft-model", "var"), 3, "var"),
        ((*TEACHER, "--draft-model", "student"), 3, "student"),
        ((*TEACHER, "--draft-model", "missing"), 3, "missing"),
        ((*TEACHER, "--mode", "kseq"), 3, "needs a smaller model"),
        ((*TEACHER, "--window", "0"), 3, "1 to 16"),
        ((*TEACHER, "--window", "-1"), 3, "1 to 16"),
        ((*TEACHER, "--window", "17"), 3, "1 to 16"),
        ((*TEACHER, "--window", "atuo"), 2, "a number or auto"),
        ((*TEACHER, "--window", "2.5"), 2, "a number or auto"),
        ((*TEACHER, "stack.verify.window=2.5"), 3, "verify.window"),
        ((*TEACHER, "--mode", "pac", "--window", "auto"), 3, "--window auto"),
        ((*TEACHER, "--mode", "zipar", "--window", "5"), 3, "the codes of a row"),
        ((*TEACHER, "--mode", "sdj"), 3, "Did you mean: sjd"),
        ((*TEACHER, "--mode", "ar"), 3, "unknown mode"),
        ((*TEACHER, "--init", "repeat_abov"), 3, "Did you mean: repeat_above"),
        ((*TEACHER, "--mode", "lantern", "--delta", "0"), 3, "(0, inf)"),
        ((*TEACHER, "--mode", "lantern", "--delta", "-0.5"), 3, "(0, inf)"),
        ((*TEACHER, "--mode", "lantern", "--delta", "inf"), 3, "(0, inf)"),
        ((*TEACHER, "--mode", "lantern", "--delta", "nan"), 3, "(0, inf)"),
        ((*TEACHER, "--mode", "lantern++", "--delta", "0.5"), 3, "above 1"),
        ((*TEACHER, "--mode", "lantern", "--near", "0"), 3, "near"),
        ((*TEACHER, "--mode", "vp", "--gain", "inf"), 3, "gain"),
        ((*TEACHER, "--mode", "reuse", "--tau", "nan"), 3, "tau"),
        ((*TEACHER, "--mode", "gsd", "--distance", "0"), 3, "distance"),
        ((*TEACHER, "--mode", "mc", "--coupling", "minimal"), 3, "coupling"),
        ((*TEACHER, "--mode", "rsd", "--draft-model", "teacher", "--branches", "0,1"), 3, "--branches"),
        ((*TEACHER, "--delta", "0.1"), 3, "--delta: no effect in mode seeded"),
        ((*TEACHER, "--mode", "sjd", "--draft-model", "teacher"), 3, "--draft-model: no effect in mode sjd"),
        ((*TEACHER, "--mode", "rsd", "--draft-model", "teacher", "--window", "4"), 3, "--window: no effect in mode rsd"),
        ((*TEACHER, "--init", "prior", "--draft-model", "teacher"), 3, "Drop one of the two"),
        ((*TEACHER, "stack.verify.windw=3"), 3, "verify.window"),
        ((*TEACHER, "stack.verify=3"), 3, "stack.verify"),
        ((*TEACHER, "stack.rng=torch"), 3, "no effect in mode seeded"),
        ((*TEACHER, "stack.baseline=mode"), 3, "Drop one of the two"),
        ((*TEACHER, "--class", "bea"), 2, "Did you mean: bee"),
        ((*TEACHER, "--class", "3"), 2, "classes 0..2"),
        ((*TEACHER, "--num", "0"), 3, "num"),
        ((*TEACHER, "--batch-size", "0"), 2, "--batch-size"),
        ((*TEACHER, "--temperature", "nan"), 3, "temperature"),
        ((*TEACHER, "--fail-if", "identical"), 2, "--fail-if"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_read(place, models, monkeypatch, words, code, said):
    monkeypatch.setattr(load, "_weights", lambda source: pytest.fail("weights were read"))
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    before = sorted(models.rglob("*"))
    refused(invoke("speculate", *words), code, said)
    assert not (place / "runs").exists() and sorted(models.rglob("*")) == before, "something was written"
