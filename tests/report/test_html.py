import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from arsp.data.images import save_png
from arsp.report import html

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Checks that tags nest and collects attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        assert self.open_tags == [], f"never closed: {self.open_tags}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1] == tag, f"</{tag}> closes {self.open_tags[-3:]}"
        self.open_tags.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def full(tmp_path, record):
    """A report with every section."""
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "grid.png")
    place = {"run_dir": str(tmp_path), "artifacts": [{"path": "grid.png", "kind": "grid"}]}
    curves = {"fid": [{"x": 1, "y": 50.0}, {"x": 2, "y": 9.0}], "accuracy_by_position": [{"x": i, "y": 0.5} for i in range(4)]}
    records = [record(fid=5.0, passes=16, ms=40.0, **place), record("llamagen-dd1", fid=9.0, passes=1, ms=2.0, curves=curves, **place)]
    return html.build_report(records, "A <title> & more")


def test_the_page_is_well_formed_and_has_its_sections_in_order(full):
    page = Page(html.render_html(full))
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert ids == ["samples", "metrics", "quality-cost", "positions", "curves", "runs", "notes"]


def test_the_page_loads_nothing_and_runs_nothing(full):
    text = html.render_html(full)
    page = Page(text)
    links = [value for _, key, value in page.attributes if key in ("src", "srcset", "href", "data", "action")]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert not any(tag == "script" or key.startswith("on") for tag, key, _ in page.attributes)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_pictures_are_valid_data_uris(full):
    found = re.findall(r"data:(image/[a-z+]+);base64,([A-Za-z0-9+/=]+)", html.render_html(full))
    starts = {kind: base64.b64decode(data)[:4] for kind, data in found}
    assert starts == {"image/png": b"\x89PNG", "image/svg+xml": b"<?xm"}


def test_plots_come_in_a_light_and_a_dark_version(full):
    text = html.render_html(full)
    assert text.count("<picture>") == text.count('<source media="(prefers-color-scheme: dark)"') == 3


def test_all_text_from_records_is_escaped(record):
    evil = "<script>alert('x')</script>\"&"
    one = record(
        evil,
        fid=1.0,
        argv=[evil],
        config={evil: evil},
        environment={evil: evil},
        status=evil,
        curves={evil: [{"x": 1, "y": 1}, {"x": 2, "y": 2}]},
    )
    one["metrics"][0]["protocol"] = evil
    text = html.render_html(html.build_report([one, record("b", metrics=[{"name": evil, "value": 1.0}])], evil))
    Page(text)
    assert "<script" not in text and "alert(" in text


def test_dollar_signs_and_underscores_in_names_do_not_break_the_figures(record):
    names = ["a$b_{", "$\\frac$", "^_$$"]
    records = [
        record(name, fid=3.0 + i, passes=i + 1, curves={"$\\x": [{"x": 1, "y": 1.0}, {"x": 2, "y": 2.0}]}) for i, name in enumerate(names)
    ]
    report = html.build_report(records, "100$ and $\\alpha_{")
    assert Page(html.render_html(report)).text.count("$") >= 3
    assert html.render_png(report).startswith(b"\x89PNG")


def test_a_record_without_metrics_shows_its_samples_only(tmp_path, record):
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "grid.png")
    report = html.build_report([record(run_dir=str(tmp_path), artifacts=[{"path": "grid.png", "kind": "grid"}])])
    page = Page(html.render_html(report))
    assert [value for _, key, value in page.attributes if key == "id"] == ["samples", "runs"]
    assert html.render_png(report).startswith(b"\x89PNG")


def test_a_missing_picture_and_a_failed_run_are_visible_notes(tmp_path, record):
    warnings = []
    one = record(fid=2.0, status="failed", run_dir=str(tmp_path), artifacts=[{"path": "grid.png", "kind": "grid"}])
    text = html.render_html(html.build_report([one], warn=warnings.append))
    assert len(warnings) == 2 and all(note in Page(text).text for note in warnings)


def test_a_report_is_the_same_for_the_same_records(full):
    assert html.render_html(full) == html.render_html(full)


def test_extreme_values_still_give_a_report(record):
    values = [0.0, -1.5, 1e12, 1e-9, None, float("nan")]
    records = [record(f"s{i}", fid=value, passes=0, ms=10.0 ** (4 * i - 8)) for i, value in enumerate(values)]
    report = html.build_report(records)
    Page(html.render_html(report))
    assert html.render_png(report).startswith(b"\x89PNG")


def test_a_paired_run_shows_both_grids_its_passes_and_one_run(tmp_path, paired):
    for name in ("grid.png", "grid-ar.png"):
        save_png(np.full((8, 8, 3), len(name), np.uint8), tmp_path / name)
    artifacts = [{"path": "grid.png", "kind": "grid"}, {"path": "grid-ar.png", "kind": "plain-grid"}]
    report = html.build_report([paired(artifacts=artifacts, run_dir=str(tmp_path))])
    assert {label: grid.pixels[0, 0, 0] for label, grid in report.grids.items()} == {"llamagen": 11, "llamagen mc": 8}
    text = html.render_html(report)
    page = Page(text)
    assert [value for _, key, value in page.attributes if key == "id"] == ["samples", "metrics", "decoding", "runs", "notes"]
    assert text.count("<details>") == 1 and "1.40x [1.30, 1.50]" in page.text and "exact" in page.text
    assert html.render_png(report).startswith(b"\x89PNG")
