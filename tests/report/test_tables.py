import csv
import io

import pytest

from arsp.errors import InputError
from arsp.report import tables


def table_of(*records):
    return tables.metric_table(tables.collect(records))


def metric(name, value, n=100, **more):
    return {"name": name, "value": value, "n": n, "protocol": "p", "reference_sha256": None, "comparable": True} | more


def test_rows_are_ordered_teacher_then_students_by_passes_then_controls_then_references(record):
    names = [
        ("llamagen-mode", 1),
        ("llamagen-dd1-1step", 1),
        ("reconstruction", None),
        ("llamagen", 16),
        ("llamagen-dd1-2step", 2),
        ("sjd", 9),
    ]
    stacks = tables.collect([record(name, fid=1.0, passes=passes) for name, passes in names])
    assert [s.name for s in stacks] == ["llamagen", "sjd", "llamagen-dd1-2step", "llamagen-dd1-1step", "llamagen-mode", "reconstruction"]


def test_a_role_declared_in_the_record_wins_over_the_name(record):
    assert tables.stack_role(record("llamagen-dd1", stack={"name": "llamagen-dd1", "role": "control"})) == "control"


@pytest.mark.parametrize(
    "stack, role",
    [
        ({"name": "llamagen", "kind": "teacher", "sampler": "ar"}, "teacher"),
        ({"name": "mine", "kind": "student", "sampler": "student"}, "student"),
        ({"name": "mine", "kind": "teacher", "sampler": "skip-8"}, "control"),
    ],
)
def test_kind_and_sampler_of_a_stack_give_its_role(record, stack, role):
    assert tables.stack_role(record(stack=stack)) == role


def test_a_heading_does_not_repeat_the_metric_that_its_protocol_starts_with():
    assert tables.Column("fid", 100, "fid/shapes-cnn-v1/64").details == ["n = 100", "shapes-cnn-v1/64"]
    assert tables.Column("recall", None, "prc/shapes-cnn-v1/64").details == ["shapes-cnn-v1/64"]
    assert tables.Column("tv", None, "enumerable-joint").details == ["enumerable-joint"]


def test_spread_and_interval_stand_beside_the_value(record):
    table = table_of(record(metrics=[metric("fid", 12.5, ci95=[11.0, 14.25]), metric("kid", 0.01, std=0.002, ci95=None)]))
    assert [(cell.text, cell.interval) for cell in table.rows[0]] == [("12.50", "11.00 to 14.25"), ("0.0100 ± 0.0020", "")]
    assert next(csv.DictReader(io.StringIO(tables.to_csv(table))))["fid [n = 100] [p] low"] == "11"


def test_records_of_one_stack_share_a_row(record):
    sample, evaluated = record(command="sample", ms=10.0, passes=16), record(fid=3.0)
    (stack,) = tables.collect([sample, evaluated])
    assert (len(stack.records), stack.passes, stack.ms_per_image) == (2, 16, 10.0)


def test_two_models_of_one_name_get_rows_and_labels_of_their_own(record):
    stacks = [{"name": "dd1", "model": "dd1"}, {"name": "dd1", "model": "runs/fresh"}]
    assert [s.label for s in tables.collect([record("dd1", stack=stack) for stack in stacks])] == ["dd1 (dd1)", "dd1 (fresh)"]
    stacks = [{"name": "dd1", "model": "x", "weights_sha256": "a" * 64}, {"name": "dd1", "model": "x", "weights_sha256": "b" * 64}]
    assert [s.label for s in tables.collect([record("dd1", stack=stack) for stack in stacks])] == ["dd1 (aaaaaaaa)", "dd1 (bbbbbbbb)"]


def test_contradicting_values_of_one_stack_are_both_shown(record):
    stacks = tables.collect([record(fid=3.0), record(fid=4.0, id="again")])
    assert [s.label for s in stacks] == ["llamagen (#1)", "llamagen (#2)"]


@pytest.mark.parametrize("change", [{"n": 50}, {"protocol": "other"}, {"reference_sha256": "b" * 64}])
def test_values_measured_differently_never_share_a_column(record, change):
    table = table_of(record("a", metrics=[metric("fid", 1.0)]), record("b", metrics=[metric("fid", 2.0, **change)]))
    assert len(table.columns) == 2
    assert not any(cell.best for row in table.rows for cell in row), "a column with one value has no best"


def test_best_value_follows_the_direction_of_the_metric_and_skips_references(record):
    rows = [("llamagen", 5.0, 0.9), ("llamagen-dd1", 7.0, 0.7), ("reconstruction", 1.0, 1.0)]
    table = table_of(*[record(name, metrics=[metric("fid", fid), metric("class_accuracy", acc)]) for name, fid, acc in rows])
    assert [[cell.text for cell in row if cell.best] for row in table.rows] == [["5.00", "0.900"], [], []]


def test_an_unknown_metric_is_shown_without_a_direction(record):
    table = table_of(record("a", metrics=[metric("sharpness", 1.23456)]), record("b", metrics=[metric("sharpness", 2.0)]))
    assert table.headings[0][0] == "sharpness"
    assert [cell.text for row in table.rows for cell in row if cell.value] == ["1.235", "2"]
    assert not any(cell.best for row in table.rows for cell in row)


def test_missing_and_null_values_are_a_dash(record):
    table = table_of(record("a", metrics=[metric("fid", None)]), record("b", metrics=[metric("fid", 2.0)]))
    assert [row[0].text for row in table.rows] == [tables.MISSING, "2.00"]


def test_speedup_is_the_ratio_of_the_two_times(record):
    teacher, student = tables.collect([record(ms=50.0), record("llamagen-dd1", ms=2.5)])
    assert tables.speedup(student, teacher) == pytest.approx(20.0)
    assert tables.speedup(teacher, teacher) is None


@pytest.mark.parametrize(
    "change",
    [{"command": "bench"}, {"environment": {"cpu": "another cpu"}}, {"cost": {"latency_ms": {"p50": 2.5}, "batch_size": 8}}, {"cost": {}}],
)
def test_no_speedup_between_times_measured_differently(record, change):
    teacher, student = tables.collect([record(ms=50.0), record("llamagen-dd1", ms=2.5) | change])
    assert tables.speedup(student, teacher) is None


def test_no_speedup_when_the_batch_sizes_are_unknown(record):
    teacher, student = tables.collect([record(name, cost={"latency_ms": {"p50": 5.0}}) for name in ("llamagen", "llamagen-dd1")])
    assert tables.speedup(student, teacher) is None


def test_a_benchmark_is_preferred_as_the_source_of_time(record):
    (stack,) = tables.collect([record(command="bench", ms=4.0), record(command="sample", ms=9.0)])
    assert stack.ms_per_image == 4.0


def test_throughput_gives_the_time_of_an_image(record):
    (stack,) = tables.collect([record(cost={"images_per_s": 200.0, "latency_ms": {"p50": 99.0}})])
    assert stack.ms_per_image == pytest.approx(5.0)


def test_honesty_bits_become_marks_and_footnotes(record):
    table = table_of(record(fid=3.0), record("llamagen+w8a8", cost={"simulated": True, "latency_ms": {"p50": 3.0}}))
    text = tables.to_text(table)
    assert "3.00†" in text and "† Comparable inside this report only" in text
    assert "llamagen+w8a8‡" in text and "‡ Simulated (llamagen+w8a8)" in text


def test_csv_holds_full_precision_and_the_comparable_flag(record):
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(table_of(record(fid=3.123456789, passes=16))))))
    column = "fid [n = 100] [shapes-cnn-v1] [reference aaaaaaaaaaaaaaaa]"
    assert (rows[0]["stack"], rows[0]["passes"], rows[0][column], rows[0][f"{column} comparable"]) == (
        "llamagen",
        "16",
        "3.123456789",
        "false",
    )


def test_csv_never_starts_a_cell_with_a_formula(record):
    rows = list(csv.reader(io.StringIO(tables.to_csv(table_of(record("=HYPERLINK(1)", fid=1.0))))))
    assert rows[1][0] == "'=HYPERLINK(1)"


def test_markdown_escapes_names_and_has_equal_columns_in_each_row(record):
    text = tables.to_markdown(table_of(record("a|b *c*", fid=1.0, passes=2), record("d", fid=2.0)))
    assert r"a\|b \*c\*" in text
    widths = {line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, f"pipes in the table's rows: {widths}"


def test_plain_text_keeps_to_the_width_by_going_on_below(record):
    names = ["fid", "kid", "is", "precision", "recall", "class_accuracy", "color_accuracy"]
    table = table_of(*[record(f"stack-{i}", metrics=[metric(name, 0.5 + i) for name in names]) for i in range(3)])
    body = tables.to_text(table, width=60).split("* best")[0]
    assert max(map(len, body.splitlines())) <= 60
    assert body.count("stack-0") > 1


def test_summary_names_baseline_quality_and_measured_speedup(record):
    records = [
        record(fid=5.0, passes=16, ms=40.0),
        record("llamagen-dd1", fid=9.0, passes=1, ms=2.0),
        record("llamagen-mode", fid=90.0, passes=1, ms=1.0),
    ]
    stacks = tables.collect(records)
    text = tables.summary(stacks, tables.metric_table(stacks))
    assert "3 stacks" in text and "the baseline is llamagen (16 passes an image)" in text
    assert "llamagen with the lowest FID, 5.00" in text and "closest other method is llamagen-dd1 with 9.00" in text
    assert "20.0x the speed of llamagen" in text, f"controls are no methods: {text}"


def test_summary_without_times_speaks_of_passes_only(record):
    stacks = tables.collect([record(fid=5.0, passes=16), record("llamagen-dd1", fid=9.0, passes=1)])
    text = tables.summary(stacks, tables.metric_table(stacks))
    assert "No speed-up was measured; llamagen-dd1 needs 1 instead of 16 passes an image." in text


def test_summary_of_a_record_without_metrics_makes_no_claim(record):
    stacks = tables.collect([record()])
    assert tables.summary(stacks, tables.metric_table(stacks)).endswith("No quality metric was measured.")


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"a": 1},
        {"metrics": 3},
        {"metrics": [{"value": 1}]},
        {"stack": "llamagen"},
        {"metrics": [], "cost": {"latency_ms": 3}},
        {"metrics": [], "curves": {"fid": [1, 2]}},
        {"artifacts": [{"kind": "grid"}]},
    ],
)
def test_a_malformed_record_is_an_input_error_that_names_its_source(bad):
    with pytest.raises(InputError, match="the source"):
        tables.check_record(bad, "the source")


# -- a mode of the verify family beside plain sampling -----------------------------------------------------------------------


def test_a_paired_record_is_a_row_of_plain_sampling_and_one_of_the_mode(paired):
    table = table_of(paired())
    assert [(stack.label, stack.role, stack.exactness) for stack in table.stacks] == [
        ("llamagen", "teacher", None), ("llamagen mc", "accelerated", "exact"),
    ]  # fmt: skip
    titles = [title for title, _ in table.headings]
    cells = dict(zip(titles, table.rows[1], strict=True))
    assert cells["Exactness"].text == "exact" and cells["Passes"].text == "2.7" and cells["Tokens/pass"].text == "1.5"
    assert cells["Speed-up"].text == "1.40x [1.30, 1.50]" and cells["Speed-up"].value == 1.4, "as measured in turn, not 30 / 20"
    assert cells["ms/image"].value == 20.0 and table.rows[0][titles.index("ms/image")].value == pytest.approx(30.0)
    assert {"Accepted drafts", "Passes with a single token"} < set(titles)
    assert not {"passes", "tokens_per_pass", "latency_ms", "ar_latency_ms", "speedup"} & set(titles), "said twice"


def test_modes_against_one_plain_sampler_share_its_row(paired):
    table = table_of(paired(), paired("gsd", exactness="lossy"), paired("lantern", exactness="bounded(0.1)"))
    assert [stack.label for stack in table.stacks] == ["llamagen", "llamagen mc", "llamagen gsd", "llamagen lantern"]
    notes = "\n".join(text for _, text in table.footnotes)
    assert "follow another one" in notes and "plain sampling of the same images in turn" in notes


def test_without_an_interval_the_speedup_stands_alone(paired):
    one = paired()
    one["metrics"][-1]["ci95"] = None
    assert tables.speedup_text(tables.collect([one])[1]) == "1.40x"


def test_a_benchmark_of_the_same_mode_gives_the_time_and_the_speedup(paired, record):
    plain, mode = paired()["plain"]["stack"], paired()["stack"]
    bench = [record("llamagen", ms=40.0, command="bench", stack=plain), record("llamagen mc", ms=16.0, command="bench", stack=mode)]
    teacher, fast = tables.collect([paired(), *bench])
    assert (teacher.ms_per_image, fast.ms_per_image, tables.speedup(fast, teacher)) == (40.0, 16.0, pytest.approx(2.5))
    assert fast.paired_speedup is None and fast.decoding is not None


def test_exactness_and_the_interval_are_in_the_csv(paired):
    plain, mode = csv.DictReader(io.StringIO(tables.to_csv(table_of(paired()))))
    assert (mode["exactness"], mode["speedup"], mode["speedup low"], mode["speedup high"]) == ("exact", "1.4", "1.3", "1.5")
    assert (plain["exactness"], plain["speedup"], plain["speedup low"]) == ("", "", "")


def test_pictures_of_plain_sampling_belong_to_its_part(paired):
    artifacts = [{"path": "grid.png", "kind": "grid"}, {"path": "grid-ar.png", "kind": "plain-grid"}]
    plain, mode = tables.split_pair(paired(artifacts=artifacts))
    assert plain["artifacts"] == [{"path": "grid-ar.png", "kind": "grid"}] and mode["artifacts"] == artifacts[:1]
    assert plain["part_of"] == mode["id"] and "id" not in plain


@pytest.mark.parametrize("plain", [3, {"cost": {"latency_ms": 4}}, {"stack": []}, {"other": 1}])
def test_a_malformed_plain_part_is_an_input_error(paired, plain):
    with pytest.raises(InputError, match="plain"):
        tables.check_record(paired(plain=plain), "the source")
