import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import invoke, record_of, refused
from safetensors.torch import load_file

from arsp.distill import pipeline
from arsp.runs import sha256_file
from arsp.train import loop
from arsp.zoo import bundle, convert
from arsp.zoo.load import load_model, resolve

SMALL = [
    "trajectories.num=40",
    "trajectories.held_out=8",
    "trajectories.shard_size=16",
    "trajectories.batch_size=8",
    "trajectories.solver_steps=8",
    "optim.batch_size=8",
    "optim.warmup=2",
    "optim.eval_every=3",
    "optim.checkpoint_every=4",
    "optim.steps=9",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    tiny_models.student_bundle(tmp_path / "student", tiny_models.teacher_bundle(tmp_path / "teacher"))
    return tmp_path


def distill(out, *more, teacher="teacher"):
    return ["distill", "--teacher", teacher, "--out", out, "--json", *SMALL, *more]


def digest(out):
    return sha256_file(Path(out) / "bundle" / "model.safetensors")


def figures(record):
    return [(m["name"], m["value"]) for m in record["metrics"]]


class Dies(Exception):
    pass


def test_a_student_is_made_evaluated_and_sampled(place):
    record = record_of(invoke(*distill("fresh")))
    assert record["status"] == "ok" and record["stack"]["kind"] == "student"
    assert {"heldout_ce", "heldout_accuracy", "heldout_accuracy_t5", "heldout_ce_shuffled_noise"} <= {name for name, _ in figures(record)}
    assert len(record["curves"]["accuracy_by_position"]) == 16
    manifest = json.loads((place / "fresh" / "bundle" / "arsp.json").read_text())
    assert (manifest["kind"], manifest["known"], manifest["code_dim"], manifest["method"]) == ("student", [0, 5], 4, "dd1")
    assert manifest["parents"][0]["sha256"] == sha256_file(place / "teacher" / "model.safetensors")
    assert manifest["classes"] == tiny_models.CLASSES
    for steps in (1, 2):
        sample = record_of(invoke("sample", "--model", "fresh", "--student-steps", steps, "--num", 2, "--class", "cat", "--json", "-q"))
        assert sample["cost"]["passes"] == steps
    loop_record = record_of(invoke("sample", "--model", "fresh", "--teacher-range", "1-5", "--num", 2, "--json", "-q"))
    assert loop_record["cost"]["passes"] == 5


def test_a_student_of_one_step_knows_no_second(place):
    record_of(invoke(*distill("one", "--student-steps", 1, "optim.steps=1")))
    assert resolve("one").card["known"] == [0]
    refused(invoke("sample", "--model", "one", "--student-steps", 2), 3, "student steps")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_distillation_continues_to_the_same_weights(place, monkeypatch, ema):
    whole = record_of(invoke(*distill("whole", f"optim.ema={ema}")))
    calls, update = [], loop._update
    generate, shards = pipeline.generate_shards, []

    def dying_update(*arguments):
        calls.append(arguments[3])
        if len(calls) in (6, 8):
            raise Dies("killed")
        return update(*arguments)

    def dying_shards(*arguments, progress, **named):
        def advance(n):
            shards.append(n)
            if len(shards) == 3:  # in the middle of the second shard
                raise Dies("killed")
            progress(n)

        return generate(*arguments, progress=advance, **named)

    monkeypatch.setattr(loop, "_update", dying_update)
    monkeypatch.setattr(pipeline, "generate_shards", dying_shards)
    assert [invoke(*distill("parts", f"optim.ema={ema}")).exit_code for _ in range(3)] == [1, 1, 1]
    result = invoke(*distill("parts", f"optim.ema={ema}"))
    assert "resumed at step 4" in result.stderr and calls[5:8] == [5, 4, 5], calls
    again = record_of(result)
    assert digest("parts") == digest("whole") and figures(again) == figures(whole)
    raw, exported = load_file("parts/checkpoints/00000009/task.safetensors"), load_file("parts/bundle/model.safetensors")
    assert all(torch.equal(raw[f"trained.{key}"], value) for key, value in exported.items()) == (ema == 0)


@pytest.mark.parametrize(
    ("number", "code", "milestone"),
    [(signal.SIGTERM, 143, "checkpoints/00000004"), (signal.SIGINT, 130, "trajectories/shard-00000000-16.safetensors")],
)
def test_a_distillation_stopped_by_a_signal_continues_to_the_same_weights(place, number, code, milestone):
    long = ["optim.steps=300", "optim.eval_every=100", "optim.checkpoint_every=4", "trajectories.num=400"]
    command = [*distill("stopped", *long), "--threads", 1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "arsp", *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (place / "stopped" / milestone).exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and out == "" and "Traceback" not in err, err
    assert not (place / "stopped" / "bundle").exists()
    record = record_of(invoke(*command))
    whole = record_of(invoke(*distill("whole", *long)))
    assert digest("stopped") == digest("whole") and figures(record) == figures(whole)


def test_a_finished_distillation_is_not_repeated(place, monkeypatch):
    first = record_of(invoke(*distill("a", "optim.steps=1")))
    monkeypatch.setattr(bundle, "load_weights", lambda *a: pytest.fail("weights were read"))
    assert record_of(invoke(*distill("a", "optim.steps=1"))) == first


def test_a_damaged_shard_ends_in_one_message_and_is_made_again_when_deleted(place, monkeypatch):
    whole = record_of(invoke(*distill("whole")))
    monkeypatch.setattr(loop, "_update", lambda *a: (_ for _ in ()).throw(Dies("killed")))
    invoke(*distill("a"))
    monkeypatch.undo()
    os.chdir(place)
    shard = place / "a" / "trajectories" / "shard-00000016-16.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    refused(invoke(*distill("a")), 4, shard.name, "damaged", "Delete")
    shard.unlink()
    assert figures(record_of(invoke(*distill("a")))) == figures(whole) and digest("a") == digest("whole")


def test_a_teacher_that_changed_since_the_shards_were_made_is_noticed(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", lambda *a: (_ for _ in ()).throw(Dies("killed")))
        invoke(*distill("a"))
        patch.setattr(tiny_models, "gpt_model", lambda: tiny_models._noisy(tiny_models.GPT(tiny_models.GPT_CONFIG), 9))
        tiny_models.teacher_bundle(place / "teacher")
    refused(invoke(*distill("a")), 4, "another teacher_sha256")


def test_divergence_is_exit_6_and_exports_nothing(place):
    refused(invoke(*distill("a", "optim.lr=1e30", "optim.clip=1e30", "optim.warmup=0")), 6, "diverged")
    assert not (place / "a" / "bundle").exists()


def official_files(folder):
    vq = tiny_models.vq_model()
    torch.save({"model": tiny_models.gpt_model().state_dict()}, folder / "c2i_256.pt")
    torch.save({"ema": tiny_models.student_model().state_dict()}, folder / "llamagen-B.pt")
    torch.save({"model": vq.state_dict()}, folder / "vq.pt")


def test_official_files_are_distilled_and_sampled_with_their_tokenizer(place, monkeypatch):
    monkeypatch.setitem(convert._HEADS, (1, 16), 2)
    official_files(place)
    refused(invoke(*distill("a", teacher="c2i_256.pt")), 4, "--tokenizer")
    refused(invoke(*distill("a", "--tokenizer", "none.pt", teacher="c2i_256.pt")), 4, "none.pt")
    refused(invoke(*distill("b", teacher="llamagen-B.pt")), 3, "student")
    few = ["trajectories.num=4", "trajectories.held_out=2", "optim.steps=1", "optim.batch_size=2"]
    record_of(invoke(*distill("c", "--tokenizer", "vq.pt", *few, teacher="c2i_256.pt")))
    made = load_model("c")
    assert made.source.card["known"] == [0, 80] and made.tokenizer.config.codebook_size == 16
    record = record_of(
        invoke("sample", "--model", "llamagen-B.pt", "--tokenizer", "vq.pt", "--student-steps", 2, "--num", 2, "--json", "-q")
    )
    assert record["stack"]["kind"] == "student" and record["cost"]["passes"] == 2
    record = record_of(invoke("sample", "--model", "c2i_256.pt", "--tokenizer", "vq.pt", "--num", 1, "--json", "-q"))
    assert record["stack"]["cfg"] == 2.0
    refused(invoke("sample", "--model", "llamagen-B.pt", "--num", 1), 4, "--tokenizer")
    refused(invoke("sample", "--model", "c2i_256.pt", "--num", 1), 4, "--tokenizer")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--teacher", "student"], 3, "student"),
        (["--teacher", "llamagen-dd1"], 3, "student"),
        (["--teacher", "lamagen"], 3, "Did you mean: llamagen"),
        (["--teacher", "runs/none"], 4, "no such file"),
        (["--teacher", "llamagen-t2i-xl-256"], 3, "text-conditional"),
        (["--teacher", "llamagen-b-256"], 4, "c2i_B_256.pt"),
        (["--method", "dd9"], 3, "dd1"),
        (["--student-steps", 3], 3, "student_steps"),
        (["--student-steps", 0], 3, "student_steps"),
        (["--trajectories", 1], 3, "trajectories.num"),
        (["--trajectories", 500], 3, "trajectories.held_out"),
        (["--steps", -5], 3, "optim.steps"),
        (["--seed", 1 << 64], 3, "optim.seed"),
        (["trajectories.seed=-1"], 3, "trajectories.seed"),
        (["trajectories.top_p=0"], 3, "trajectories.top_p"),
        (["trajectories.solver=rk4"], 3, "trajectories.solver"),
        (["objective.known=[0,7]"], 3, "objective.known"),
        (["second_step_at=16"], 3, "student steps"),
        (["--tokenizer", "vq.pt"], 3, "--tokenizer"),
        (["trajectory.num=3"], 3, "trajectories"),
    ],
)
def test_bad_options_end_in_their_exit_code_and_one_message(place, words, code, said):
    teacher = [] if "--teacher" in words else ["--teacher", "teacher"]
    refused(invoke("distill", *teacher, *words), code, said)
    assert not list((place / "runs").glob("*/trajectories"))


def test_damaged_teachers_are_refused(place):
    (place / "teacher" / "model.safetensors").write_bytes(b"nothing")
    refused(invoke(*distill("a")), 4, "damaged")
    assert not (place / "a" / "trajectories").exists()


def test_another_configuration_in_the_same_directory_is_refused(place):
    record_of(invoke(*distill("a", "optim.steps=1")))
    refused(invoke(*distill("a", "optim.steps=2")), 8, "optim.steps")


def test_a_dry_run_shows_the_completed_plan_and_writes_nothing(place):
    before = sorted(place.rglob("*"))
    plan = record_of(invoke(*distill("a"), "--dry-run"))["plan"]
    assert plan["second_step_at"] == 5 and plan["objective"]["known"] == [0, 5]
    assert sorted(place.rglob("*")) == before


def test_the_configuration_of_a_record_runs_again(place):
    record = record_of(invoke(*distill("a", "optim.steps=1")))
    (place / "again.yaml").write_text(json.dumps(record["config"]))
    again = record_of(invoke("distill", "-c", "again.yaml", "--out", "a", "--json"))
    assert again["id"] == record["id"]
