import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from arsp.cli.app import app
from arsp.data import shapes
from arsp.data.images import save_npz, save_png, save_png_dir
from arsp.runs import Run

N = 24
STAND_IN = SimpleNamespace(
    name="llamagen", origin="embedded", card={"about": "tiny", "dataset": "shapes32"}, capabilities=SimpleNamespace(conditions={"class"})
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty runs root, and a reference folder small enough for tests."""
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    save_npz(shapes.draw(40, 1)[0], tmp_path / "ref.npz")
    return tmp_path


def arsp(*words, stdin=None):
    return CliRunner().invoke(app, ["eval", *map(str, words)], input=stdin)


def record_of(result):
    assert result.exit_code == 0, f"exit {result.exit_code}: {result.stderr}"
    return json.loads(result.stdout)


def values(record):
    return {m["name"]: m["value"] for m in record["metrics"]}


def sample_run(place, n=N, name="llamagen+ar"):
    """A finished sample run with images, labels and a grid, as the sample command leaves it."""
    x, attrs = shapes.draw(n, 2)
    with Run.open("sample", name, {"num": n, "seed": 0, "batch_size": 16}) as run:
        save_png_dir(x, run.path / "images")
        (run.path / "labels.json").write_text(json.dumps(attrs["shape"].tolist()))
        save_png(x[0].permute(1, 2, 0).numpy(), run.path / "grid.png")
        run.add_artifact("images", "image-dir")
        run.add_artifact("grid.png", "grid")
        run.record["stack"] = {"name": name, "model": "llamagen", "dataset": "shapes32"}
        run.set_cost(passes=64)
        run.finish()
        return run.record


def test_images_and_reference_give_a_record_with_hashes_and_counts(place):
    save_png_dir(shapes.draw(N, 2)[0], place / "images")
    record = record_of(
        arsp("--images", place / "images", "--reference", "ref.npz", "--metric", "fid,kid,is,prc,acc", "--json", "bootstrap=20")
    )
    assert set(values(record)) == {"fid", "kid", "is", "precision", "recall", "f_score", "color_accuracy", "render_error"}
    assert record["command"] == "evaluate" and record["status"] == "ok" and all(m["n"] == N for m in record["metrics"])
    fid = record["metrics"][0]
    assert len(fid["reference_sha256"]) == len(fid["features_sha256"]) == 64 and fid["comparable"] is False and len(fid["ci95"]) == 2
    stored = json.loads((place / record["run_dir"] / "run.json").read_text())
    assert stored["id"] == record["id"] and (place / record["run_dir"] / "grid.png").is_file()


def test_a_piped_sample_record_keeps_its_stack_cost_grid_and_parent(place):
    parent = sample_run(place)
    record = record_of(arsp("-", "--reference", "ref.npz", "--metric", "fid,acc", "--json", stdin=json.dumps(parent)))
    assert record["parents"] == [parent["id"]] and record["stack"] == parent["stack"] and record["cost"]["passes"] == 64
    assert record["cost"]["batch_size"] == 16, "the batch size that the costs were measured at, not the one of this command"
    kinds = {a["kind"]: a["path"] for a in record["artifacts"]}
    assert set(kinds) == {"image-dir", "grid"} and all(path.startswith("/") for path in kinds.values()), kinds
    assert values(record)["class_accuracy"] == 1.0, "labels.json of the sample run belongs to its images"
    again = record_of(arsp("-", "--reference", "ref.npz", "--json", stdin=json.dumps(record)))
    assert values(again)["fid"] == pytest.approx(values(record)["fid"]), "an evaluation's record can be evaluated again"


def test_run_directory_record_file_and_newest_run_are_the_same_target(place):
    parent = sample_run(place)
    run_dir = parent["run_dir"]
    found = [record_of(arsp(*target, "--reference", "ref.npz", "--json")) for target in ((run_dir,), (f"{run_dir}/run.json",), ())]
    assert all(r["parents"] == [parent["id"]] for r in found)
    assert len({values(r)["fid"] for r in found}) == 1, [values(r) for r in found]


def test_a_newest_run_whose_images_are_gone_is_passed_over(place):
    kept = sample_run(place)
    gone = sample_run(place, n=4, name="other")
    shutil.rmtree(f"{gone['run_dir']}/images")
    assert record_of(arsp("--reference", "ref.npz", "--metric", "acc", "--json"))["parents"] == [kept["id"]]


def test_without_any_run_the_embedded_teacher_is_sampled(place, monkeypatch):
    calls = []

    def sample_images(model, num, seed, **options):
        calls.append((model, num, seed, options))
        x, attrs = shapes.draw(N, 3)
        return x, attrs["shape"].tolist(), {"name": "llamagen", "dataset": "shapes32"}, {"passes": 16}

    monkeypatch.setattr("arsp.stack.sample_images", sample_images)
    monkeypatch.setattr("arsp.stack.check", lambda recipe: STAND_IN)
    record = record_of(result := arsp("--reference", "ref.npz", "--metric", "fid,acc", "--cfg", "1.5", "--seed", "7", "--json"))
    assert calls[0][:3] == ("llamagen", 1000, 7) and calls[0][3]["cfg"] == 1.5 and calls[0][3]["top_k"] is None, calls
    assert "embedded teacher" in result.stderr
    assert values(record)["class_accuracy"] == 1.0 and {a["kind"] for a in record["artifacts"]} == {"npz", "grid"}


def test_one_sample_or_a_foreign_reference_is_refused_before_sampling(place, monkeypatch):
    monkeypatch.setattr("arsp.stack.check", lambda recipe: STAND_IN)
    monkeypatch.setattr("arsp.stack.sample_images", lambda **options: pytest.fail("sampled before everything was checked"))
    save_npz(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), place / "big.npz")
    for words, expected in (
        (["--num", "1"], "at least 2"),
        (["--reference", "big.npz"], "64x64"),
        (["--reference", "no.npz"], "does not exist"),
    ):
        result = arsp("llamagen", *words)
        assert result.exit_code == 4 and expected in result.stderr and not (place / "runs").exists(), result.stderr


def test_labels_follow_file_numbers_and_survive_a_subset(place):
    x, attrs = shapes.draw(N, 4)
    keep = list(range(0, N, 2))
    save_png_dir(x[keep], place / "half", keep)
    (place / "half" / "labels.json").write_text(json.dumps(attrs["shape"].tolist()))
    record = record_of(arsp("half", "--metric", "acc", "--num", "7", "--json"))
    assert values(record)["class_accuracy"] == 1.0 and record["metrics"][0]["n"] == 7


def test_npz_labels_are_used_and_wrong_ones_are_seen(place):
    x, attrs = shapes.draw(N, 5)
    save_npz(x, place / "x.npz", ((attrs["shape"] + 1) % 10).tolist())
    assert values(record_of(arsp("x.npz", "--metric", "acc", "--json")))["class_accuracy"] == 0.0


def test_a_gate_turns_the_exit_code_to_7_after_printing_the_record(place):
    save_npz(shapes.draw(N, 2)[0], place / "x.npz")
    result = arsp("x.npz", "--reference", "ref.npz", "--json", "--fail-if", "fid>0")
    assert result.exit_code == 7 and json.loads(result.stdout)["metrics"][0]["name"] == "fid"


def bad_cases():
    one, big = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    return {
        "missing folder": (["nowhere/here"], None, 4, "does not exist"),
        "missing npz": (["none.npz"], None, 4, "does not exist"),
        "one image": (["one.npz"], one, 4, "at least 2"),
        "other size": (["big.npz"], big, 4, "weights-inception"),
        "other size, toy features": (["big.npz", "--features", "shapes-cnn-v1"], big, 4, "reads 32x32"),
        "acc on other size": (["big.npz", "--metric", "acc"], big, 4, "embedded set"),
        "more than there are": (["ref.npz", "--num", "41"], None, 4, "holds 40 images"),
        "prc of few": (["few.npz", "--metric", "prc", "--reference", "ref.npz"], one.repeat(3, 1, 1, 1), 4, "more than 3"),
        "unknown metric": (["ref.npz", "--metric", "fud"], None, 3, "unknown metric 'fud'"),
        "unknown features": (["ref.npz", "--features", "shapes-cnn"], None, 3, "shapes-cnn-v1"),
        "unknown reference": (["ref.npz", "--reference", "shapes"], None, 3, "shapes32"),
        "missing reference": (["ref.npz", "--reference", "gone.npz"], None, 4, "does not exist"),
        "missing inception": (["ref.npz", "--inception-weights", "w.pth"], None, 4, "weights-inception"),
        "uncached inception": (["ref.npz", "--features", "inception"], None, 4, "weights-inception"),
        "two targets": (["ref.npz", "--images", "ref.npz"], None, 2, "one of them"),
        "empty stdin": (["-"], None, 4, "empty"),
        "record without images": (["empty.json"], None, 4, "has no images"),
        "unfinished run": (["running.json"], None, 4, "not finished"),
        "unknown model": (["lamagen"], None, 3, "llamagen"),
        "sampling options for images": (["ref.npz", "--cfg", "2"], None, 2, "is not sampled here"),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_gives_one_message_its_exit_code_and_leaves_no_run(place, name):
    words, images, code, expected = bad_cases()[name]
    if images is not None:
        save_npz(images, place / words[0])
    base = {"schema": 1, "command": "sample", "id": "s", "artifacts": []}
    (place / "empty.json").write_text(json.dumps(base | {"status": "ok"}))
    (place / "running.json").write_text(json.dumps(base | {"status": "running"}))
    result = arsp(*words, stdin="")
    assert result.exit_code == code, f"exit {result.exit_code}, expected {code}: {result.stderr}"
    assert expected in result.stderr and "Traceback" not in result.stderr and result.stderr.count("error:") == 1, result.stderr
    assert result.stdout == "" and not (place / "runs").exists(), "bad input must leave nothing behind"


def test_dry_run_measures_nothing(place):
    result = arsp("ref.npz", "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["plan"]["evaluate"] == "ref.npz"
    assert not (place / "runs").exists()
