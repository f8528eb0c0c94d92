"""``arsp bench loop``: passes with a forced number of accepted drafts."""

import pytest
from command_line import invoke, record_of, refused


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path))


def test_the_record_has_the_share_of_every_mode_and_the_pattern_asked_for():
    words = "--mode seeded --mode sjd --window 4 --accepted 0:1,2:1 --passes 6 --json".split()
    metrics = record_of(invoke("bench", "loop", *words))["metrics"]
    assert [metric["mode"] for metric in metrics] == ["seeded", "sjd"]
    for metric in metrics:
        assert metric["tokens_per_pass"] == pytest.approx(2, abs=0.5), "0 and 2 drafts stand in turn, fewer at the end"
        assert 0 < metric["value"] < 1 and metric["forward_s"] < metric["pass_s"]
    seeded, sjd = (metric["state_bytes"] for metric in metrics)
    assert seeded == 0 and 0 < sjd <= metrics[1]["state_bound"] + 5 * 16


def test_a_default_pattern_fits_any_window():
    assert invoke("bench", "loop", "--mode", "seeded", "--window", "1", "--passes", "4").exit_code == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mode", "pac"], "Jacobi drafts only"),
        (["--mode", "ar"], "Jacobi drafts only"),
        (["--accepted", "0"], "N:TIMES"),
        (["--window", "2", "--accepted", "3:1"], "cannot stand"),
        (["--model", "var"], "take codes back"),
    ],
)
def test_what_cannot_be_timed_is_one_clear_error(options, words):
    refused(invoke("bench", "loop", *options, "--passes", "4"), 3, words)
