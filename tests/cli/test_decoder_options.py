"""The tokenizer's decoder on the command line: options of ``arsp sample`` and ``arsp eval``, settings of a stack of ``arsp bench``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_var
from command_line import invoke, record_of, refused
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llamagen", "var"])
def teacher(request, tmp_path, monkeypatch):
    """A tiny teacher of each family in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARSP_RUNS", str(tmp_path / "runs"))
    (tiny_models if request.param == "llamagen" else tiny_var).teacher_bundle(tmp_path / "teacher")
    return "teacher"


def sample(*words):
    return record_of(invoke("sample", "--model", "teacher", "--num", 5, "--json", "-q", *words))


def pixels(record):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((Path(record["run_dir"]) / "images").glob("*.png"))]).astype(int)


def test_options_of_sample(teacher):
    plain = sample()
    assert "decoder" not in plain["stack"]
    low = sample("--decoder-dtype", "bfloat16", "--decoder-chunk", 2, "--decoder-contiguous")
    assert low["stack"]["decoder"] == {"dtype": "bfloat16", "chunk": 2, "channels_last": False}
    assert low["run_dir"] != plain["run_dir"] and low["stack"]["name"] == "teacher + bfloat16 decoder"
    gap = np.abs(pixels(plain) - pixels(low))
    assert 0 < gap.max() <= 6, f"largest gap {gap.max()} levels: 0 would mean that the option was not heard"
    same = sample("--decoder-channels-last", "--decoder-chunk", 1)
    assert np.abs(pixels(plain) - pixels(same)).max() <= 1


def test_a_decoder_of_a_file_of_settings_is_that_of_the_options(teacher, tmp_path):
    (tmp_path / "low.yaml").write_text("stack: {model: teacher, decoder_dtype: bfloat16}\nnum: 5\n")
    from_file = record_of(invoke("sample", "-c", "low.yaml", "--json", "-q"))
    assert from_file["run_dir"] == sample("--decoder-dtype", "bfloat16")["run_dir"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoder-dtype", "int8"], "decoder_dtype"),
        (["--decoder-chunk", 0], "decoder_chunk"),
        (["stack.decoder_dtypes=bfloat16"], "decoder_dtype"),
    ],
)
def test_impossible_decoders_are_refused(teacher, words, message):
    refused(invoke("sample", "--model", "teacher", *words), 3, message)


def test_bench_times_the_decoder_that_was_asked_for(teacher):
    words = [
        "bench",
        "--compare",
        "teacher,decoder_dtype=bfloat16",
        "teacher,dtype=bfloat16",
        "--repeats",
        1,
        "--warmup",
        0,
        "--json",
        "-q",
    ]
    low, backbone = record_of(invoke(*words))["stacks"]
    assert low["stack"]["decoder"] == {"dtype": "bfloat16"} and low["stack"]["dtype"] == "float32"
    assert "decoder" not in backbone["stack"] and backbone["stack"]["dtype"] == "bfloat16"
    refused(invoke("bench", "teacher,decoder_chunk=2", "--no-decode", "--repeats", 1), 3, "decoder_chunk", "only codes are made")


def test_eval_samples_with_the_decoder_that_was_asked_for(teacher):
    plan = record_of(invoke("eval", "teacher", "--decoder-dtype", "bfloat16", "stack.decoder_chunk=2", "--dry-run", "--json"))["plan"]
    assert plan["stack"] == {"decoder_dtype": "bfloat16", "decoder_chunk": 2}
    refused(invoke("eval", "teacher", "--decoder-dtype", "int8"), 3, "decoder_dtype")
