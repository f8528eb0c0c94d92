"""Schedules as text: what is parsed, what is refused, and what ``--dry-run`` prints."""

from __future__ import annotations

import pytest

from arsp.decode.schedule import ScaleRow, check_rows, describe_rows, load_schedule, parse_collab, parse_scales
from arsp.errors import ConfigError, InputError


def write(tmp_path, text: str) -> str:
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    return str(path)


def test_collab_names_two_models_and_the_hand_over():
    assert parse_collab("var:var-small@4", 6) == ("var", "var-small", 4)
    assert parse_collab("runs/a:b/c@1", 6) == ("runs/a", "b/c", 1)


@pytest.mark.parametrize("text", ["var", "var:var-small", "var@3", "var:small@x", ":small@2", "var:@2"])
def test_collab_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match="expected BIG:SMALL@N") as caught:
        parse_collab(text, 6)
    assert "var:var-small@4" in caught.value.hint


@pytest.mark.parametrize("count", [0, 6, 7])
def test_both_models_make_a_scale(count):
    with pytest.raises(ConfigError, match="1 <= N <= 5"):
        parse_collab(f"var:var-small@{count}", 6)


def test_scales_are_one_or_a_range():
    assert list(parse_scales("1-3", 6)) == [1, 2, 3] and list(parse_scales(5, 6)) == [5] and list(parse_scales("0-5", 6)) == list(range(6))


@pytest.mark.parametrize("text", ["6", "3-1", "0-6", "a", "-1", "1-", "1,2", ""])
def test_scales_that_the_model_does_not_have_are_refused(text):
    with pytest.raises(ConfigError, match="within 0-5"):
        parse_scales(text, 6)


def test_a_file_fills_the_rows_it_names(tmp_path):
    path = write(
        tmp_path, "- {scales: 4-5, model: var-small, cfg: off}\n- {scales: 2, attention: litevar=p, precision: bfloat16, depth: 3}\n"
    )
    rows = load_schedule(path, 6)
    assert rows[0] == rows[1] == rows[3] == ScaleRow()
    assert rows[4] == rows[5] == ScaleRow(model="var-small", cfg="off")
    assert rows[2] == ScaleRow(attention="litevar=p", precision="bfloat16", depth=3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- {scales: 1-2}\n- {scales: 2}\n", "scale 2 is named twice"),
        ("- {scales: 9}\n", "within 0-5"),
        ("- {scales: 1, modle: var}\n", "modle"),
        ("- {scales: 1, cfg: half}\n", "cfg"),
        ("- {scales: 1, depth: 0}\n", "depth"),
        ("- {scales: 1, precision: int8}\n", "precision"),
    ],
)
def test_entries_that_mean_nothing_are_refused(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        load_schedule(write(tmp_path, text), 6)


@pytest.mark.parametrize("text", ["scales: 1\n", "- {model: var}\n", "- 3\n", "[\n", ""])
def test_files_that_are_no_schedule_are_refused(tmp_path, text):
    with pytest.raises(InputError, match="schedule"):
        load_schedule(write(tmp_path, text), 6)
    with pytest.raises(InputError, match="cannot be read"):
        load_schedule(str(tmp_path / "missing.yaml"), 6)


def rows_of(**columns: list) -> list[ScaleRow]:
    names = list(columns)
    return [ScaleRow(**dict(zip(names, values, strict=True))) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (rows_of(cfg=["full", "off", "full"]), "the null half cannot come back"),
        (rows_of(cfg=["off", "shared"]), "the null half cannot come back"),
        (rows_of(cfg=["shared", "full"]), "keys were not stored"),
        (rows_of(depth=[1, None]), "scale 1 is deeper"),
        (rows_of(depth=[3, 2, 3]), "scale 2 is deeper"),
        (rows_of(model=["a", "b", "a"]), "a model comes back"),
    ],
)
def test_rows_that_read_what_nobody_computed_are_refused(rows, reason):
    with pytest.raises(ConfigError, match=reason):
        check_rows(rows)


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(cfg=["full", "shared", "shared", "off"]),
        rows_of(depth=[None, 3, 3, 2]),
        rows_of(model=["a", "a", "b"], depth=[1, 1, None], cfg=["shared", "shared", "full"]),
        rows_of(precision=["float32", "bfloat16", "float32"]),
    ],
)
def test_rows_that_find_what_they_read_are_accepted(rows):
    check_rows(rows)


def test_the_printed_schedule_has_no_empty_cells():
    rows = [ScaleRow(), ScaleRow(model="var-small", precision="bfloat16", cfg="off")]
    first, second = describe_rows(rows, (1, 2), "torch.float32", "var")
    assert first == {"scale": 0, "side": 1, "model": "var", "depth": None, "attention": "dense", "cfg": "full", "precision": "float32"}
    assert (second["model"], second["precision"], second["cfg"], second["side"]) == ("var-small", "bfloat16", "off", 2)
