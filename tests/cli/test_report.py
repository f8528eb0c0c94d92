import json

import numpy as np
import pytest
from typer.testing import CliRunner

from arsp.cli.app import app
from arsp.data.images import save_png


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run("report", ...)`` in an empty directory with its own runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    return lambda *args, stdin=None: CliRunner().invoke(app, ["report", *map(str, args)], input=stdin)


def make_record(name, fid=None, **more):
    metrics = [] if fid is None else [{"name": "fid", "value": fid, "n": 10, "protocol": "p", "reference_sha256": None, "comparable": True}]
    record = {"schema": 1, "id": f"id-{name}", "command": "evaluate", "status": "ok", "finished": "2026-01-01T00:00:00+00:00"}
    return record | {"stack": {"name": name}, "metrics": metrics, "cost": {"passes": 4}, "artifacts": [], "parents": []} | more


def write_run(tmp_path, name, fid=None, **more):
    folder = tmp_path / "runs" / f"evaluate-{name}"
    folder.mkdir(parents=True)
    save_png(np.full((8, 8, 3), 200, np.uint8), folder / "grid.png")
    record = make_record(name, fid, run_dir=str(folder), artifacts=[{"path": "grid.png", "kind": "grid"}], **more)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "runs")


def test_run_directories_become_all_four_files_and_a_table(run, tmp_path):
    folders = [write_run(tmp_path, "llamagen", 3.0), write_run(tmp_path, "llamagen-dd1", 7.0)]
    result = run(*folders, "--html", "r.html", "--png", "r.png", "--csv", "r.csv", "--md", "r.md", "--title", "My title")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == ["r.csv", "r.html", "r.md", "r.png"]
    assert "<h1>My title</h1>" in (tmp_path / "r.html").read_text()
    assert "llamagen-dd1" in result.stdout and "wrote r.html" in result.stderr


def test_a_folder_of_runs_stands_for_all_runs_in_it(run, tmp_path):
    write_run(tmp_path, "llamagen", 3.0)
    write_run(tmp_path, "llamagen-dd1", 7.0)
    result = run("runs", "--out", "out")
    assert result.exit_code == 0 and files(tmp_path / "out") == ["report.csv", "report.html", "report.md", "report.png"]
    assert "llamagen-dd1" in (tmp_path / "out" / "report.md").read_text()


def test_without_an_output_option_report_html_is_written_here(run, tmp_path):
    result = run("-", stdin=json.dumps(make_record("llamagen", 3.0)))
    assert (result.exit_code, files(tmp_path)) == (0, ["report.html"])
    assert "wrote report.html" in result.stderr and "report.html" not in result.stdout


@pytest.mark.parametrize("form", ["one", "array", "lines", "pretty"])
def test_stdin_takes_one_record_an_array_or_one_document_after_another(run, form):
    records = [make_record("llamagen", 3.0), make_record("llamagen-dd1", 7.0)]
    text = {
        "one": json.dumps(records[0]),
        "array": json.dumps(records),
        "lines": "\n".join(map(json.dumps, records)) + "\n",
        "pretty": "\n\n".join(json.dumps(record, indent=1) for record in records),
    }[form]
    result = run("-", "--csv", "r.csv", stdin=text)
    assert result.exit_code == 0, result.output
    assert ("llamagen-dd1" in result.stdout) is (form != "one")


def test_json_prints_one_record_of_the_report_with_its_artifacts(run):
    result = run("-", "--json", "--html", "r.html", "--md", "r.md", stdin=json.dumps(make_record("llamagen", 3.0)))
    record = json.loads(result.stdout)
    assert (record["command"], record["status"], record["parents"]) == ("report", "ok", ["id-llamagen"])
    assert [artifact["kind"] for artifact in record["artifacts"]] == ["html", "markdown"]
    assert [(m["stack"], m["value"]) for m in record["metrics"]] == [("llamagen", 3.0)]


def test_the_newest_run_is_reported_when_no_record_is_named(run, tmp_path):
    write_run(tmp_path, "llamagen", 3.0)
    write_run(tmp_path, "llamagen-dd1", 7.0, finished="2027-01-01T00:00:00+00:00")
    result = run("--md", "r.md")
    assert "llamagen-dd1" in result.stdout and "newest run" in result.stderr


def test_the_samples_behind_an_evaluation_on_stdin_are_found_among_the_runs(run, tmp_path):
    write_run(tmp_path, "llamagen", command="sample", id="sampled")
    result = run("-", "--html", "r.html", stdin=json.dumps(make_record("llamagen", 3.0, parents=["sampled"])))
    assert result.exit_code == 0
    assert 'id="samples"' in (tmp_path / "r.html").read_text()


def test_a_moved_run_directory_still_shows_its_pictures(run, tmp_path):
    folder = write_run(tmp_path, "llamagen", 3.0)
    folder.rename(tmp_path / "runs" / "moved")
    result = run("runs/moved", "--html", "r.html")
    assert "missing" not in result.stderr and 'id="samples"' in (tmp_path / "r.html").read_text()


def test_a_missing_picture_is_a_warning_and_a_note_but_no_failure(run, tmp_path):
    folder = write_run(tmp_path, "llamagen", 3.0)
    (folder / "grid.png").unlink()
    result = run(folder, "--html", "r.html")
    assert result.exit_code == 0 and "grid.png" in result.stderr
    assert "is missing" in (tmp_path / "r.html").read_text()


def test_a_dry_run_writes_nothing(run, tmp_path):
    result = run("-", "--dry-run", "--html", "r.html", stdin=json.dumps(make_record("llamagen", 3.0)))
    assert (result.exit_code, files(tmp_path)) == (0, []) and "r.html" in result.stdout


def test_fail_if_judges_every_stack(run):
    text = json.dumps([make_record("llamagen", 3.0), make_record("llamagen-dd1", 13.0)])
    assert run("-", "--md", "r.md", "--fail-if", "fid>12", stdin=text).exit_code == 7
    assert run("-", "--md", "r.md", "--fail-if", "fid>14", stdin=text).exit_code == 0


@pytest.mark.parametrize(
    "args, stdin, code, word",
    [
        (["nowhere"], None, 4, "does not exist"),
        (["empty"], None, 4, "holds no run"),
        (["corrupt.json"], None, 4, "corrupt.json"),
        (["list.json"], None, 4, "list.json"),
        (["foreign.json"], None, 4, "not an arsp record"),
        (["twisted.json"], None, 4, "'metrics'"),
        ([], None, 4, "no finished run"),
        (["-"], "", 4, "empty"),
        (["-"], "{not json", 4, "not JSON"),
        (["-"], "[]", 4, "empty list"),
        (["-"], "[1]", 4, "record 1"),
        (["-"], '{"schema": 99, "command": "sample"}', 4, "schema 99"),
        (["-", "-"], "{}", 2, "once"),
        (["good.json", "--html", "x", "--png", "x"], None, 2, "same file"),
        (["good.json", "--html", "empty"], None, 2, "is a directory"),
        (["good.json", "--html", "good.json/x/r.html"], None, 5, "cannot write"),
        (["good.json", "--width", "3"], None, 2, "--width"),
    ],
)
def test_bad_input_is_one_message_an_exit_code_and_no_file(run, tmp_path, args, stdin, code, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.json").write_text(json.dumps(make_record("llamagen", 3.0)))
    (tmp_path / "corrupt.json").write_text('{"schema": 1, "comm')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "foreign.json").write_text('{"name": "x"}')
    (tmp_path / "twisted.json").write_text(json.dumps(make_record("llamagen") | {"metrics": "fid"}))
    before = files(tmp_path)
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    assert word in result.stderr and "Traceback" not in result.output and result.stdout == ""
    assert files(tmp_path) == before


def test_a_failing_render_leaves_the_former_report_untouched(run, tmp_path, monkeypatch):
    import arsp.report.html

    def fail(report):
        raise OSError(28, "No space left on device", "r.png")

    (tmp_path / "r.html").write_text("former")
    monkeypatch.setattr(arsp.report.html, "render_png", fail)
    result = run("-", "--html", "r.html", "--png", "r.png", stdin=json.dumps(make_record("llamagen", 3.0)))
    assert result.exit_code == 5
    assert files(tmp_path) == ["r.html"] and (tmp_path / "r.html").read_text() == "former"
