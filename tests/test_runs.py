"""Run directories and records: the same command finds its run again, nothing half-written is ever visible."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from arsp import runs
from arsp.config import StrictModel
from arsp.errors import InputError, Interrupted, LockedError
from arsp.runs import (
    Run,
    atomic_dir,
    atomic_file,
    check_stop,
    latest_run,
    new_record,
    read_record,
    runs_root,
    sha256_file,
    stop_signals,
    write_json,
)

# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path):
    target = tmp_path / "sub" / "x.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["x.txt"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path):
    target = tmp_path / "bundle"
    for name in ("first", "second"):
        with atomic_dir(target) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(target) == ["second"]
    with pytest.raises(RuntimeError), atomic_dir(target) as temporary:
        (temporary / "third").write_text("half")
        raise RuntimeError
    assert os.listdir(target) == ["second"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_json_never_holds_nan(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": math.nan, "b": [math.inf, np.float32("nan"), np.int64(3)], "c": Path("x"), "d": np.zeros(2)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None, None, 3], "c": "x", "d": [0, 0]}


def test_hash_is_the_files_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(InputError, match="missing"):
        sha256_file(tmp_path / "missing")


# ----------------------------------------------------------------------------------------------------------------- runs


def test_the_same_configuration_gets_the_same_directory_and_another_does_not(runs_dir: Path):
    paths = []
    for config in ({"seed": 1}, {"seed": 1}, {"seed": 2}):
        with Run.open("sample", "llama/gen", config) as run:
            paths.append(run.path)
    assert paths[0] == paths[1] != paths[2]
    assert paths[0].parent == runs_dir.resolve() and paths[0].name.startswith("sample-llama-gen-")


def test_a_finished_run_stays_as_it_is():
    with Run.open("sample", "x", {"seed": 1}) as run:
        assert not run.finished
        run.add_metric("fid", 3.0, n=10)
        run.finish()
    text = (run.path / "run.json").read_text()
    with Run.open("sample", "x", {"seed": 1}) as again:
        assert again.finished and again.record["id"] == run.record["id"]
    assert (run.path / "run.json").read_text() == text


def test_an_unfinished_run_is_entered_again_with_its_files():
    with pytest.raises(RuntimeError), Run.open("train", "x", {}) as run:
        (run.path / "step.txt").write_text("5")
        raise RuntimeError("boom")
    assert (read_record(run.path)["status"], read_record(run.path)["error"]) == ("failed", "boom")
    with Run.open("train", "x", {}) as again:
        assert not again.finished and (again.path / "step.txt").read_text() == "5"
        assert read_record(again.path)["status"] == "running" and "error" not in again.record
    assert read_record(run.path)["status"] == "ok"


def test_what_a_killed_process_left_half_written_is_removed():
    run = Run.open("train", "x", {})
    (run.path / "images").mkdir()
    for name in (".a.png.123-0123abcd.tmp", ".mine.tmp"):
        (run.path / "images" / name).write_text("half")
    run.close()
    with Run.open("train", "x", {}):
        assert os.listdir(run.path / "images") == [".mine.tmp"]


def test_without_resume_the_run_starts_empty():
    with Run.open("train", "x", {}) as run:
        (run.path / "images").mkdir()
        (run.path / "images" / "0.png").write_text("")
    with Run.open("train", "x", {}, resume=False) as again:
        assert not again.finished and not (again.path / "images").exists()


def test_an_interrupt_is_recorded_as_one():
    with pytest.raises(Interrupted), Run.open("train", "x", {}) as run:
        raise Interrupted("stop", 130)
    assert read_record(run.path)["status"] == "interrupted"


def test_an_error_after_finish_leaves_the_status_ok():
    with pytest.raises(RuntimeError), Run.open("evaluate", "x", {}) as run:
        run.finish()
        raise RuntimeError
    assert read_record(run.path)["status"] == "ok"


def test_a_directory_of_another_configuration_is_refused_with_the_first_difference(tmp_path: Path):
    out = tmp_path / "o"
    with Run.open("sample", "x", {"a": {"seed": 1}}, out):
        pass
    with pytest.raises(LockedError, match=r"a\.seed: 1 there, 2 here") as caught:
        Run.open("sample", "x", {"a": {"seed": 2}}, out)
    assert caught.value.exit_code == 8
    with pytest.raises(LockedError, match="this is 'train'"):
        Run.open("train", "x", {"a": {"seed": 1}}, out, resume=False)


def test_a_held_directory_is_refused_until_it_is_released(tmp_path: Path):
    run = Run.open("sample", "x", {}, tmp_path / "o")
    with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
        Run.open("sample", "x", {}, tmp_path / "o")
    run.close()
    Run.open("sample", "x", {}, tmp_path / "o").close()


HOLD = """
import sys, time
from pathlib import Path
from arsp.runs import Run
run = Run.open("sample", "x", {}, Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_releases_its_directory(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "o")], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {child.pid} on "):
            Run.open("sample", "x", {}, tmp_path / "o")
    finally:
        child.kill()
        child.wait()
    with Run.open("sample", "x", {}, tmp_path / "o") as run:
        assert not run.finished


def test_foreign_contents_are_not_written_into(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="not an arsp run"):
        Run.open("sample", "x", {}, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        Run.open("sample", "x", {}, tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_repeated_metrics_and_artifacts_replace_their_first_version(tmp_path: Path):
    with Run.open("evaluate", "x", {}) as run:
        (run.path / "grid.png").write_bytes(b"1")
        (tmp_path / "x.npz").write_bytes(b"12")
        (run.path / "images").mkdir()
        (run.path / "images" / "0.png").write_bytes(b"123")
        for value in (math.nan, 2.0):
            run.add_metric("fid", value, n=8, protocol="p", group="a")
        run.add_metric("fid", 5.0, n=8, protocol="p", group="b")
        for _ in range(2):
            run.add_artifact("grid.png", "grid")
            run.add_artifact(tmp_path / "x.npz", "npz")
            run.add_artifact(run.path / "images", "image-dir", num=1)
        run.set_cost(passes=3, latency_ms={"p50": 1.0, "p95": math.inf})
    record = read_record(run.path)
    assert [(m["name"], m["value"], m["group"]) for m in record["metrics"]] == [("fid", 2.0, "a"), ("fid", 5.0, "b")]
    assert [(a["path"], a["bytes"]) for a in record["artifacts"]] == [("grid.png", 1), (str(tmp_path / "x.npz"), 2), ("images", 3)]
    assert record["artifacts"][0]["sha256"] == hashlib.sha256(b"1").hexdigest()
    assert record["cost"]["latency_ms"] == {"p50": 1.0, "p95": None} and record["cost"]["simulated"] is False


# -------------------------------------------------------------------------------------------------------------- records


class Config(StrictModel):
    seed: int = 3
    device: str = "cpu"


def test_a_record_has_the_documented_keys():
    record = new_record("sample", Config())
    assert list(record) == [
        "schema", "id", "command", "argv", "status", "started", "finished", "config", "config_sha256", "stack", "environment", "seed",
        "metrics", "cost", "artifacts", "run_dir", "parents",
    ]  # fmt: skip
    assert (record["seed"], record["config"], record["environment"]["device"]) == (3, {"seed": 3, "device": "cpu"}, "cpu")
    assert {"arsp", "commit", "python", "torch", "platform", "cpu", "threads"} <= set(record["environment"])
    assert new_record("sample", Config())["id"] != record["id"]


def test_opening_a_run_does_not_import_torch(runs_dir: Path):
    code = "import sys; from arsp.runs import Run\nwith Run.open('a', 'b', {}): pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ARSP_RUNS": str(runs_dir)})


def test_records_are_read_from_file_directory_and_stdin():
    with Run.open("sample", "x", {}) as run:
        pass
    text = (run.path / "run.json").read_text()
    assert read_record(run.path) == read_record(run.path / "run.json") == read_record("-", io.StringIO(text)) == run.record


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"schema": 1}', b'{"schema": 99, "command": "x"}', b"\xff\xfe", b""])
def test_what_is_not_a_record_is_an_input_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError):
        read_record(path)


def test_empty_stdin_says_what_to_do():
    with pytest.raises(InputError, match="standard input is empty"):
        read_record("-", io.StringIO(""))


def test_latest_run_is_the_one_that_finished_last_and_fits():
    for seed in (1, 2, 3):
        with Run.open("sample" if seed < 3 else "evaluate", "x", {"seed": seed}):
            time.sleep(0.002)  # times are kept to the millisecond
    (runs_root() / "broken").mkdir()
    (runs_root() / "broken" / "run.json").write_text("{")
    assert latest_run(lambda record: True)["seed"] == 3
    assert latest_run(lambda record: record["command"] == "sample")["seed"] == 2
    assert latest_run(lambda record: False) is None


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_safe_point(number: int, code: int):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, stop_signals():
        check_stop()
        os.kill(os.getpid(), number)
        assert runs.stop_requested()
        check_stop()
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_signals(), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_does_not_outlive_its_block():
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    check_stop()
    with stop_signals():
        check_stop()
