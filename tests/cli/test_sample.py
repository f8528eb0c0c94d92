import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from command_line import invoke, record_of, refused
from PIL import Image

from arsp import stack as stacks
from arsp.models.llamagen import GPT
from arsp.zoo import bundle


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(stacks, "cache_root", lambda: tmp_path / "cache")
    tiny_models.student_bundle(tmp_path / "student", tiny_models.teacher_bundle(tmp_path / "teacher"))
    return tmp_path


def arsp(*words):
    return invoke("sample", *words)


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted((Path(folder) / "images").glob("*.png"))}


def equal(a, b, levels=0):
    assert a.keys() == b.keys(), f"{len(a)} images against {len(b)}"
    gap = max(int(np.abs(a[name].astype(int) - b[name].astype(int)).max()) for name in a)
    assert gap <= levels, f"images differ by {gap} levels, allowed {levels}"


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def test_a_run_leaves_images_labels_grid_and_a_complete_record(place):
    record = record_of(arsp("--model", "teacher", "--num", 5, "--json", "-q"))
    run = Path(record["run_dir"])
    assert record["status"] == "ok" and record["stack"]["model"] == "teacher" and record["seed"] == 0
    assert sorted(pixels(run)) == [f"{i:06d}.png" for i in range(5)]
    labels = json.loads((run / "labels.json").read_text())
    assert len(labels) == 5 and set(labels) <= {0, 1, 2}
    assert [(a["kind"], a["path"]) for a in record["artifacts"]] == [("image-dir", "images"), ("grid", "grid.png")]
    assert record["cost"]["passes"] == 16 and record["cost"]["images_per_s"] > 0 and record["cost"]["kv_bytes"] > 0
    assert json.loads((run / "run.json").read_text()) == record


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_images_do_not_depend_on_the_batch_size_or_on_how_many_are_made(place, model):
    arsp("--model", model, "--num", 7, "--seed", 5, "--out", "a", "--batch-size", 7, "-q")
    arsp("--model", model, "--num", 7, "--seed", 5, "--out", "b", "--batch-size", 3, "-q")
    arsp("--model", model, "--num", 4, "--seed", 5, "--out", "c", "--batch-size", 1, "-q")
    arsp("--model", model, "--num", 7, "--seed", 6, "--out", "d", "-q")
    equal(pixels("a"), pixels("b"), levels=1)
    equal({k: v for k, v in pixels("a").items() if k < "000004"}, pixels("c"), levels=1)
    assert any((pixels("a")[name] != pixels("d")[name]).any() for name in pixels("a")), "the seed has no effect"


def test_two_steps_of_a_student_and_its_teacher_in_the_loop_are_other_images(place):
    for name, options in {"one": [], "two": ["--student-steps", 2], "loop": ["--teacher-range", "1-9"]}.items():
        record = record_of(arsp("--model", "student", "--num", 4, "--out", name, "--json", *options))
        assert record["cost"]["passes"] == {"one": 1, "two": 2, "loop": 9}[name]
    images = [np.stack(list(pixels(name).values())) for name in ("one", "two", "loop")]
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_the_torch_stream_is_reproducible_and_differs_from_the_keyed_one(place):
    for name in ("a", "b"):
        record_of(arsp("--model", "teacher", "--rng", "torch", "--num", 6, "--batch-size", 4, "--out", name, "--json"))
    record_of(arsp("--model", "teacher", "--num", 6, "--batch-size", 4, "--out", "keyed", "--json"))
    equal(pixels("a"), pixels("b"))
    assert any((pixels("a")[name] != pixels("keyed")[name]).any() for name in pixels("a"))


NUM = 200
SLOW = ["--model", "teacher", "--num", NUM, "--batch-size", 1, "--seed", 3, "--json", "--out"]  # one image at a time


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ARSP_KERNELS": "reference", "OMP_NUM_THREADS": "1"}


def stop_midway(number, environment, folder):
    """Start the command in a process of its own and send it a signal once its fifth image is there."""
    command = [sys.executable, "-m", "arsp", "sample", *map(str, SLOW), str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (folder / "images" / "000004.png").exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_continues_to_the_same_images(place, environment, number, code):
    returned, out, err = stop_midway(number, environment, place / "stopped")
    made = len(pixels("stopped"))
    assert returned == code and out == "" and "Traceback" not in err, f"exit {returned}: {err}"
    assert 5 <= made < NUM, f"{made} of {NUM} images were made before the stop"
    status = json.loads((place / "stopped" / "run.json").read_text())["status"]
    assert status == ("running" if number == signal.SIGKILL else "interrupted")
    changed = {p: p.stat().st_mtime_ns for p in (place / "stopped" / "images").glob("*.png")}
    record = record_of(arsp(*SLOW, place / "stopped"))
    assert record["status"] == "ok" and "error" not in record
    remade = [p.name for p, at in changed.items() if p.stat().st_mtime_ns != at]
    assert not remade, f"made again: {remade}"
    record_of(arsp("--model", "teacher", "--num", NUM, "--seed", 3, "--json", "--out", "whole"))
    equal(pixels("stopped"), pixels("whole"), levels=1)


def test_a_finished_run_is_not_made_again(place, monkeypatch):
    first = record_of(arsp("--model", "teacher", "--num", 3, "--json"))
    monkeypatch.setattr(GPT, "backbone", lambda *a: pytest.fail("sampled again"))
    again = record_of(arsp("--model", "teacher", "--num", 3, "--grid", "later.png", "--json"))
    assert again == first and (place / "later.png").read_bytes() == (Path(first["run_dir"]) / "grid.png").read_bytes()


def test_no_resume_starts_over(place):
    first = record_of(arsp("--model", "teacher", "--num", 3, "--json"))
    again = record_of(arsp("--model", "teacher", "--num", 3, "--no-resume", "--json"))
    assert again["id"] != first["id"] and again["run_dir"] == first["run_dir"]
    assert again["artifacts"][0]["sha256"] == first["artifacts"][0]["sha256"]


def test_another_configuration_in_the_same_directory_is_refused(place):
    record_of(arsp("--model", "teacher", "--num", 2, "--out", "a", "--json"))
    before = files_below("a")
    refused(arsp("--model", "teacher", "--num", 3, "--out", "a"), 8, "num: 2 there, 3 here", "--out")
    assert files_below("a") == before


def test_weights_that_changed_since_the_images_were_made_are_noticed(place, monkeypatch):
    first = record_of(arsp("--model", "teacher", "--num", 3, "--json"))
    before = pixels(first["run_dir"])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_models, "gpt_model", lambda: tiny_models._noisy(GPT(tiny_models.GPT_CONFIG), 9))
        tiny_models.teacher_bundle(place / "teacher")
    refused(arsp("--model", "teacher", "--num", 3), 8, "other weights", "--no-resume")
    equal(pixels(first["run_dir"]), before)
    again = record_of(arsp("--model", "teacher", "--num", 3, "--no-resume", "--json"))
    assert again["stack"]["weights_sha256"] != first["stack"]["weights_sha256"]


def test_a_directory_with_other_contents_is_not_written_into(place):
    (place / "photos").mkdir()
    (place / "photos" / "me.png").write_bytes(b"x")
    refused(arsp("--model", "teacher", "--out", "photos"), 4, "photos")
    assert files_below("photos") == ["me.png"]


def test_classes_are_given_by_id_or_name_and_used_in_turn(place):
    record = record_of(arsp("--model", "teacher", "--class", "cat", "--class", 0, "--num", 5, "--json"))
    assert json.loads((Path(record["run_dir"]) / "labels.json").read_text()) == [2, 0, 2, 0, 2]
    assert record["config"]["classes"] == [2, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [("99", "classes 0..2"), ("-1", "classes 0..2"), ("bea", "Did you mean: bee"), ("--3", "no such class"), ("²", "no such class")],
)
def test_an_unknown_class_is_a_usage_error(place, text, words):
    refused(arsp("--model", "teacher", f"--class={text}"), 2, words)
    assert not (place / "runs").exists()


def test_a_class_from_a_configuration_file_is_checked_too(place):
    (place / "c.yaml").write_text("classes: [7]\nstack: {model: teacher}\n")
    refused(arsp("-c", "c.yaml"), 2, "--class 7")


def test_the_classes_are_listed_as_one_json_document(place):
    assert record_of(arsp("--model", "teacher", "--list-classes", "--json")) == {"model": "teacher", "classes": tiny_models.CLASSES}
    table = arsp("--model", "student", "--list-classes")
    assert table.exit_code == 0 and all(name in table.stdout for name in tiny_models.CLASSES)
    assert not (place / "runs").exists()


def test_classes_without_names_are_numbers(place):
    tiny_models.teacher_bundle(place / "plain", classes=None)
    assert record_of(arsp("--model", "plain", "--list-classes", "--json"))["classes"] == ["0", "1", "2"]


def test_a_dry_run_writes_nothing_and_reads_no_weights(place, monkeypatch):
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    before = files_below(place)
    plan = record_of(arsp("--model", "teacher", "--num", 4, "--class", "bee", "--dry-run", "--json"))["plan"]
    assert plan["sample"] == 4 and plan["classes"] == [1] and plan["stack"]["model"] == "teacher"
    assert files_below(place) == before


def test_the_printed_configuration_runs_the_same_images(place):
    printed = arsp("--model", "teacher", "--num", 3, "--seed", 9, "--cfg", 2.5, "--print-config")
    assert printed.exit_code == 0
    (place / "again.yaml").write_text(printed.stdout)
    a = record_of(arsp("--model", "teacher", "--num", 3, "--seed", 9, "--cfg", 2.5, "--json"))
    assert record_of(arsp("-c", "again.yaml", "--json"))["id"] == a["id"], "another run directory"


def test_an_npz_holds_the_images_as_adm_expects_and_comes_back_when_deleted(place):
    record = record_of(arsp("--model", "student", "--num", 5, "--out", "deep/x.npz", "--json"))
    entry = next(a for a in record["artifacts"] if a["kind"] == "npz")
    with np.load(place / "deep" / "x.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3) and labels.shape == (5,)
    made = pixels(record["run_dir"])
    assert all((images[i] == made[f"{i:06d}.png"]).all() for i in range(5))
    digest = lambda: hashlib.sha256((place / "deep" / "x.npz").read_bytes()).hexdigest()
    assert digest() == entry["sha256"]
    (place / "deep" / "x.npz").unlink()
    record_of(arsp("--model", "student", "--num", 5, "--out", "deep/x.npz", "--json"))
    with np.load(place / "deep" / "x.npz") as archive:
        assert (archive["arr_0"] == images).all()


def test_an_output_that_is_neither_folder_nor_npz_is_a_usage_error(place):
    refused(arsp("--model", "teacher", "--out", "x.png"), 2, "--grid")


def test_the_grid_has_the_asked_columns_and_at_most_the_asked_images(place):
    record_of(arsp("--model", "teacher", "--num", 7, "--grid", "sub/g.png", "--json", "grid_columns=3", "grid_images=6"))
    assert Image.open(place / "sub" / "g.png").size == (3 * 8 + 2 * 2, 2 * 8 + 2)


def test_resizing_and_half_precision_run(place):
    record = record_of(
        arsp("--model", "student", "--num", 2, "--image-size", 12, "--dtype", "bfloat16", "--student-steps", 2, "--split", 7, "--json")
    )
    assert all(image.shape == (12, 12, 3) for image in pixels(record["run_dir"]).values())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "lamagen"], 3, "Did you mean: llamagen"),
        (["--model", "runs/none"], 4, "no such file"),
        (["--model", "teacher", "--student-steps", 2], 3, "--student-steps"),
        (["--model", "student", "--baseline", "mode"], 3, "--baseline"),
        (["--model", "student", "--cfg", 2], 3, "--cfg"),
        (["--model", "student", "--student-steps", 3], 3, "student_steps"),
        (["--model", "teacher", "--rng", "numpy"], 3, "rng"),
        (["--model", "teacher", "--baseline", "skip-99"], 3, "skip-N"),
        (["--model", "teacher", "--num", 0], 3, "num"),
        (["--model", "teacher", "--num", -4], 3, "num"),
        (["--model", "teacher", "--batch-size", 0], 2, "--batch-size"),
        (["--model", "teacher", "--seed", -1], 2, "--seed"),
        (["--model", "teacher", "--seed", 1 << 64], 2, "--seed"),
        (["--model", "teacher", "--top-p", 1.2], 3, "top_p"),
        (["--model", "teacher", "--temperature", "nan"], 3, "temperature"),
        (["--model", "teacher", "--cfg", "inf"], 3, "guidance scale"),
        (["--model", "teacher", "--device", "cuda:7"], 5, "cuda"),
        (["--model", "teacher", "stack.topk=3"], 3, "top_k"),
        (["--model", "teacher", "nmu=3"], 3, "num"),
        (["-c", "none.yaml"], 4, "none.yaml"),
    ],
)
def test_bad_input_ends_in_its_exit_code_and_one_message(place, words, code, said):
    refused(arsp(*words), code, said)
    assert code == 5 or not (place / "runs").exists()


def test_seeds_up_to_64_bits_are_seeds_of_their_own(place):
    images = {}
    for seed in (0, 1 << 32, (1 << 63) + 1, (1 << 64) - 1):
        record = record_of(arsp("--model", "teacher", "--num", 4, "--seed", seed, "--json"))
        images[seed] = np.stack(list(pixels(record["run_dir"]).values())).tobytes()
        record_of(arsp("--model", "teacher", "--num", 2, "--seed", seed, "--rng", "torch", "--json"))
    assert len(set(images.values())) == 4


def test_damaged_weights_fail_the_run_without_an_image(place):
    (place / "teacher" / "model.safetensors").write_bytes(b"nothing")
    refused(arsp("--model", "teacher", "--out", "a"), 4, "damaged")
    assert json.loads((place / "a" / "run.json").read_text())["status"] == "failed" and not pixels("a")


def test_a_tokenizer_or_a_text_model_cannot_be_sampled(place):
    tiny_models.tokenizer_bundle(place / "tok")
    refused(arsp("--model", "tok"), 3, "tokenizer")
    refused(arsp("--model", "llamagen-t2i-xl-256"), 3)


def test_the_embedded_teacher_and_student_run_bare(place):
    for options, tokens in (([], 16), (["--model", "llamagen-dd1"], 16)):
        record = record_of(arsp("--num", 2, "--json", *options))
        assert record["stack"]["origin"] == "embedded" and record["stack"]["num_tokens"] == tokens
        assert all(image.shape == (32, 32, 3) for image in pixels(record["run_dir"]).values())


def test_a_run_survives_torch_being_asked_for_one_thread(place):
    before = torch.get_num_threads()
    try:
        record_of(arsp("--model", "teacher", "--num", 1, "--threads", 1, "--json"))
    finally:
        torch.set_num_threads(before)
