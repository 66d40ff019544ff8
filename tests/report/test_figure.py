"""Figures as they are written: shares in percent, others as they are, and which way is better."""

from limbeck.report.charts.span import scale_for
from limbeck.report.comparison_page import comparison_page
from limbeck.report.figure import Figure, figure_of, headline_of
from limbeck.report.table import columns, markdown_table, rows
from tests.report.facts import facts_of
from tests.report.test_sentences import PERPLEXITY

SHARE, PLAIN = Figure("accuracy", "accuracy"), Figure("perplexity", "perplexity", share=False, lower=True, digits=2)


def test_numbers_that_are_not_there():
    for figure in (SHARE, PLAIN):
        assert figure.plus_minus(None) == "–"
        assert figure.interval({"interval": None}) == figure.difference(None) == ""
    assert SHARE.plus_minus({"mean": 0.5, "interval": None}) == "50.0"


def test_only_shares_are_cut():
    assert SHARE.interval({"interval": [-0.2, 1.3]}) == "0.0 to 100.0"
    assert PLAIN.interval({"interval": [0.5, 130.0]}) == "0.50 to 130.00"
    assert PLAIN.interval({"interval": [-0.5, 0.25]}, sign=True) == "−0.50 to +0.25"


def test_what_a_run_is_judged_by():
    assert headline_of({"accuracy": 0.5, "perplexity": 7.0}).key == "perplexity"
    assert headline_of({"accuracy": 0.5, "samples": 9000}).digits == 2
    assert headline_of({"nll": 0.5}) is None


def test_a_table_of_perplexities():
    facts = facts_of(PERPLEXITY, "perplexity", lower=True)
    assert columns(facts)[1] == "perplexity"
    line = next(line for line in rows(facts) if line[0] == "KD")
    assert line[1].startswith("8.60 ± ")
    assert line[2].startswith("−0.50 (−")
    assert line[3] == "gain"
    assert "below zero" in markdown_table(facts)
    assert figure_of(facts).rank(8.0) > figure_of(facts).rank(9.0)


def test_the_page_puts_the_lowest_first(tmp_path):
    page = comparison_page(facts_of(PERPLEXITY, "perplexity", lower=True), tmp_path)
    assert [line["name"] for line in page["table"]["rows"]] == ["Teacher", "No teacher", "Label smoothing", "KD"]
    assert "percent" not in page["table"]["axis"]


def test_the_axis_leaves_out_what_is_far_worse_on_either_side():
    assert scale_for([0.1, 0.9, 0.91, 0.92]).low > 0.8
    scale = scale_for([900.0, 9.0, 9.1, 9.2], lower=True)
    assert 9.2 < scale.high < 10
    assert scale.low < 9.0
