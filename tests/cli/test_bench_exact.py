"""`arsp bench exact`: the table, the record, the verdict as exit code."""

import json

import pytest
import typer
from typer.testing import CliRunner

from arsp.cli.bench_exact import exact
from arsp.decode.ar import ARGenerator
from arsp.decode.filters import LogitsPipeline
from arsp.decode.modes import MODES
from arsp.registry import Registry


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(exact)
    return lambda *args: CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module", autouse=True)
def biased_sampler():
    Registry("samplers").register("test-biased", lambda decoder: ARGenerator(decoder, LogitsPipeline(temperature=0.9)))


def test_an_exact_sampler_passes_and_leaves_a_record(run, runs_dir):
    result = run("--num", "20000", "--json", "--quiet")
    record = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert [m["name"] for m in record["metrics"]] == ["exact_tv", "exact_p"] * 3
    assert all(m["passed"] and m["n"] == 20000 for m in record["metrics"])
    (saved,) = runs_dir.glob("*/run.json")
    assert json.loads(saved.read_text()) == record and record["status"] == "ok"


def test_a_biased_sampler_exits_7_with_its_numbers_printed(run):
    result = run("--sampler", "test-biased", "--num", "50000", "--seeds", "1")
    assert result.exit_code == 7, result.output
    assert "FAIL" in result.stdout and "test-biased (seed 0" in result.stderr


def test_an_approximate_sampler_is_reported_not_judged(run):
    result = run("--sampler", "flow", "--num", "2000", "--seeds", "1", "--testbed", "toy")
    assert result.exit_code == 0 and "approximate" in result.stdout, result.output


def test_a_mode_takes_its_window_and_first_guesses(run):
    args = ("--sampler", "sjd", "--sampler", "mc", "--num", "5000", "--seeds", "1", "--top-k", "3", "--quiet", "--json")
    result = run(*args, "--window", "2", "--init", "repeat_left")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and [m["sampler"] for m in record["metrics"][::2]] == ["sjd", "mc"], result.output
    assert record["config"]["window"] == 2 and record["config"]["init"] == "repeat_left"
    plain = json.loads(run(*args).stdout)
    assert [m["value"] for m in plain["metrics"]] != [m["value"] for m in record["metrics"]], "window and guesses have no effect"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_and_a_relaxed_one_is_reported_not_judged(run, mode):
    """2000 sequences: an exact mode fails with probability 1e-4, the seed is fixed; LANTERN and ZipAR are far from the law."""
    result = run("--sampler", mode, "--num", "2000", "--seeds", "1", "--quiet", "--json")
    (metric,) = (m for m in json.loads(result.stdout)["metrics"] if m["name"] == "exact_p")
    assert result.exit_code == 0, result.output
    assert metric["exactness"].split("(")[0] == MODES[mode].exactness.split("(")[0]
    if mode in ("lantern", "zipar"):
        assert not metric["passed"], metric


def test_groups_of_codes_show_their_distance_where_there_are_enough_codes(run):
    result = run("--sampler", "gsd", "--testbed", "wide", "--num", "100000", "--seeds", "1")
    assert result.exit_code == 0 and "differs" in result.stdout, result.output


def test_the_verdict_is_measured_anew_every_time(run, runs_dir):
    args = ("--num", "1000", "--seeds", "1", "--quiet", "--json")
    first, second = (json.loads(run(*args).stdout) for _ in range(2))
    assert first["run_dir"] == second["run_dir"] and first["started"] < second["started"]


def test_the_filters_of_the_command_line_are_part_of_the_law(run):
    result = run("--num", "20000", "--seeds", "1", "--top-k", "2", "--quiet", "--json")
    metric = json.loads(result.stdout)["metrics"][0]
    assert metric["passed"] and metric["df"] <= 15, metric


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [(("--sampler", "aar"), 3, "Did you mean"), (("--top-p", "2"), 3, "top_p"), (("--num", "0"), 3, "num"), (("--nmu", "3"), 2, "nmu"),
     (("--window", "2"), 3, "no effect"), (("--sampler", "sjd", "--window", "5"), 3, "1 to 4"), (("--sampler", "sjdd"), 3, "sjd"),
     (("--sampler", "rsd", "--window", "2"), 3, "no effect in mode rsd"), (("--sampler", "sjd", "--init", "left"), 3, "left_law"),
     (("--sampler", "vp", "--window", "0"), 3, "window"),
     (("--num", "1000", "--seeds", "1", "--fail-if", "exact_tv>0"), 7, "exact_tv")],
)  # fmt: skip
def test_bad_input_gives_its_exit_code_and_one_message(run, args, code, text):
    result = run(*args)
    assert result.exit_code == code and text in result.stderr and "Traceback" not in result.stderr, result.output


def test_a_dry_run_writes_nothing(run, runs_dir):
    result = run("--dry-run")
    assert result.exit_code == 0 and "samplers" in result.stdout and not list(runs_dir.iterdir())
