"""The split of an image's time by part, with a clock that is moved by hand, and the parts that a real run meets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_var
from command_line import invoke, record_of, refused

from arsp.bench import compare, parts
from arsp.bench.parts import ADALN, DECODER, FFN, PARTS, REST, SOFTMAX, Clock, measure_parts, replaced
from arsp.errors import ConfigError
from arsp.models import var
from arsp.stack import StackConfig, build


class Hand:
    """A clock, and an owner of callables that take given times."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def spend(self, seconds):
        self.now += seconds

    def inner(self):
        self.spend(2.0)

    def outer(self):
        self.spend(1.0)
        self.inner()
        self.spend(3.0)

    def fails(self):
        self.spend(1.0)
        raise ValueError


def test_a_part_is_not_charged_for_the_parts_it_calls(monkeypatch):
    hand = Hand(monkeypatch)

    def work():
        hand.spend(0.5)
        hand.outer()
        hand.inner()

    entries = [(Hand, "outer", FFN), (Hand, "inner", SOFTMAX)]
    with replaced(entries, clock := Clock("cpu")):
        assert clock.measure(work) == {FFN: 4.0, SOFTMAX: 4.0, REST: 0.5}
    lines = measure_parts({"x": (work, entries)}, repeats=3, tick=lambda n: None)["x"]
    assert [line["part"] for line in lines] == list(PARTS)
    found = {line["part"]: (line["ms"], line["share"]) for line in lines}
    assert found[FFN] == found[SOFTMAX] == (4000.0, pytest.approx(4 / 8.5)) and found[ADALN] == (0.0, 0.0)


def test_callables_are_put_back_even_when_one_fails(monkeypatch):
    class Child(Hand):
        pass

    before, hand = dict(vars(Hand)), Child(monkeypatch)
    with pytest.raises(ValueError), replaced([(Child, "fails", FFN), (Hand, "inner", SOFTMAX)], Clock("cpu")):
        hand.fails()
    assert dict(vars(Hand)) == before and "fails" not in vars(Child)


def test_stacks_take_turns():
    calls, ticks = [], []
    work = {name: (lambda name=name: calls.append(name), ()) for name in "ab"}
    measure_parts(work, repeats=3, tick=ticks.append)
    assert "".join(calls) == "abbaab" and sum(ticks) == 6


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    bundle = tiny_var.teacher_bundle(tmp_path_factory.mktemp("bundles") / "teacher")
    return build(StackConfig(model=str(bundle)))


def test_every_part_of_ours_and_of_the_official_way_is_met(stack):
    settings = dict(num=3, batch_size=2, seed=0, decode=True)
    ours, official = compare.stack_contender("ours", stack, **settings), compare.eager_contender(stack, **settings)
    found = measure_parts({c.name: (c.work, c.parts) for c in (official, ours)}, repeats=1, tick=lambda n: None)
    for name, lines in found.items():
        assert all(line["ms"] > 0 for line in lines), f"{name}: {[line['part'] for line in lines if line['ms'] == 0]} not met"
        assert sum(line["share"] for line in lines) == pytest.approx(1.0)


def test_adaln_is_computed_once_a_batch_by_ours_and_at_every_scale_by_the_official_way(stack, monkeypatch):
    seen = []
    forward = var.Linear.forward
    monkeypatch.setattr(var.Linear, "forward", lambda self, x, **more: (seen.append((self, x.shape)), forward(self, x, **more))[1])
    compare.stack_contender("ours", stack, num=3, batch_size=3, seed=0, decode=False).work()
    once = [tuple(shape) for module, shape in seen if module.out_features == 6 * 16]
    assert once == [(4, 16)] * 2, "one product in each of two blocks, a row for each image and one for all their null halves"
    macs = {c.name: {part["name"]: part["macs"] for part in c.cost["macs_by_part"]} for c in contenders(stack)}
    assert macs[compare.EAGER]["ada_lin"] == 3 * macs["ours"]["ada_lin"]
    assert macs[compare.EAGER]["fc1"] == macs["ours"]["fc1"]


def contenders(stack, decode=True):
    settings = dict(num=1, batch_size=1, seed=0, decode=decode)
    return compare.eager_contender(stack, **settings), compare.stack_contender("ours", stack, **settings)


def test_macs_hold_the_decoder_only_where_it_is_timed(stack):
    for contender in contenders(stack, decode=False):
        assert "tokenizer decoder" not in [part["name"] for part in contender.cost["macs_by_part"]]
    for contender in contenders(stack, decode=True):
        assert contender.cost["macs"] == sum(part["macs"] for part in contender.cost["macs_by_part"])
        assert contender.cost["macs_by_part"][-1]["name"] == "tokenizer decoder"


@pytest.mark.parametrize("wrong", [{"temperature": 0.5}, {"top_h": 0.5}, {"more_smooth": True}])
def test_rules_that_the_official_loop_does_not_have_are_refused(stack, wrong):
    other = build(StackConfig(model=stack.config.model, **wrong))
    with pytest.raises(ConfigError, match="--baseline eager"):
        compare.eager_contender(other, num=1, batch_size=1, seed=0)


def test_record_of_bench_with_parts(stack):
    words = ["bench", stack.config.model, "--baseline", "eager", "--parts", "--repeats", 1, "--warmup", 0]
    record = record_of(invoke(*words, "--json"))
    lines = [metric for metric in record["metrics"] if metric["name"] == "part_ms"]
    assert {line["stack"] for line in lines} == {compare.EAGER, "teacher"} and len(lines) == 2 * len(PARTS)
    assert all("exclusive" in line["protocol"] and 0 <= line["share"] <= 1 for line in lines)
    assert next(line for line in lines if line["part"] == DECODER)["value"] > 0, "a baseline of a VAR makes images"
    assert record["stacks"][0]["cost"]["kv_bytes"] > record["stacks"][1]["cost"]["kv_bytes"] > 0
    table = invoke(*words).stdout
    assert all(part in table for part in PARTS), table


def test_parts_of_other_models_are_refused():
    refused(invoke("bench", "llamagen", "--parts", "--repeats", 1), 3, "cannot be split")
