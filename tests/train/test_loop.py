import json

import pytest
import torch
from torch import nn

from arsp import runs
from arsp.errors import InputError, Interrupted, NumericalError
from arsp.train import checkpoint
from arsp.train.loop import OptimConfig, Task, fit, learning_rate

CONFIG = OptimConfig(steps=12, batch_size=4, lr=0.05, warmup=3, ema=0.9, eval_every=5, checkpoint_every=4, autocast="off", seed=7)


class Toy(Task):
    """A linear regression with dropout (torch's global generator) and a buffer outside the trained module."""

    def __init__(self, poison_at=None, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(3))
        self.poison_at, self.fail_at, self.evaluated = poison_at, fail_at, 0

    def loss(self, step, batch_size, generator):
        if step == self.fail_at:
            raise KeyboardInterrupt
        x = torch.randn(batch_size, 3, generator=generator)
        self.seen += x.detach().sum(0)
        error = (self.trained(x) - x.sum(-1, keepdim=True)).square().mean()
        return {"loss": error * (float("nan") if step == self.poison_at else 1.0), "seen": self.seen.sum()}

    def evaluate(self, module):
        self.evaluated += 1
        assert not module.training
        return {"weight": float(module[0].weight.sum())}


def weights(task):
    return {key: value.clone() for key, value in task.state_dict().items()}


def same(a, b):
    unequal = [key for key in a if not torch.equal(a[key], b[key])]
    assert not unequal, f"{unequal} differ by {max(float((a[k] - b[k]).abs().max()) for k in unequal)}"


def figures(state):
    return [{k: v for k, v in point.items() if k != "minutes"} for point in state["history"]]


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stops", [[2], [4], [5], [11], [1, 4, 6, 9]])
def test_a_run_that_dies_anywhere_continues_to_the_same_weights_and_figures(tmp_path, stops, ema):
    config = CONFIG.model_copy(update={"ema": ema})
    whole = Toy()
    expected = fit(whole, config, tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            fit(Toy(fail_at=stop), config, tmp_path / "parts")
    task = Toy()
    state = fit(task, config, tmp_path / "parts")
    same(weights(whole), weights(task))
    assert figures(state) == figures(expected)
    assert [point["step"] for point in state["history"]] == [5, 10, 12]


def test_a_stop_request_saves_the_step_it_stands_at(tmp_path, monkeypatch):
    whole, asked = Toy(), []
    fit(whole, CONFIG, tmp_path / "whole")
    monkeypatch.setattr(runs._Stop, "depth", 1)
    stop = lambda n: asked.append(n) or (len(asked) == 7 and monkeypatch.setattr(runs._Stop, "requested", 15))
    with pytest.raises(Interrupted) as caught:
        fit(Toy(), CONFIG, tmp_path / "parts", progress=stop)
    assert caught.value.exit_code == 143
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["00000004", "00000007"]
    monkeypatch.setattr(runs._Stop, "requested", None)
    said, task = [], Toy()
    fit(task, CONFIG, tmp_path / "parts", log=said.append)
    assert said[0] == "resumed at step 7 of 12"
    same(weights(whole), weights(task))


def test_a_finished_run_is_restored_without_work(tmp_path):
    first = Toy()
    fit(first, CONFIG, tmp_path)
    again = Toy(fail_at=12)
    fit(again, CONFIG, tmp_path)
    same(weights(first), weights(again))
    assert again.evaluated == 0


def test_the_average_is_what_is_evaluated_and_returned(tmp_path):
    task = Toy()
    state = fit(task, CONFIG, tmp_path)
    from safetensors.torch import load_file

    raw = load_file(tmp_path / "checkpoints" / "00000012" / "task.safetensors")["trained.0.weight"]
    average = load_file(tmp_path / "checkpoints" / "00000012" / "average.safetensors")["0.weight"]
    assert torch.equal(task.trained[0].weight, average) and not torch.equal(raw, average)
    assert state["history"][-1]["weight"] == pytest.approx(float(average.sum()), abs=1e-5)


def test_divergence_stops_with_the_last_checkpoint_kept(tmp_path):
    with pytest.raises(NumericalError) as caught:
        fit(Toy(poison_at=6), CONFIG, tmp_path)
    assert "step 6" in caught.value.message and "optim.lr" in caught.value.hint
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000004"]
    task, whole = Toy(), Toy()
    fit(task, CONFIG, tmp_path)
    fit(whole, CONFIG, tmp_path / "whole")
    same(weights(whole), weights(task))


def test_only_the_newest_checkpoints_stay(tmp_path):
    fit(Toy(), CONFIG.model_copy(update={"checkpoint_every": 2, "keep": 3}), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000008", "00000010", "00000012"]


def test_no_steps_at_all_leave_the_start(tmp_path):
    state = fit(task := Toy(), CONFIG.model_copy(update={"steps": 0}), tmp_path)
    same(weights(task), weights(Toy()))
    assert state["step"] == 0 and state["history"] == []


@pytest.mark.parametrize("name", ["task.safetensors", "optimizer.safetensors", "average.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_an_input_error_that_says_what_to_delete(tmp_path, name, damage):
    fit(Toy(), CONFIG, tmp_path)
    file = tmp_path / "checkpoints" / "00000012" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(InputError) as caught:
        fit(Toy(), CONFIG, tmp_path)
    assert name in caught.value.message and f"Delete {file.parent}" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": {}, "sha256": {}}'])
def test_a_damaged_checkpoint_state_is_an_input_error(tmp_path, text):
    fit(Toy(), CONFIG, tmp_path)
    (tmp_path / "checkpoints" / "00000012" / "state.json").write_text(text)
    with pytest.raises(InputError, match="state.json") as caught:
        fit(Toy(), CONFIG, tmp_path)
    assert "Delete" in caught.value.hint


def test_after_deleting_a_damaged_checkpoint_the_one_before_it_serves(tmp_path):
    import shutil

    whole, task = Toy(), Toy()
    fit(whole, CONFIG, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "00000012")
    fit(task, CONFIG, tmp_path)
    same(weights(whole), weights(task))


def test_a_checkpoint_that_was_not_finished_is_invisible(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_json", lambda path, obj: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fit(Toy(), CONFIG, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "00000099").mkdir(parents=True)
    assert fit(Toy(), CONFIG, tmp_path)["step"] == 12


def test_a_checkpoint_says_what_it_holds(tmp_path):
    fit(Toy(), CONFIG, tmp_path)
    saved = json.loads((tmp_path / "checkpoints" / "00000012" / "state.json").read_text())
    assert saved["state"]["step"] == 12 and set(saved["sha256"]) == {"task.safetensors", "optimizer.safetensors", "average.safetensors"}


def test_the_learning_rate_warms_up_and_ends_at_its_share():
    for schedule in ("cosine", "flat-linear"):
        config = OptimConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1, schedule=schedule)
        rates = [learning_rate(config, step) for step in range(101)]
        assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
        assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)), schedule
