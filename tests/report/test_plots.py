import numpy as np
import pytest
from matplotlib.text import Text

from arsp.report import plots, tables


def stacks_of(*records):
    return tables.collect(records)


def curve(*ys):
    return [{"x": float(x + 1), "y": y} for x, y in enumerate(ys)]


@pytest.mark.parametrize("higher, expected", [(False, [0, 2]), (True, [0, 1, 3])])
def test_pareto_front_keeps_points_that_nothing_beats(higher, expected):
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 2.0), (4.0, 7.0)]
    assert plots.pareto_front(points, higher) == expected


def test_of_two_points_at_one_cost_only_the_better_is_on_the_front():
    assert plots.pareto_front([(1.0, 5.0), (1.0, 4.0)], False) == [1]


def test_cost_axis_is_time_when_timed_and_passes_otherwise(record):
    timed = stacks_of(record(fid=5.0, passes=16, ms=40.0), record("dd1", fid=9.0, passes=1, ms=2.0))
    counted = stacks_of(record(fid=5.0, passes=16), record("dd1", fid=9.0, passes=1, ms=2.0))
    assert plots.cost_axis(timed, plots.quality_column(timed)) == ("milliseconds an image", {"llamagen": 40.0, "dd1": 2.0})
    assert plots.cost_axis(counted, plots.quality_column(counted)) == ("network passes an image", {"llamagen": 16.0, "dd1": 1.0})


def test_every_figure_is_absent_when_the_records_have_nothing_for_it(record):
    stacks = stacks_of(record())
    assert [draw(stacks) for draw in (plots.quality_latency, plots.position_maps, plots.training_curves)] == [None, None, None]


def test_all_text_of_every_figure_is_at_least_nine_points(record):
    curves = {"heldout_ce": curve(3.0, 2.0), "fid": curve(90.0, 9.0), "accuracy_by_position": curve(*np.linspace(1, 0, 65)[:-1])}
    stacks = stacks_of(record(fid=5.0, passes=16, ms=40.0), record("dd1", fid=9.0, passes=1, ms=2.0, curves=curves))
    with plots.theme():
        figures = [draw(stacks) for draw in (plots.quality_latency, plots.position_maps, plots.training_curves)]
        figures.append(plots.overview(stacks, {"dd1": np.zeros((8, 8, 3), np.uint8)}, "title"))
    sizes = [text.get_fontsize() for figure in figures for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 9, f"smallest font is {min(sizes)}"


def test_labels_of_crowded_points_do_not_overlap(record):
    records = [record(f"llamagen-dd1-variant-{i}", fid=10.0 + i, passes=1, ms=3.0 + 0.1 * i) for i in range(4)]
    with plots.theme():
        figure = plots.quality_latency(stacks_of(*records))
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer).extents for text in figure.axes[0].texts]
    overlaps = [plots._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 4 and max(overlaps) == 0, f"overlaps in square pixels: {overlaps}"


@pytest.mark.parametrize("num, grid, shape", [(16, None, (4, 4)), (16, [2, 8], (2, 8)), (6, None, (1, 6)), (16, [3, 3], (4, 4))])
def test_token_grid_comes_from_the_record_or_is_square(record, num, grid, shape):
    curves = {"accuracy_by_position": [{"x": i, "y": 0.5} for i in range(num)]}
    (stack,) = stacks_of(record(stack={"name": "dd1", "grid": grid}, curves=curves))
    assert plots.position_map(stack).shape == shape


def test_accuracy_by_position_is_also_read_from_metrics(record):
    as_list = record("a", metrics=[{"name": "accuracy_by_position", "value": [1.0, 0.5, 0.25, 0.0]}])
    one_each = record(
        "b", metrics=[{"name": "accuracy_by_position", "position": i, "value": v} for i, v in ((1, 0.5), (0, 1.0), (3, None))]
    )
    one, other = stacks_of(as_list, one_each)
    assert plots.position_map(one).tolist() == [[1.0, 0.5], [0.25, 0.0]]
    assert plots.position_map(other).tolist() == [[1.0, 0.5]]


def test_curves_of_one_name_share_an_axes_and_others_are_horizontal_lines(record):
    fresh = record("dd1-fresh", curves={"fid": curve(90.0, 40.0, 20.0)})
    packaged = record("dd1-packaged", curves={"fid": curve(80.0, 30.0, 10.0)})
    stacks = stacks_of(record(fid=5.0), fresh, packaged)
    with plots.theme():
        (axes,) = plots.training_curves(stacks).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["llamagen (5.00)", "dd1-fresh", "dd1-packaged"]


def test_svg_depends_on_the_content_only(record):
    stacks = stacks_of(record(fid=5.0, ms=40.0), record("dd1", fid=9.0, ms=2.0))
    with plots.theme():
        assert plots.to_svg(plots.quality_latency(stacks)) == plots.to_svg(plots.quality_latency(stacks))


def test_tokens_a_pass_and_acceptance_are_drawn_for_every_mode(paired):
    stacks = stacks_of(paired(), paired("zipar", exactness="lossy", cost=paired()["cost"] | {"verify": {"committed": {"2": 5}}}))
    with plots.theme():
        figure = plots.decoding(stacks)
        plots.to_png(figure)
    bars = [axes for axes in figure.axes if axes.patches]
    assert [[bar.get_height() for bar in axes.patches] for axes in bars] == [[75.0, 25.0], [100.0]]
    assert [[bar.get_x() + bar.get_width() / 2 for bar in axes.patches] for axes in bars] == [[1, 3], [2]]
    titles = [axes.get_title(loc="left") for axes in bars]
    assert titles[0] == "llamagen mc\nexact, 1.50 tokens a pass, speed-up 1.40x [1.30, 1.50]" and "lossy" in titles[1]
    assert len([axes for axes in figure.axes if axes.images]) == 1, "no draft was tested by zipar"
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 9


def test_acceptance_keeps_the_place_in_the_image(paired):
    mode = stacks_of(paired())[1]
    np.testing.assert_array_equal(plots.acceptance_map(mode), [[0.25, 1.0], [0.5, np.nan]])


@pytest.mark.parametrize("rates", [None, [], [[]], [[None, None]], [[0.5], [0.5, 0.5]], [0.5], "x"])
def test_a_map_that_is_none_is_not_drawn(paired, rates):
    one = paired()
    one["cost"]["verify"]["acceptance_map"] = rates
    mode = stacks_of(one)[1]
    assert plots.acceptance_map(mode) is None and plots.decoding([mode]) is not None


def test_the_one_picture_has_the_passes_of_a_mode(paired):
    with plots.theme():
        plain = plots.overview(stacks_of(paired())[:1], {}, "title")
        both = plots.overview(stacks_of(paired()), {}, "title")
    assert len(plain.findobj(plots.Axes)) == 0 and len(both.findobj(plots.Axes)) == 3
