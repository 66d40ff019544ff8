"""Charts: well-formed, escaped, honest about what is missing."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report.charts.classes import by_class
from limbeck.report.charts.curves import Series, curves
from limbeck.report.charts.heatmap import heatmap
from limbeck.report.charts.reliability import reliability
from limbeck.report.charts.span import scale_for, span
from limbeck.report.charts.svg import Scale, ticks
from limbeck.report.figure import Figure

SHARE = Figure("accuracy", "accuracy")
HOSTILE = "<script>alert('&')</script>\""


def parsed(picture) -> ElementTree.Element:
    root = ElementTree.fromstring(str(picture))
    for element in root.iter():
        for name, value in element.attrib.items():
            if name not in ("class", "aria-label", "points", "transform", "viewBox", "role", "text-anchor"):
                assert re.fullmatch(r"-?\d+(\.\d+)?", value), (element.tag, name, value)
    return root


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_enough(low, span_, wanted):
    found = ticks(low, low + span_, wanted)
    assert all(low - 1e-6 * span_ <= v <= low + span_ + 1e-6 * span_ for v in found)
    assert len(found) <= wanted + 1
    assert len(found) >= wanted // 3


def test_a_scale_of_no_width_is_its_middle():
    assert Scale(2, 2, 0, 10)(2) == 5


def test_curves_average_seeds_where_all_of_them_were_measured():
    line = Series("KD", "m0", [[(10, 0.1), (20, 0.3), (30, 0.9)], [(10, 0.3), (20, 0.5)]])
    assert line.middle() == [(10, pytest.approx(0.2), 0.1, 0.3), (20, pytest.approx(0.4), 0.3, 0.5)]
    root = parsed(curves([line], "accuracy", lambda v: f"{v:.1f}"))
    assert len(root.findall("polyline")) == 1
    assert len(root.findall("polygon")) == 1
    assert len(root.find("polyline").get("points").split()) == 2


def test_no_picture_of_nothing():
    assert curves([], "x", str) is None
    assert curves([Series("one point", "m0", [[(1, 2.0)]])], "x", str) is None


def test_names_are_escaped_everywhere():
    points = [(1, 1.0), (2, 2.0)]
    bins = {"edges": [0, 0.5, 1], "count": [0, 4], "accuracy": [None, 0.5], "confidence": [None, 0.75]}
    cka = {"student": [HOSTILE], "teacher": [HOSTILE], "matrix": [[0.5]], "samples": 9}
    for picture in (
        curves([Series(HOSTILE, "m0", [points])], HOSTILE, lambda v: HOSTILE),
        reliability(HOSTILE, bins, "m0"),
        heatmap(HOSTILE, cka),
        *by_class([HOSTILE, "b"], [(HOSTILE, "m0", [0.1, 0.2])]),
        span(HOSTILE, 0.5, [0.4, 0.6], [0.5], scale_for([0.4, 0.6]), [], "m0", SHARE),
    ):
        assert "<script" not in str(picture)
        assert not [e for e in parsed(picture).iter() if e.tag.endswith("script")]


def test_reliability_draws_bins_that_hold_samples_and_the_gap_to_the_diagonal():
    bins = {"edges": [0, 0.5, 1], "count": [0, 4], "accuracy": [None, 0.5], "confidence": [None, 0.75]}
    root = parsed(reliability("student", bins, "m0"))
    bars = [r for r in root.findall("rect") if "bar" in r.get("class")]
    (gap,) = [r for r in root.findall("rect") if r.get("class") == "gap"]
    assert len(bars) == 2  # accuracy above, share of samples below
    assert float(bars[0].get("height")) == pytest.approx(105, abs=0.1)
    assert float(gap.get("height")) == pytest.approx(52.5, abs=0.1)
    assert gap.find("title").text == "4 samples 75.0% sure, 50.0% right"


def test_heatmap_leaves_undefined_pairs_blank():
    cka = {"student": ["a", "b"], "teacher": ["c"], "matrix": [[None], [-0.1]], "samples": 9}
    root = parsed(heatmap("s", cka))
    cells = [r for r in root.findall("rect") if r.get("class") == "cell"]
    assert [c.get("fill-opacity") for c in cells] == ["0", "0"]
    assert {"–", "−0.10"} <= {t.text for t in root.findall("text")}
    wide = {"student": ["a"], "teacher": [f"t{i}" for i in range(20)], "matrix": [[0.5] * 20], "samples": 9}
    assert not [t for t in parsed(heatmap("s", wide)).findall("text") if t.text == "0.50"]


def test_many_classes_show_where_models_differ_most():
    names = [f"class{i}" for i in range(100)]
    one, two = [0.5] * 100, [0.5] * 100
    two[77] = 0.9
    two[3] = None
    pictures = [parsed(p) for p in by_class(names, [("one", "m0", one), ("two", "m1", two)])]
    shown = {t.text for p in pictures for t in p.findall("text")}
    assert "class77" in shown
    assert sum(name in shown for name in names) == 30


def test_spans_share_one_axis():
    scale = scale_for([0.4, 0.6])
    low, high = (
        parsed(span("x", mean, None, [mean], scale, [], "m0", SHARE)).findall("circle")[-1].get("cx")
        for mean in (0.4, 0.6)
    )
    assert float(low) < 40
    assert float(high) > 180


def test_what_lies_far_below_the_rest_is_an_arrow_and_does_not_press_them_together():
    values = [0.45, 0.5, 0.89, 0.9, 0.92, 0.95]
    scale = scale_for(values)
    assert scale(0.89) < 30
    root = parsed(span("random", 0.47, [0.3, 0.6], [0.45, 0.5], scale, [], "k0", SHARE))
    assert not root.findall("circle")
    assert root.find("polygon").find("title").text == "random: 47.00%, off the axis"
    assert scale_for([0.5, 0.5, 0.5, 0.9])(0.5) == pytest.approx(18.9, abs=0.1)
